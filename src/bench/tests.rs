//! Whole runs, small: every suite, files that come back, files that are wrong.

use super::*;

fn options(device: &str, filter: &str) -> Options {
    Options {
        suites: Vec::new(),
        device: device.into(),
        precision: Precision::F32,
        size: Size::Tiny,
        filter: filter.into(),
        min_time: 0.01,
        budget: None,
        json: None,
        html: None,
        markdown: false,
        profile: false,
        compare: None,
        tolerance: 5.0,
        merge: Vec::new(),
        from: Vec::new(),
        list: false,
    }
}

fn timed(options: &Options) -> Report {
    run(options, &Beside::default(), &mut |_| {}).unwrap()
}

/// Times that a machine could have had, for what is made of them.
fn made_up(rows: &[(&str, f64, f64, f64)]) -> Report {
    let rate =
        |per_second| Ceiling { per_second, source: "measured".into(), how: "made up".into() };
    let ceilings = Ceilings { copy: rate(1e10), multiply_add: Some(rate(1e11)), launch: None };
    let row = |&(name, p20_ms, ms, p80_ms): &(&str, f64, f64, f64)| {
        let row = super::rows(&["ops".into()], Size::Tiny, &format!("^{name}$")).unwrap().remove(0);
        let wall = Summary { median_ms: ms, p20_ms, p80_ms, best_ms: p20_ms, samples: 30 };
        let timing =
            Timing { ms, p20_ms, p80_ms, wall, device: None, launches: 2, kernels: vec![] };
        let work = row.work(4);
        let whole = Reached::of((timing, 4096), work.whole, &ceilings, false);
        let times = Times { forward: None, whole, saved_bytes: Some(1024) };
        Measured { row, work, outcome: Outcome::Timed(Box::new(times)), peers: Default::default() }
    };
    let environment = Environment::of(&Device::cpu(), DType::F32, Size::Tiny);
    Report::new(environment, ceilings.clone(), rows.iter().map(row).collect())
}

#[test]
fn every_tiny_row_is_timed() {
    let report = timed(&options("cpu", ""));
    assert!(SUITES.iter().all(|s| report.rows.iter().any(|m| m.row.suite == s.name)));
    for m in &report.rows {
        let Outcome::Timed(times) = &m.outcome else { panic!("{}: {:?}", m.row.name, m.outcome) };
        let (name, whole) = (&m.row.name, &times.whole);
        assert!(whole.timing.launches > 0 && whole.timing.ms > 0.0, "{name}");
        assert!(!whole.timing.kernels.is_empty(), "{name}: the CPU has a profile");
        assert!(whole.percent.unwrap() > 0.0 && whole.binds.is_some(), "{name}");
        if let Some(forward) = &times.forward {
            assert!(forward.timing.launches < whole.timing.launches, "{name}");
            assert!(forward.peak_bytes <= whole.peak_bytes, "{name}");
            // Which of them took longer is no matter of a test: these run beside others.
            assert!(forward.timing.ms > 0.0, "{name}");
        }
        assert!(table::profile(m).unwrap().rows.len() >= whole.timing.kernels.len(), "{name}");
    }
    let page = page(&report);
    for name in report.rows.iter().map(|m| &m.row.name) {
        assert!(
            page.contains(&format!("<th scope=\"row\">{name}</th>")),
            "{name} is not on the page"
        );
    }
    assert_eq!(
        report.fits.len(),
        6,
        "two lines of local attention and one of global, time and memory"
    );
    well_formed(&page);
}

/// Every tag is closed by its own, in order, and every attribute is quoted: what a reader of XML would demand.
fn well_formed(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    for part in page.split('<').skip(2) {
        let (tag, _) =
            part.split_once('>').unwrap_or_else(|| panic!("a tag is not closed: {part}"));
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap_or_default();
        assert_eq!(tag.matches('"').count() % 2, 0, "a quote is open in <{tag}>");
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "</{name}>");
        } else if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "never closed: {open:?}");
    assert!(page.matches("<svg").count() == page.matches("<desc>").count());
}

