//! The Mann-Whitney test, exact with ties too.

/// The most values of both samples together that [`mann_whitney`] counts through; beyond, that takes seconds.
const MOST: usize = 200;

/// What [`mann_whitney`] finds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MannWhitney {
    /// Pairs of which the first sample has the larger value, ties counting half.
    pub u: f64,
    /// Two-sided p.
    pub p: f64,
}

/// The Mann-Whitney test of two samples, with the exact two-sided p: of all ways to deal the pooled values into samples of these sizes,
/// the share for which U is at least as far from its mean n_a n_b / 2 as it is here. Ties have their mean rank, and are dealt out like
/// other values. Without ties this is the p of the tables; with ties, which make it conditional on them, it is still exact.
///
/// `None` where a sample is empty, a value is not a number, or both have more than 200 values together.
pub fn mann_whitney(a: &[f64], b: &[f64]) -> Option<MannWhitney> {
    let count = a.len() + b.len();
    let bad = a.iter().chain(b).any(|v| v.is_nan());
    if a.is_empty() || b.is_empty() || bad || count > MOST {
        return None;
    }
    let ranks = twice_midranks(a, b);
    let sum: usize = ranks[..a.len()].iter().sum();
    let ways = ways(&ranks, a.len());
    let mean = a.len() * (count + 1); // twice the mean of the rank sum, as `ranks` are twice the ranks
    let all: f64 = ways.iter().sum();
    let far = |(s, _): &(usize, &f64)| s.abs_diff(mean) >= sum.abs_diff(mean);
    let beyond: f64 = ways.iter().enumerate().filter(far).map(|(_, ways)| ways).sum();
    let u = 0.5 * (sum - a.len() * (a.len() + 1)) as f64;
    Some(MannWhitney { u, p: (beyond / all).min(1.0) })
}

/// Twice the rank of each value among all, `a`'s before `b`'s; equal values share the mean of their ranks, so that twice it is whole.
fn twice_midranks(a: &[f64], b: &[f64]) -> Vec<usize> {
    let all: Vec<f64> = a.iter().chain(b).copied().collect();
    let rank = |v: &f64| {
        let below = all.iter().filter(|w| *w < v).count();
        let equal = all.iter().filter(|w| *w == v).count();
        2 * below + equal + 1
    };
    all.iter().map(rank).collect()
}

/// In how many ways `take` of the values have each sum. The counts pass 2^53 for large samples, where they are rounded: their shares keep
/// fourteen digits, since only numbers above 0 are added.
fn ways(values: &[usize], take: usize) -> Vec<f64> {
    let most: usize = values.iter().sum();
    let mut ways = vec![vec![0.0; most + 1]; take + 1];
    ways[0][0] = 1.0;
    let mut reached = 0;
    for (i, &value) in values.iter().enumerate() {
        for taken in (0..take.min(i + 1)).rev() {
            let (from, to) = ways.split_at_mut(taken + 1);
            for (to, from) in to[0][value..].iter_mut().zip(&from[taken][..=reached]) {
                *to += from;
            }
        }
        reached += value;
    }
    ways.swap_remove(take)
}
