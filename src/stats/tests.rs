//! Everything against `tests/stats_reference.json`, which `scripts/stats_reference` writes; and what is no number.

use serde_json::Value;

use super::*;

/// The cases of one function. Below six the file is not what it should be.
fn cases(name: &str) -> Vec<Value> {
    let text = include_str!("../../tests/stats_reference.json");
    let all: Value = serde_json::from_str(text).unwrap();
    let cases = all[name].as_array().unwrap_or_else(|| panic!("no cases of {name}")).clone();
    assert!(cases.len() >= 6, "{name}: {} cases", cases.len());
    cases
}

fn number(case: &Value, key: &str) -> f64 {
    case[key].as_f64().unwrap_or_else(|| panic!("{key} in {case}"))
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn two(case: &Value) -> (Vec<f64>, Vec<f64>) {
    (numbers(&case["a"]), numbers(&case["b"]))
}

/// Compares to a relative error; numbers that differ by less than the rounding of values of size `scale` are equal.
#[track_caller]
fn near(got: f64, case: &Value, key: &str, relative: f64, scale: f64) {
    let expected = number(case, key);
    let bound = relative * expected.abs() + 1e-15 * scale;
    assert!((got - expected).abs() <= bound, "{key}: {got}, expected {expected}, in {case}");
}

#[track_caller]
fn interval(got: Interval, case: &Value, scale: f64) {
    near(got.low, case, "low", 1e-9, scale);
    near(got.high, case, "high", 1e-9, scale);
}

#[test]
fn means_and_welch() {
    for case in &cases("mean") {
        let (a, level) = (numbers(&case["a"]), number(case, "level"));
        near(mean(&a).unwrap(), case, "mean", 1e-15, 0.0);
        near(sd(&a).unwrap(), case, "sd", 1e-9, 0.0);
        interval(mean_interval(&a, level).unwrap(), case, 1.0);
    }
    for case in &cases("welch") {
        let (a, b) = two(case);
        // A difference of large numbers keeps their rounding.
        let scale = a.iter().chain(&b).fold(1.0, |m: f64, v| m.max(v.abs()));
        let got = welch(&a, &b, number(case, "level")).unwrap();
        near(got.difference, case, "difference", 1e-9, scale);
        near(got.t, case, "t", 1e-9, scale);
        near(got.df, case, "df", 1e-9, scale);
        near(got.p, case, "p", 1e-9, 0.0);
        interval(got.interval, case, scale);
    }
}

#[test]
fn ranks_exact_with_and_without_ties() {
    for case in &cases("mann_whitney") {
        let (a, b) = two(case);
        let got = mann_whitney(&a, &b).unwrap();
        assert_eq!(got.u, number(case, "u"), "{case}");
        near(got.p, case, "p", 1e-9, 0.0);
        let turned = mann_whitney(&b, &a).unwrap();
        assert_eq!(turned.u, (a.len() * b.len()) as f64 - got.u);
        assert!((turned.p - got.p).abs() < 1e-12, "{case}");
    }
}

#[test]
fn counts_and_corrections() {
    for case in &cases("holm") {
        let (got, expected) = (holm(&numbers(&case["p"])), numbers(&case["adjusted"]));
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got - expected).abs() <= 1e-15 * expected, "{got} {case}");
        }
    }
    for case in &cases("mcnemar") {
        let count = |key: &str| case[key].as_u64().unwrap();
        near(mcnemar(count("b"), count("c")), case, "p", 1e-9, 0.0);
        assert_eq!(mcnemar(count("b"), count("c")), mcnemar(count("c"), count("b")));
    }
    // Numbers whose binomial coefficients no float holds.
    assert!((mcnemar(50_000, 50_000) - 1.0).abs() < 1e-9 && mcnemar(0, 100_000) == 0.0);
}

#[test]
fn what_a_number_of_runs_can_show() {
    for case in &cases("power") {
        let of = |key: &str| Sample {
            n: case[key][0].as_u64().unwrap() as usize,
            sd: case[key][1].as_f64().unwrap(),
        };
        let (a, b, alpha) = (of("a"), of("b"), number(case, "alpha"));
        near(power(number(case, "difference"), a, b, alpha).unwrap(), case, "power", 1e-6, 0.0);
        let wanted = number(case, "wanted");
        let found = detectable(a, b, alpha, wanted).unwrap();
        near(found, case, "detectable", 1e-6, 0.0);
        assert!((power(found, a, b, alpha).unwrap() - wanted).abs() < 1e-9);
    }
}

#[test]
fn bootstraps() {
    for case in &cases("hedges") {
        let (a, b) = two(case);
        let (level, seed) = (number(case, "level"), case["seed"].as_u64().unwrap());
        let got = hedges(&a, &b, level, seed).unwrap();
        near(got.g, case, "g", 1e-9, 0.0);
        interval(got.interval.unwrap(), case, 100.0);
        assert_ne!(hedges(&a, &b, level, seed + 100).unwrap().interval, got.interval);
    }
    for case in &cases("balanced") {
        let labels: Vec<u32> =
            case["labels"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect();
        let (scores, seed) = (numbers(&case["scores"]), case["seed"].as_u64().unwrap());
        interval(
            balanced_interval(&labels, &scores, number(case, "level"), seed).unwrap(),
            case,
            1.0,
        );
    }
}

#[test]
fn what_is_no_number_is_none() {
    let (constant, spread) = ([0.1; 10], [0.1, 0.2, 0.4]);
    assert_eq!(mean(&constant), Some(0.1));
    assert_eq!(sd(&constant), Some(0.0), "no spread by rounding");
    assert_eq!((mean(&[]), sd(&[0.5]), mean_interval(&[0.5], 0.95)), (None, None, None));
    assert_eq!(mean_interval(&constant, 0.95), Some(Interval { low: 0.1, high: 0.1 }));
    assert_eq!(mean_interval(&spread, 1.0), None);
    for bad in [&[][..], &[0.5], &[f64::NAN, 0.5], &[f64::INFINITY, 0.5]] {
        assert_eq!(welch(bad, &spread, 0.95), None, "{bad:?}");
        assert_eq!(hedges(bad, &spread, 0.95, 0), None, "{bad:?}");
    }
    assert_eq!(welch(&constant, &[0.2; 4], 0.95), None);
    assert_eq!(hedges(&constant, &[0.2; 4], 0.95, 0), None);
    assert_eq!(hedges(&spread, &[0.2, 0.3], 0.95, 0).unwrap().interval, None, "two values");
    assert_eq!(mann_whitney(&constant, &[0.1; 4]), Some(MannWhitney { u: 20.0, p: 1.0 }));
    assert_eq!(mann_whitney(&[], &spread), None);
    assert_eq!(mann_whitney(&[f64::NAN], &spread), None);
    assert_eq!(mann_whitney(&[0.0; 150], &[0.0; 51]), None);
    let (one, none) = (Sample { n: 1, sd: 0.1 }, Sample { n: 10, sd: 0.0 });
    let some = Sample { n: 10, sd: 0.1 };
    assert_eq!((power(0.1, one, some, 0.05), power(0.1, none, none, 0.05)), (None, None));
    assert_eq!(
        (detectable(some, some, 0.05, 0.05), detectable(some, some, 0.0, 0.8)),
        (None, None)
    );
    assert_eq!(balanced_interval(&[], &[], 0.95, 0), None);
    assert_eq!(balanced_interval(&[0], &[0.5, 0.5], 0.95, 0), None);
}
