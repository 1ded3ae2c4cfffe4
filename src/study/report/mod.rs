//! The report of a study: one page, the same as Markdown, and its numbers as CSV files.
//!
//! `models.csv`, `seeds.csv`, `search.csv` and `comparisons.csv` hold nothing that differs between two runs of the same study on one machine;
//! times and memory are in `costs.csv`.

mod charts;
mod csv;
mod tables;

use std::path::Path;

use super::compare::{Findings, JUDGED, Judged, compare};
use super::results::{DataResults, Results};
use super::verdict::{self, Words, percent_level};
use crate::Result;
use crate::html::document::{self, Block, Section};
use crate::io::write_atomic;

/// Failures that the page lists; the others are in the CSV files.
const MOST_FAILURES: usize = 40;

/// Writes `report.html`, `report.md` and the CSV files into a study's folder, however far the study is, and returns the verdict as text, a
/// paragraph a line.
///
/// Errors: `Io` for a file that cannot be written.
pub fn write(results: &Results, dir: &Path) -> Result<String> {
    let findings = compare(results);
    let words = verdict::study(results, &findings);
    let sections = sections(results, &findings, &words, dir);
    let title = format!("Study: {}", results.name);
    let page = document::html(&title, &sections);
    let files = [
        ("report.html", page),
        ("report.md", document::markdown(&title, &sections)),
        ("models.csv", csv::models(results, &findings)),
        ("seeds.csv", csv::seeds(results, dir)),
        ("search.csv", csv::search(results, dir)),
        ("comparisons.csv", csv::comparisons(results, &findings)),
        ("costs.csv", csv::costs(results, dir)),
    ];
    for (name, text) in files {
        write_atomic(&dir.join(name), text.as_bytes())?;
    }
    Ok(words.lines().join("\n"))
}

fn sections(results: &Results, findings: &Findings, words: &Words, dir: &Path) -> Vec<Section> {
    let section = |heading: &str, blocks: Vec<Block>| Section { heading: heading.into(), blocks };
    vec![
        section("Verdict", verdict_blocks(results, findings, words)),
        section("Models", models(results, findings)),
        section("Every seed", charts::seeds(results, findings)),
        section("Comparisons in numbers", comparisons(results, findings)),
        section("Learning curves", charts::learning(results)),
        section("Accuracy and cost", charts::costs(results, findings)),
        section("Confusion matrices", charts::confusion(results)),
        section("What was searched", search(results, dir)),
        section("Failures", failures(results, dir)),
        section("Data", vec![Block::Table(tables::data(results))]),
        section("Where and how to repeat it", repeat(results, dir)),
    ]
}

/// A line over what belongs to a data set, where there are several.
fn heading(results: &Results, data: &DataResults) -> Option<Block> {
    (results.datasets.len() > 1).then(|| Block::Heading(data.name.clone()))
}

fn verdict_blocks(results: &Results, findings: &Findings, words: &Words) -> Vec<Block> {
    let mut blocks: Vec<Block> = words.before.iter().cloned().map(Block::Text).collect();
    for (headline, rest) in &words.families {
        blocks.push(Block::Strong(headline.clone()));
        blocks.push(Block::List(rest.clone()));
    }
    if !words.gaps.is_empty() {
        blocks.push(Block::Text("What is missing:".into()));
        blocks.push(Block::List(words.gaps.clone()));
    }
    if findings.comparisons.len() > 1 {
        let each = findings.comparisons.iter().map(|c| verdict::sentence(results, c)).collect();
        blocks.push(Block::Folded("Each comparison in words".into(), vec![Block::List(each)]));
    }
    let (alpha, count) = (results.alpha, results.seeds);
    blocks.push(Block::Text(format!(
        "How it is judged: each model's settings were searched with the same budget and chosen by validation images alone; the winner was \
         trained with {count} fresh seeds, and each run scored once on test images by balanced accuracy, the mean of the classes' recalls. \
         A difference counts as significant where Welch's two-sided test of the seeds gives p below {alpha} after Holm's correction over \
         all comparisons on test images of that kind. In distribution is primary: test images from where the training images come. Out of \
         distribution: images of a domain that was held out."
    )));
    if !results.about.trim().is_empty() {
        blocks.push(Block::Text(format!("About this study: {}", results.about.trim())));
    }
    blocks
}

fn models(results: &Results, findings: &Findings) -> Vec<Block> {
    let level = percent_level(results.alpha);
    let mut blocks: Vec<Block> = (0..results.datasets.len())
        .map(|dataset| Block::Table(tables::models(results, findings, dataset)))
        .collect();
    blocks.push(Block::Text(format!(
        "Balanced accuracy in percent: mean over seeds with its {level} interval by Student's t, which tells how sure the mean is for this \
         data set and this split. p: Welch's test against the baseline, after Holm's correction. GFLOP: products of one image's forward \
         pass, a multiply-add counted as two. Milliseconds of a training step and peak memory of tensors are medians over seeds."
    )));
    blocks
}

