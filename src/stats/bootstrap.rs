//! Effect size and balanced accuracy with bootstrap intervals.

use statrs::function::gamma::ln_gamma;

use super::means::{Interval, mean, percentile, sd};
use super::student::{normal, normal_quantile};
use crate::data::Draws;

/// Resamples of [`hedges`]: of few values, so many are cheap.
const RESAMPLES: usize = 10_000;
/// Resamples of [`balanced_interval`]: enough for ends that move by a hundredth of the interval from seed to seed.
const IMAGE_RESAMPLES: usize = 2000;

/// What [`hedges`] finds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effect {
    /// Hedges' g: the difference of means in pooled standard deviations, corrected for small samples.
    pub g: f64,
    /// Its bootstrap interval; `None` for fewer than three values in a sample, or where all resamples lie on one side of g.
    pub interval: Option<Interval>,
}

/// Hedges' g of two samples, first less second, with a BCa bootstrap interval of 10000 resamples.
///
/// BCa (bias-corrected and accelerated, Efron 1987) rather than plain percentiles, because resamples of few values have too small a spread
/// and so too large a g: the correction takes most of that bias out. Each sample is resampled by itself; resamples without any spread, which
/// have no g, are left out. The acceleration is that of the jackknife over both samples.
///
/// `None` where a sample has fewer than two values, neither has a spread, or a value is not finite.
pub fn hedges(a: &[f64], b: &[f64], level: f64, seed: u64) -> Option<Effect> {
    let g = hedges_g(a, b)?;
    Some(Effect { g, interval: bca(a, b, g, level, seed) })
}

/// g = J (mean_a - mean_b) / s_pooled with the exact J = Gamma(m / 2) / (sqrt(m / 2) Gamma((m - 1) / 2)), m = n_a + n_b - 2 (Hedges 1981).
fn hedges_g(a: &[f64], b: &[f64]) -> Option<f64> {
    let (sa, sb) = (sd(a)?, sd(b)?);
    let (na, nb) = (a.len() as f64, b.len() as f64);
    let m = na + nb - 2.0;
    let pooled = (((na - 1.0) * sa * sa + (nb - 1.0) * sb * sb) / m).sqrt();
    let j = (ln_gamma(0.5 * m) - ln_gamma(0.5 * (m - 1.0))).exp() / (0.5 * m).sqrt();
    let g = j * (mean(a)? - mean(b)?) / pooled;
    (pooled > 0.0 && g.is_finite()).then_some(g)
}

fn bca(a: &[f64], b: &[f64], g: f64, level: f64, seed: u64) -> Option<Interval> {
    let mut draws = Draws::new(&[seed]);
    let (mut ra, mut rb) = (a.to_vec(), b.to_vec());
    let mut resampled = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        ra.fill_with(|| a[draws.below(a.len())]);
        rb.fill_with(|| b[draws.below(b.len())]);
        resampled.extend(hedges_g(&ra, &rb));
    }
    resampled.sort_by(f64::total_cmp);
    // Resamples of values on a grid, as accuracies are, meet g itself but for its rounding; ties count half.
    let rounding = 1e-12 * g.abs().max(1.0);
    let up_to = |bound: f64| resampled.partition_point(|x| *x < bound);
    let below = up_to(g - rounding) + up_to(g + rounding);
    let bias = normal_quantile(0.5 * below as f64 / resampled.len() as f64);
    let acceleration = acceleration(a, b)?;
    let end = |share: f64| {
        let z = bias + normal_quantile(share);
        percentile(&resampled, normal(bias + z / (1.0 - acceleration * z)))
    };
    let tail = 0.5 * (1.0 - level);
    bias.is_finite().then_some(Interval { low: end(tail)?, high: end(1.0 - tail)? })
}

/// sum l^3 / n^3 / (6 (sum l^2 / n^2)^1.5) over the values of both samples, l = (n - 1) (mean of the sample's g without one value - g
/// without this one), n the sample's size (Davison and Hinkley 1997, section 5.3).
fn acceleration(a: &[f64], b: &[f64]) -> Option<f64> {
    let without = |values: &[f64], i: usize| [&values[..i], &values[i + 1..]].concat();
    let first: Option<Vec<f64>> = (0..a.len()).map(|i| hedges_g(&without(a, i), b)).collect();
    let second: Option<Vec<f64>> = (0..b.len()).map(|i| hedges_g(a, &without(b, i))).collect();
    let (mut cubes, mut squares) = (0.0, 0.0);
    for g in [first?, second?] {
        let (n, mean) = (g.len() as f64, mean(&g)?);
        for l in g.iter().map(|g| (n - 1.0) * (mean - g) / n) {
            cubes += l.powi(3);
            squares += l.powi(2);
        }
    }
    (squares > 0.0).then(|| cubes / (6.0 * squares.powf(1.5)))
}

/// The bootstrap interval, over test images, of a balanced accuracy that is the mean of several seeds', or of a difference of two models'.
///
/// `scores` has a number for each image: the share of the seeds that were right about it; or, for a difference, one model's share less the
/// other's, so that both are resampled by the same images. Balanced accuracy is the mean over classes of the mean score of the class's images.
/// Images are resampled within their class, so that every resample has the test set's numbers by class, as a balanced accuracy assumes.
/// The ends are percentiles of 2000 resamples.
///
/// It tells how much hangs on the choice of test images, and nothing of seeds, over which it is a mean. Images are taken for independent:
/// where several are of one patient, the true interval is wider. `None` without images, or where lengths differ.
pub fn balanced_interval(
    labels: &[u32],
    scores: &[f64],
    level: f64,
    seed: u64,
) -> Option<Interval> {
    if labels.is_empty() || labels.len() != scores.len() {
        return None;
    }
    let mut classes = std::collections::BTreeMap::<u32, Vec<f64>>::new();
    for (label, score) in labels.iter().zip(scores) {
        classes.entry(*label).or_default().push(*score);
    }
    let mut draws = Draws::new(&[seed]);
    let mut of_class = |scores: &Vec<f64>| {
        let sum: f64 = (0..scores.len()).map(|_| scores[draws.below(scores.len())]).sum();
        sum / scores.len() as f64
    };
    let mut balanced = || classes.values().map(&mut of_class).sum::<f64>() / classes.len() as f64;
    let mut resampled: Vec<f64> = (0..IMAGE_RESAMPLES).map(|_| balanced()).collect();
    resampled.sort_by(f64::total_cmp);
    let tail = 0.5 * (1.0 - level);
    Some(Interval { low: percentile(&resampled, tail)?, high: percentile(&resampled, 1.0 - tail)? })
}
