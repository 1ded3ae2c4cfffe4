//! Tests of counts, and many tests at once.

/// Holm's step-down correction: p-values in the order given, raised so that comparing each with alpha keeps the probability of any false
/// rejection at alpha, whatever the tests have to do with each other. The i-th smallest of m is multiplied by m - i + 1, is never below
/// a smaller one's, and is at most 1 (Holm 1979).
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&i, &j| p[i].total_cmp(&p[j]));
    let mut adjusted = vec![0.0; p.len()];
    let mut least = 0.0_f64;
    for (place, &i) in order.iter().enumerate() {
        least = least.max((p.len() - place) as f64 * p[i]).min(1.0);
        adjusted[i] = least;
    }
    adjusted
}

/// McNemar's exact two-sided p of paired answers: `b` cases that only the first got right, `c` that only the second did. Where both are
/// as good, b is binomial of b + c halves; p is twice the smaller tail, at most 1. 1 where they never differ.
pub fn mcnemar(b: u64, c: u64) -> f64 {
    let (n, k) = (b + c, b.min(c));
    // Binomial coefficients relative to the middle one, from there outwards until they vanish beside it.
    let middle = n / 2;
    let (mut below, mut tail) = (0.0, 0.0);
    let mut term = 1.0;
    for i in (0..=middle).rev() {
        if i <= k {
            tail += term;
        }
        below += term;
        term *= i as f64 / (n - i + 1) as f64;
        if term == 0.0 {
            break;
        }
    }
    // The coefficients are symmetric; an even n has one in the middle.
    let all = if n % 2 == 0 { 2.0 * below - 1.0 } else { 2.0 * below };
    (2.0 * tail / all).min(1.0)
}