#[test]
fn what_the_tape_keeps() {
    let suites = ["ops".into()];
    let kept = |name: &str| {
        let row = super::rows(&suites, Size::Tiny, &format!("^{name}$")).unwrap().remove(0);
        let device = Device::cpu();
        let calls = prepare(&row, &device, DType::F32).unwrap();
        let kept = measure::saved(&device, &calls.taped.unwrap()).unwrap();
        assert_eq!(measure::saved(&device, &calls_of(&row, &device)).unwrap(), kept, "each time");
        kept
    };
    // A convolution needs its input again, and nothing that it made.
    assert_eq!(kept("conv2d_3x3_8x6_tiny"), 4 * 2 * 6 * 6 * 8);
    // Attention: q, k, v, the output, a log-sum-exp for each query and head, and four floats in the place of tables. No score.
    let map = 2 * 5 * 5 * 2 * 8;
    assert_eq!(kept("global_attention_t25_d8_tiny"), 4 * (4 * map + 2 * 5 * 5 * 2 + 4));
}

fn calls_of(row: &Row, device: &Device) -> make::Taped {
    prepare(row, device, DType::F32).unwrap().taped.unwrap()
}

#[test]
fn a_row_that_cannot_run_says_why_and_time_that_is_up_is_told() {
    let half =
        Options { precision: Precision::Bf16, suites: vec!["step".into()], ..options("cpu", "") };
    let report = timed(&half);
    assert!(!report.complete());
    let text = line(&report.rows[0], &[]);
    assert!(text.contains("models train in f32"), "{text}");
    let report = timed(&Options { budget: Some(1e-9), ..options("cpu", "adamw") });
    assert!(line(&report.rows[0], &[]).contains("--budget"));
    assert!(serde_json::to_value(&report).unwrap()["rows"][0]["skipped"].is_string());
}

