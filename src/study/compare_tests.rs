//! Comparisons of made-up studies: the verdict's error rates, answers of votes, and studies that are not whole.

use super::compare::*;
use super::example_tests::{Example, Made};
use super::results::Results;
use super::verdict;

const PLAIN: Made = ("plain", None, 0.8, 0.7);

fn example<'a>(models: &'a [Made<'a>]) -> Example<'a> {
    Example {
        name: "made up",
        classes: 2,
        models,
        seeds: 10,
        holdout: false,
        images: 100,
        spread: 0.02,
        dir: None,
        seed: 0,
    }
}

fn only(results: &Results) -> Comparison {
    let findings = compare(results);
    assert_eq!(findings.comparisons.len(), 1);
    findings.comparisons[0].clone()
}

/// 200 studies of two models that are as good as each other: a test at 5 % rejects about 5 % of them. Then one where they are not.
#[test]
fn errors_of_the_verdict() {
    let rejected = |difference: f64, seed: u64| {
        let models = [PLAIN, ("attention", Some(0), PLAIN.2 + difference, 0.0)];
        let results = Example { seed, ..example(&models) }.results();
        only(&results).verdict != Verdict::NotSignificant
    };
    let false_alarms = (0..200).filter(|seed| rejected(0.0, *seed)).count();
    assert!((4..=16).contains(&false_alarms), "{false_alarms} of 200 null studies rejected");
    let found = (0..50).filter(|seed| rejected(0.06, *seed)).count();
    assert!(found >= 45, "a real difference was found in {found} of 50 studies");
}

/// The same for the family: of four models that are as good as their baseline, any is called different in about 5 % of the studies at most.
#[test]
fn errors_of_a_family() {
    let same = |name| (name, Some(0), PLAIN.2, PLAIN.3);
    let models = [PLAIN, same("a"), same("b"), same("c"), same("d")];
    let any = |seed: u64| {
        let findings = compare(&Example { seed, ..example(&models) }.results());
        assert!(findings.comparisons.iter().all(|c| c.family == 4));
        let raw = findings.comparisons.iter().any(|c| c.welch.unwrap().p < 0.05);
        (raw, findings.comparisons.iter().any(|c| c.verdict != Verdict::NotSignificant))
    };
    let all: Vec<_> = (0..200).map(any).collect();
    let (raw, corrected) = (all.iter().filter(|a| a.0).count(), all.iter().filter(|a| a.1).count());
    assert!(corrected <= 16, "{corrected} of 200 studies without a difference claim one");
    assert!(raw > 20, "without the correction there would be many: {raw}");
}

#[test]
fn a_difference_is_found_and_put_in_words() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let models = [PLAIN, ("GA", Some(0), 0.9, 0.7), ("LA", Some(0), 0.7, 0.7)];
    let results = Example { holdout: true, dir: Some(dir.path()), ..example(&models) }.results();
    let findings = compare(&results);
    assert_eq!(findings.notes, Vec::<String>::new());
    let kinds: Vec<_> = findings
        .comparisons
        .iter()
        .map(|c| (c.model, c.judged.short(), c.part, c.verdict))
        .collect();
    let expected = [
        (1, "ID", "id_test", Verdict::Better),
        (1, "OOD", "test", Verdict::NotSignificant),
        (2, "ID", "id_test", Verdict::Worse),
        (2, "OOD", "test", Verdict::NotSignificant),
    ];
    assert_eq!(kinds, expected);
    let better = &findings.comparisons[0];
    assert_eq!(better.family, 2, "each kind of part is a family of its own");
    assert!(better.mann_whitney.unwrap().p < 0.01 && better.effect.unwrap().g > 2.0);
    let images = better.images.unwrap();
    assert!(images.low > 0.0 && images.high < 0.2, "{images:?}");
    let votes = better.votes.unwrap();
    assert!(votes.only_model >= votes.only_baseline, "{votes:?}");
    let words = verdict::study(&results, &findings).lines().join("\n");
    for part in [
        "In distribution: of 2 comparisons of models with their baselines, 1 significantly better, 1 significantly worse.",
        "GA is significantly better than plain on made up in distribution (id_test): by ",
        "LA is significantly worse than plain on made up in distribution (id_test): by ",
        "Out of distribution: no significant difference in 2 comparisons.",
        "No significant difference: GA against plain on made up (",
        "There may still be one: as many seeds with as much spread show a difference of ",
        "after Holm's correction for 2 comparisons",
    ] {
        assert!(words.contains(part), "{part:?} in {words}");
    }
    for c in &findings.comparisons {
        let words = words.clone() + &verdict::sentence(&results, c);
        for never in ["no effect", "equal", "no difference", "NaN", "-0.0"] {
            assert!(!words.to_lowercase().contains(&never.to_lowercase()), "{never:?} in {words}");
        }
    }
}

