//! `attn2d bench`: prints rows as they are timed.

use crate::bench::{self, Options, Report};
use crate::error::{Error, Result};
use serde_json::{Value, json};

/// Times and prints; whether every row could run.
///
/// # Errors
/// As [`crate::bench::run`].
pub fn bench(options: &Options) -> Result<bool> {
    if options.list {
        return list(options).map(|()| true);
    }
    let mut begun = false;
    let report = bench::run(options, &mut |report| {
        if !begun {
            println!("{}\n{}", report.preface(), Report::header());
            begun = true;
        }
        if let Some((row, outcome)) = report.rows.last() {
            println!("{}", report.line(row, outcome));
        }
    })?;
    Ok(report.complete())
}

fn list(options: &Options) -> Result<()> {
    let rows = bench::rows(&options.suites, options.size, &options.filter)?;
    if let Some(path) = &options.json {
        let bytes = options.precision.dtype().bytes();
        let rows: Vec<Value> = rows.iter().map(|row| row.json(bytes)).collect();
        let text = format!("{:#}\n", json!({ "size": options.size, "rows": rows }));
        std::fs::write(path, text).map_err(|e| Error::io(path, e))?;
    }
    print!("{}", bench::list(&rows, options.precision));
    Ok(())
}