fn comparisons(results: &Results, findings: &Findings) -> Vec<Block> {
    let of = |judged: Judged| tables::comparisons(results, findings, judged);
    let mut blocks: Vec<Block> = JUDGED.into_iter().flat_map(of).map(Block::Table).collect();
    if blocks.is_empty() {
        return blocks;
    }
    let level = percent_level(results.alpha);
    blocks.push(Block::Text(format!(
        "Differences are the model's balanced accuracy less its baseline's, in points. Over seeds: the {level} interval of Welch's test, \
         which holds other seeds on the same images against each other. Over images: the {level} bootstrap interval for other test images \
         with the same trained nets, classes resampled apart; it takes images for independent and is too narrow where several are of one \
         patient. Neither speaks of another split. p: Welch's. Holm: the same after correction. Ranks: the exact Mann-Whitney test. g: \
         Hedges' g with a BCa bootstrap interval. Detectable: the difference that the corrected test would have found with a probability \
         of 80 % given the spread of these seeds, at its strictest step. Votes: images that only the model's, and only the baseline's, \
         majority vote over seeds got right, and McNemar's exact p. The verdict is by Holm's p alone; the \
         intervals are not corrected, so one that leaves 0 out may stand beside no significant difference."
    )));
    blocks
}

fn search(results: &Results, dir: &Path) -> Vec<Block> {
    let (drawn, epochs) = &results.search;
    let rungs: Vec<String> = epochs.iter().map(|e| e.to_string()).collect();
    let how = match results.asked {
        true => "asked of Optuna for each model",
        false => "drawn at random and the same for all models",
    };
    let mut blocks = vec![Block::Text(format!(
        "Each model on each data set had the same budget: {drawn} {}, {how}. Successive halving: all of them were trained for the first number of epochs, the best by validation balanced \
         accuracy anew for the next ({} epochs). The best of the last rung won. Model strings, where a model names several, were searched \
         too.",
        if *drawn == 1 { "setting" } else { "settings" },
        rungs.join(", ")
    ))];
    match results.space.is_empty() {
        true => blocks.push(Block::Text("Nothing else was searched.".into())),
        false => blocks.push(Block::Facts(results.space.clone())),
    }
    blocks.push(Block::Text(
        "Space, budget, seeds and every setting that the study's file leaves to the program's defaults are choices of this study. They are \
         not those of the paper that asked the question, most of which are not known to us."
            .into(),
    ));
    for data in &results.datasets {
        blocks.extend(heading(results, data));
        blocks.extend(tables::winners(data).map(Block::Table));
        blocks.extend(tables::rungs(data).map(Block::Table));
        if let Some(tried) = tables::tried(data, dir) {
            blocks.push(Block::Folded(
                "Every setting that was tried".into(),
                vec![Block::Table(tried)],
            ));
        }
    }
    blocks
}

fn failures(results: &Results, dir: &Path) -> Vec<Block> {
    let mut all = Vec::new();
    for data in &results.datasets {
        for model in &data.models {
            let of = format!("{} on {}", model.name, data.name);
            let tried = model.tried.iter().filter_map(|t| {
                let error = t.val.as_ref().err()?;
                let place = tables::place(&t.dir, dir);
                Some(format!(
                    "{of}, search, setting {} for {} epochs ({place}): {error}",
                    t.number, t.epochs
                ))
            });
            let runs = model.runs.iter().filter_map(|run| {
                let error = run.scores.as_ref().err()?;
                Some(format!("{of}, seed {} ({}): {error}", run.seed, tables::place(&run.dir, dir)))
            });
            all.extend(tried.chain(runs));
        }
    }
    if all.is_empty() {
        return vec![Block::Text("No trial failed.".into())];
    }
    let beyond = all.len().saturating_sub(MOST_FAILURES);
    all.truncate(MOST_FAILURES);
    if beyond > 0 {
        all.push(format!("and {beyond} more, see search.csv and seeds.csv"));
    }
    vec![Block::List(all)]
}

fn repeat(results: &Results, dir: &Path) -> Vec<Block> {
    let folder = dir.display();
    let again = format!(
        "attn2d study {folder}/study.toml --output AGAIN                      # all of it, in another folder\n\
         attn2d train --config {folder}/trials/ID/trial.toml --output AGAIN   # one run; its ID is the last part of \"run\" in seeds.csv"
    );
    vec![
        Block::Facts(results.environment.clone()),
        Block::Text(
            "study.toml in the study's folder is the study as it was run, and every trial's directory has its settings, its log and its \
             predictions. On the same machine and device the same study gives the same numbers but for times. Both commands \
             are for where the study was started: paths that are not absolute are as seen from there."
                .into(),
        ),
        Block::Code(again),
        Block::Text(
            "Beside this page: models.csv, seeds.csv, search.csv and comparisons.csv with all numbers in full, and costs.csv with times \
             and memory."
                .into(),
        ),
    ]
}

#[cfg(test)]
mod tests;