/// Votes by hand: three seeds, four images.
#[test]
fn votes_of_seeds() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let models = [PLAIN, ("GA", Some(0), 0.8, 0.8)];
    let results =
        Example { seeds: 3, images: 2, dir: Some(dir.path()), ..example(&models) }.results();
    // Label a, a, b, b; the middle of three seeds decides but for the last image, where all classes have one vote.
    let write = |model: usize, seeds: [[(&str, f64); 4]; 3]| {
        for (run, said) in results.datasets[0].models[model].runs.iter().zip(seeds) {
            let mut text = "id,label,predicted,p_a,p_b,p_c\n".to_string();
            for (i, (class, p)) in said.iter().enumerate() {
                let of = |c: &str| if c == *class { *p } else { (1.0 - p) / 2.0 };
                let label = ["a", "a", "b", "b"][i];
                text += &format!("{i},{label},{class},{},{},{}\n", of("a"), of("b"), of("c"));
            }
            std::fs::write(run.dir.join("predictions_test.csv"), text).expect("written");
        }
    };
    let first = [("a", 0.9), ("a", 0.9), ("a", 0.9), ("a", 0.5)];
    write(
        0,
        [
            first,
            [("a", 0.9), ("b", 0.9), ("a", 0.9), ("b", 0.9)],
            [("b", 0.9), ("b", 0.9), ("b", 0.9), ("c", 0.6)],
        ],
    );
    write(1, [[("a", 0.9), ("a", 0.9), ("b", 0.9), ("b", 0.9)]; 3]);
    let answers = super::answers::read(&results.datasets[0].models[0], "test").unwrap().unwrap();
    assert_eq!(answers.voted, [0, 1, 0, 1]);
    let thirds: Vec<f64> = answers.right.iter().map(|r| (3.0 * r).round()).collect();
    assert_eq!(thirds, [2.0, 1.0, 1.0, 1.0]);
    let votes = only(&results).votes.unwrap();
    assert_eq!((votes.only_model, votes.only_baseline, votes.p), (2, 0, 0.5));
}

#[test]
fn studies_that_are_not_whole() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let models = [PLAIN, ("GA", Some(0), 0.9, 0.7)];
    let whole = Example { dir: Some(dir.path()), ..example(&models) }.results();
    // Nothing yet.
    let mut empty = whole.clone();
    empty.open = 20;
    empty.datasets[0].models.iter_mut().for_each(|m| m.runs.clear());
    let c = only(&empty);
    assert_eq!((c.verdict, c.adjusted, c.images), (Verdict::Untested, None, None));
    assert!(
        verdict::study(&empty, &compare(&empty)).before[0]
            .contains("not finished: 20 trials are open")
    );
    assert!(verdict::sentence(&empty, &c).contains("takes two seeds of each"));
    let mut fewer = whole.clone();
    fewer.datasets[0].models[1].runs.truncate(4);
    let words = verdict::study(&fewer, &compare(&fewer)).lines().join("\n");
    assert!(words.contains("than the 10 planned: GA on made up has 4."), "{words}");
    let mut hopeless = whole.clone();
    let model = &mut hopeless.datasets[0].models[1];
    model.runs.clear();
    model.winner = None;
    let words = verdict::study(&hopeless, &compare(&hopeless)).lines().join("\n");
    assert!(words.contains("No setting of the search could be trained to its end: GA"), "{words}");
    // Some failed.
    let mut failed = whole.clone();
    for run in failed.datasets[0].models[1].runs.iter_mut().take(3) {
        run.scores = Err("out of memory".into());
    }
    let findings = compare(&failed);
    assert_eq!(
        findings.reached(0, 1, Judged::InDistribution).map(|r| (r.seeds.len(), r.failed)),
        Some((7, 3))
    );
    let words = verdict::study(&failed, &findings).lines().join("\n");
    assert!(
        words.contains(
            "failed, so that the numbers are of the others alone: 3 of 10 seeds of GA on made up."
        ),
        "{words}"
    );
    // All seeds alike.
    let mut constant = whole.clone();
    for run in constant.datasets[0].models.iter_mut().flat_map(|m| &mut m.runs) {
        run.scores.as_mut().unwrap().parts.iter_mut().for_each(|p| p.balanced_accuracy = Some(0.1));
    }
    let c = only(&constant);
    assert_eq!((c.verdict, c.detectable), (Verdict::Untested, None));
    assert!(verdict::sentence(&constant, &c).contains("no spread"));
    // Predictions that are damaged, or of other images, are told; the tests of the seeds stand.
    let path = whole.datasets[0].models[1].runs[4].dir.join("predictions_test.csv");
    let text = std::fs::read_to_string(&path).expect("read");
    for damaged in [
        text.replacen("test-0,", "test-x,", 1),
        text.replacen("class 0,", "class 9,", 1),
        "id\n".into(),
    ] {
        std::fs::write(&path, damaged).expect("written");
        let findings = compare(&whole);
        assert_eq!(findings.notes.len(), 1);
        assert!(findings.notes[0].contains("predictions_test.csv"), "{:?}", findings.notes);
        let c = &findings.comparisons[0];
        assert_eq!((c.verdict, c.images, c.votes), (Verdict::Better, None, None));
    }
}

#[test]
fn which_part_is_which() {
    let models = [PLAIN];
    let mut data = example(&models).data();
    let parts = |data: &super::results::DataResults| JUDGED.map(|j| j.part(data));
    assert_eq!(parts(&data), [Some("test"), None]);
    data.holdout_domain = Some("x".into());
    assert_eq!(
        parts(&data),
        [None, Some("test")],
        "a held-out domain is never called in distribution"
    );
    data.images.push(("id_test".into(), 5));
    assert_eq!(parts(&data), [Some("id_test"), Some("test")]);
}

#[test]
fn numbers_in_words() {
    use verdict::{p_value, percent_level, points, signed};
    let p = [1.0, 0.05, 0.0499, 0.0012, 0.00034, 1e-9].map(p_value);
    assert_eq!(p, ["= 1.00", "= 0.050", "= 0.050", "= 0.0012", "= 0.00034", "< 0.0001"]);
    assert_eq!([0.0312, -0.0312, -0.0001].map(signed), ["+3.1", "-3.1", "0.0"]);
    assert_eq!(points(0.8424), "84.2");
    assert_eq!([0.05, 0.01, 0.001].map(percent_level), ["95 %", "99 %", "99.9 %"]);
}