#[test]
fn reports_come_back_and_join() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let (first, second) = (
        made_up(&[("linear_4x16_10", 1.0, 2.0, 3.0), ("adamw_tiny", 1.0, 1.0, 1.0)]),
        made_up(&[("linear_4x16_10", 4.0, 5.0, 6.0)]),
    );
    first.write(&file("a.json")).unwrap();
    second.write(&file("b.json")).unwrap();
    let again = Report::read(&file("a.json")).unwrap();
    let shown = |r: &Report| r.rows.iter().map(|m| line(m, &[])).collect::<Vec<_>>();
    assert_eq!((shown(&again), again.environment), (shown(&first), first.environment.clone()));
    let joined = Report::join(&[file("a.json"), file("b.json")]).unwrap().unwrap();
    let times: Vec<f64> = joined
        .rows
        .iter()
        .map(|m| match &m.outcome {
            Outcome::Timed(t) => t.whole.timing.ms,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(times, [1.0, 5.0], "the later file's row counts");
    let mut other = second;
    other.environment.precision = "f16".into();
    other.write(&file("c.json")).unwrap();
    let error = Report::join(&[file("a.json"), file("c.json")]).unwrap_err().to_string();
    assert!(error.contains("c.json: its precision is 'f16', here it is 'f32'"), "{error}");
}

#[test]
fn a_comparison_knows_noise() {
    let old = made_up(&[
        ("linear_4x16_10", 9.0, 10.0, 11.0),
        ("adamw_tiny", 9.9, 10.0, 10.1),
        ("max_pool2d_3x3_s2_8x6_tiny", 9.9, 10.0, 10.1),
    ]);
    // 20 % within noise, 3 % beyond noise but within tolerance, and a third as long.
    let new = made_up(&[
        ("linear_4x16_10", 10.5, 12.0, 13.0),
        ("adamw_tiny", 10.2, 10.3, 10.4),
        ("max_pool2d_3x3_s2_8x6_tiny", 3.0, 3.3, 3.5),
    ]);
    let verdicts = |c: &Comparison| -> Vec<Verdict> {
        c.changes.iter().filter(|c| c.what == "whole").map(|c| c.verdict).collect()
    };
    let c = compare(&new, &old, 0.05);
    assert_eq!(verdicts(&c), [Verdict::Same, Verdict::Same, Verdict::Better]);
    assert!(!c.regressed());
    let (least, most) = c.changes[0].band;
    assert!((least - 10.5 / 11.0).abs() < 0.01 && (most - 13.0 / 9.0).abs() < 0.01, "{c}");
    let c = compare(&new, &old, 0.02);
    assert_eq!(verdicts(&c), [Verdict::Same, Verdict::Worse, Verdict::Better]);
    assert!(c.regressed() && c.to_string().contains("SLOWER"), "{c}");
    let mut fails = made_up(&[("adamw_tiny", 1.0, 1.0, 1.0)]);
    fails.rows[0].outcome = Outcome::Failed { failed: "no memory".into() };
    let c = compare(&fails, &old, 0.05);
    assert!(c.regressed() && c.to_string().contains("FAILS NOW: no memory"), "{c}");
    fails.rows[0].outcome = Outcome::Skipped { skipped: "no time".into() };
    let c = compare(&fails, &old, 0.05);
    assert_eq!((c.missing, c.changes.len()), (3, 0));
    assert!(c.regressed() && c.to_string().contains("nothing is compared"), "{c}");
}

#[test]
fn peers_stand_beside_the_same_rows_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peer.json");
    let mut report = made_up(&[("linear_4x16_10", 1.0, 2.0, 3.0)]);
    let subject = serde_json::to_value(&report.rows[0].row.subject).unwrap();
    let peer = |subject: &serde_json::Value, precision: &str, ms: f64| {
        let ways =
            serde_json::json!({ "plain": { "ms": ms }, "other": { "ms": 5.0, "forward_ms": 1.0 } });
        let row = serde_json::json!({ "name": "linear_4x16_10", "subject": subject, "ways": ways });
        let file = serde_json::json!({ "peer": "X 1.0", "device": "cpu", "precision": precision, "rows": [row] });
        std::fs::write(&path, file.to_string()).unwrap();
        Peer::read(&path, "f32")
    };
    peer(&subject, "f32", 3.0).unwrap().put_beside(&mut report.rows[0]).unwrap();
    let time = &report.rows[0].peers["X 1.0 (cpu)"];
    assert_eq!((time.best().unwrap().0, time.ratio(&report.rows[0].outcome)), ("plain", Some(1.5)));
    let text = line(&report.rows[0], &["X 1.0 (cpu)".into()]);
    assert!(text.contains("3.00 ms, 1.50"), "{text}");
    assert!(page(&report).contains("<th scope=\"col\">X 1.0 (cpu) ms</th>"));
    let again = Measured::from_json(&serde_json::to_value(&report.rows[0]).unwrap()).unwrap();
    assert_eq!(again.peers, report.rows[0].peers);

    let wrong = |r: Result<Peer>| r.unwrap_err().to_string();
    let error = wrong(peer(&subject, "f16", 3.0));
    assert!(error.contains("peer.json: its times are in f16, ours in f32"), "{error}");
    let error = wrong(peer(&subject, "f32", 0.0));
    assert!(error.contains("linear_4x16_10: a time that is not above 0"), "{error}");
    let error = wrong(peer(&serde_json::json!({ "op": "sleep" }), "f32", 3.0));
    assert!(error.contains("peer.json: row 0 (linear_4x16_10): unknown variant"), "{error}");
    let mut other = subject.clone();
    other["rows"] = 5.into();
    let peer = peer(&other, "f32", 3.0).unwrap();
    let error = peer.put_beside(&mut report.rows[0]).unwrap_err().to_string();
    assert!(
        error.contains("it timed Linear { rows: 5") && error.contains("--list --json"),
        "{error}"
    );
}

