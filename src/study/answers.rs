//! What the seeds of a model said about each image of a part: read from `predictions_<part>.csv` of their run directories.

use std::fs;
use std::path::Path;

use super::results::ModelResults;
use crate::train::metrics::argmax;
use crate::{Error, Result};

/// What the seeds of a model, taken together, said about each image.
#[derive(Debug, Clone, PartialEq)]
pub struct Answers {
    /// Ids of the images.
    pub ids: Vec<String>,
    /// True classes, numbered in the order of the file's columns.
    pub labels: Vec<u32>,
    /// Share of the seeds that were right.
    pub right: Vec<f64>,
    /// The class that most seeds predict; of several with as many votes the one with the highest mean probability.
    pub voted: Vec<u32>,
}

/// One run's predictions.
struct Predicted {
    ids: Vec<String>,
    labels: Vec<u32>,
    predicted: Vec<u32>,
    /// Image after image.
    probabilities: Vec<f64>,
    classes: usize,
}

/// The answers of all of a model's runs that succeeded; `None` where there are none.
///
/// Errors: `Io` and `File` for predictions that are missing, that cannot be read, or that are of other images than the first run's.
pub fn read(model: &ModelResults, part: &str) -> Result<Option<Answers>> {
    let mut votes = Vec::new();
    let mut sums = Vec::new();
    let mut first: Option<(Predicted, Vec<f64>)> = None;
    let mut seeds = 0.0;
    for run in model.runs.iter().filter(|run| run.scores.is_ok()) {
        let path = run.dir.join(format!("predictions_{part}.csv"));
        let run = read_run(&path)?;
        let (known, right) = first.get_or_insert_with(|| {
            votes = vec![0_u32; run.probabilities.len()];
            sums = vec![0.0; run.probabilities.len()];
            (run.without_numbers(), vec![0.0; run.ids.len()])
        });
        if known.ids != run.ids || known.labels != run.labels || known.classes != run.classes {
            let message =
                "has other images than the model's first run; was the split changed between them?";
            return Err(Error::file(path, message));
        }
        for (i, (label, predicted)) in run.labels.iter().zip(&run.predicted).enumerate() {
            right[i] += f64::from(label == predicted);
            votes[i * run.classes + *predicted as usize] += 1;
        }
        sums.iter_mut().zip(&run.probabilities).for_each(|(sum, p)| *sum += p);
        seeds += 1.0;
    }
    Ok(first.map(|(known, right)| {
        let rows = votes.chunks_exact(known.classes).zip(sums.chunks_exact(known.classes));
        let voted = |(votes, sums): (&[u32], &[f64])| {
            let most = votes.iter().copied().max().unwrap_or(0);
            let of_most = votes.iter().zip(sums);
            let sums: Vec<f64> =
                of_most.map(|(v, p)| if *v == most { *p } else { f64::NEG_INFINITY }).collect();
            argmax(&sums)
        };
        Answers {
            voted: rows.map(voted).collect(),
            right: right.into_iter().map(|r| r / seeds).collect(),
            ids: known.ids,
            labels: known.labels,
        }
    }))
}

impl Predicted {
    /// The images, without what was said of them.
    fn without_numbers(&self) -> Self {
        let (ids, labels) = (self.ids.clone(), self.labels.clone());
        Self { ids, labels, predicted: Vec::new(), probabilities: Vec::new(), ..*self }
    }
}

/// `id,label,predicted,p_<class>...`, a row an image.
fn read_run(path: &Path) -> Result<Predicted> {
    let text = fs::read(path).map_err(|e| Error::io(path, e))?;
    let wrong = |e: csv::Error| Error::file(path, e.to_string());
    let mut reader = csv::Reader::from_reader(text.as_slice());
    let head = reader.headers().map_err(wrong)?.clone();
    let classes: Vec<&str> = head.iter().skip(3).filter_map(|c| c.strip_prefix("p_")).collect();
    if !head.iter().take(3).eq(["id", "label", "predicted"]) || classes.len() + 3 != head.len() {
        let message =
            format!("expected the columns id,label,predicted,p_<class>.., found {head:?}");
        return Err(Error::file(path, message));
    }
    let mut all = Predicted {
        ids: Vec::new(),
        labels: Vec::new(),
        predicted: Vec::new(),
        probabilities: Vec::new(),
        classes: classes.len(),
    };
    for record in reader.records() {
        let record = record.map_err(wrong)?;
        let class = |i: usize| classes.iter().position(|c| *c == &record[i]).map(|c| c as u32);
        let probabilities: Option<Vec<f64>> =
            record.iter().skip(3).map(|p| p.parse().ok()).collect();
        let (Some(label), Some(predicted), Some(probabilities)) =
            (class(1), class(2), probabilities)
        else {
            let line = record.position().map_or(0, csv::Position::line);
            let message = format!("line {line}: expected known classes and probabilities");
            return Err(Error::file(path, message));
        };
        all.ids.push(record[0].to_owned());
        all.labels.push(label);
        all.predicted.push(predicted);
        all.probabilities.extend(probabilities);
    }
    Ok(all)
}
