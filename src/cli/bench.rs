//! `attn2d bench`: prints rows as they are timed, then what follows from them, and writes the files that were asked for.

use crate::bench::{self, Beside, Options, Report};
use crate::error::{Error, Result};
use crate::html;
use crate::io::{self, paths};
use crate::train::Progress;
use serde_json::{Value, json};

/// Times and prints, or shows what was timed; whether every row could run and none is worse than in the earlier run.
///
/// # Errors
/// As [`crate::bench::run`], and for files that cannot be read or written.
pub fn bench(options: &Options) -> Result<bool> {
    for (option, path) in [("--json", &options.json), ("--html", &options.html)] {
        path.as_ref().map_or(Ok(()), |path| paths::check_output(option, path))?;
    }
    if options.json.is_some() && options.json == options.html {
        return Err(Error::usage("--json and --html name the same file; give each its own"));
    }
    if options.list {
        return list(options).map(|()| true);
    }
    if !(options.tolerance.is_finite() && options.tolerance >= 0.0) {
        let message = format!("--tolerance is {}, expected percent, 0 or more", options.tolerance);
        return Err(Error::usage(message));
    }
    let (report, beside) = match options.from.is_empty() {
        true => timed(options)?,
        false => shown(options)?,
    };
    say(bench::summary(&report).trim_end());
    let compared = beside.compared(&report, options.tolerance);
    if let Some(comparison) = &compared {
        say(&format!("\n{comparison}"));
    }
    if options.markdown {
        bench::tables(&report)
            .iter()
            .for_each(|table| say(&format!("\n{}", html::markdown(table))));
    }
    if let Some(path) = &options.html {
        io::write_atomic(path, bench::page(&report).as_bytes())?;
    }
    Ok(report.complete() && !compared.is_some_and(|c| c.regressed()))
}

/// Times the rows and prints each as it is done.
fn timed(options: &Options) -> Result<(Report, Beside)> {
    let beside = Beside::read(options, options.precision.dtype().suffix())?;
    let peers: Vec<String> = beside.peers.iter().map(|p| p.name.clone()).collect();
    let mut begun = false;
    let report = bench::run(options, &beside, &mut |report| {
        if !begun {
            say(&format!("{}\n{}", bench::preface(report), bench::header(&peers)));
            begun = true;
        }
        if let Some(row) = report.rows.last() {
            show(row, &peers, options);
        }
    })?;
    Ok((report, beside))
}

/// Reads and prints what earlier runs wrote.
fn shown(options: &Options) -> Result<(Report, Beside)> {
    let none = || Error::usage("--from needs a file");
    let mut report = Report::join(&options.from)?.ok_or_else(none)?;
    let wanted = bench::wanted(&options.suites, &options.filter)?;
    report.rows.retain(|m| wanted(&m.row));
    if report.rows.is_empty() {
        let message = "no row of these files is of the suites and --filter that were asked for";
        return Err(Error::usage(message));
    }
    let beside = Beside::read(options, &report.environment.precision)?;
    beside.check(&report.environment)?;
    report.rows.iter_mut().try_for_each(|row| beside.put_peers(row))?;
    let report = Report::new(report.environment, report.ceilings, report.rows);
    let peers = bench::peer_names(&report.rows);
    say(&format!("{}\n{}", bench::preface(&report), bench::header(&peers)));
    report.rows.iter().for_each(|row| show(row, &peers, options));
    options.json.as_ref().map_or(Ok(()), |path| report.write(path))?;
    Ok((report, beside))
}

/// Prints a line; a reader that has gone away (`| head`) is no fault, and the files are still written.
fn say(text: &str) {
    Progress::Lines.line(text);
}

fn show(row: &bench::Measured, peers: &[String], options: &Options) {
    say(&bench::line(row, peers));
    if let Some(table) = bench::profile(row).filter(|_| options.profile) {
        say(&format!("\n{}\n", html::markdown(&table)));
    }
}

fn list(options: &Options) -> Result<()> {
    let rows = bench::rows(&options.suites, options.size, &options.filter)?;
    if let Some(path) = &options.json {
        let bytes = options.precision.dtype().bytes();
        let rows: Vec<Value> = rows.iter().map(|row| row.json(bytes)).collect();
        let text = format!("{:#}\n", json!({ "size": options.size, "rows": rows }));
        io::write_atomic(path, text.as_bytes())?;
    }
    say(bench::list(&rows, options.precision).trim_end());
    Ok(())
}