#[test]
fn files_that_are_not_ours_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.json");
    let whole = serde_json::to_value(made_up(&[("adamw_tiny", 1.0, 1.0, 1.0)])).unwrap();
    let without = |pointer: &str, field: &str| {
        let mut json = whole.clone();
        json.pointer_mut(pointer).unwrap().as_object_mut().unwrap().remove(field);
        json.to_string()
    };
    let with = |pointer: &str, value: serde_json::Value| {
        let mut json = whole.clone();
        *json.pointer_mut(pointer).unwrap() = value;
        json.to_string()
    };
    let row = &whole["rows"][0];
    let cases = [
        ("{".to_string(), "is no JSON"),
        ("[]".into(), "no list 'rows'"),
        (without("", "environment"), "no field 'environment'"),
        (without("/environment", "device"), "field 'environment': missing field `device`"),
        (without("/rows/0", "whole"), "row 0 (adamw_tiny): none of the fields 'whole', 'failed'"),
        (without("/rows/0", "subject"), "row 0 (adamw_tiny): missing field `subject`"),
        (without("/rows/0/whole", "p20_ms"), "row 0 (adamw_tiny): field 'whole': missing field"),
        (with("/rows/0/whole/ms", (-1.0).into()), "row 0 (adamw_tiny): field 'whole': p20_ms is 1"),
        (with("/rows/0/whole/p20_ms", 0.into()), "not above 0 and in rising order"),
        (with("/rows/0/name", "a\u{1b}[2Jb".into()), "the text \"a\\u{1b}[2Jb\" has control"),
        (with("/rows/0/name", "a\nb".into()), "its name is empty or of more than one line"),
        (with("/rows", serde_json::json!([row, row])), "the row adamw_tiny stands there twice"),
    ];
    for (text, words) in cases {
        std::fs::write(&path, text).unwrap();
        let error = Report::read(&path).unwrap_err().to_string();
        assert!(error.contains("x.json: ") && error.contains(words), "{error}");
    }
}

/// A suite of a later version, say: its rows are shown after ours.
#[test]
fn rows_of_a_suite_that_only_the_file_knows_are_shown() {
    let mut report = made_up(&[("linear_4x16_10", 1.0, 1.0, 1.0), ("adamw_tiny", 1.0, 1.0, 1.0)]);
    report.rows[0].row.suite = "vision".into();
    assert_eq!(suites_of(&report), ["ops", "vision"]);
    let captions: Vec<String> = tables(&report).into_iter().map(|t| t.caption).collect();
    assert_eq!(captions, ["Suite ops", "Suite vision"]);
    let page = page(&report);
    for words in
        ["<th scope=\"row\">linear_4x16_10</th>", "Suite vision: percent", "ops, vision on"]
    {
        assert!(page.contains(words), "{words} is not on the page");
    }
}

#[test]
fn only_times_of_one_machine_are_held_against_each_other() {
    let here = made_up(&[]).environment;
    let file = std::path::Path::new("old.json");
    for device in ["cpu", "wgpu:0"] {
        let here = Environment { device: device.into(), host: "A".into(), ..here.clone() };
        here.comparable(&here, file).unwrap();
        let old = Environment { host: "B".into(), ..here.clone() };
        let error = old.comparable(&here, file).unwrap_err().to_string();
        assert!(error.contains("old.json: its host is 'B', here it is 'A'"), "{error}");
    }
}

#[test]
fn names_are_unique_and_every_row_has_work() {
    for size in [Size::Tiny, Size::Small, Size::Large] {
        let rows = super::rows(&[], size, "").unwrap();
        let names: std::collections::BTreeSet<_> = rows.iter().map(|r| r.name.clone()).collect();
        assert_eq!(names.len(), rows.len(), "{size:?}");
        for row in rows {
            let work = row.work(4);
            assert!(work.whole.bytes > 0.0 || work.whole.flop > 0.0, "{row:?}: {work:?}");
            let again: Row = serde_json::from_value(row.json(4)).unwrap();
            assert_eq!(again, row);
        }
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn new_rows_run_on_wgpu() {
    if crate::device_reports().iter().all(|r| r.caps.is_none() || !r.name.starts_with("wgpu")) {
        println!("skipped: no wgpu adapter");
        return;
    }
    let report =
        timed(&options("wgpu", "^(tiny_16x6_(conv_1x1|embedded_k7|block)|scaling_local_map_4)$"));
    assert!(report.complete() && report.rows.len() == 4, "{:?}", report.rows);
    assert!(
        report
            .rows
            .iter()
            .all(|m| matches!(&m.outcome, Outcome::Timed(t) if t.saved_bytes > Some(0)))
    );
}
