//! Evaluation: logits of every image of a part, and what they amount to.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::metrics::Predictions;
use super::plots;
use super::progress::Progress;
use crate::config::Precision;
use crate::data::{Dataset, Loader};
use crate::models::Model;
use crate::nn::Mode;
use crate::ops::cast;
use crate::{Device, Error, Result, Tensor, tape};

/// How a loss is weighted; the same for training and evaluation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LossOptions {
    /// A weight for each class; `None` for equal ones.
    pub class_weights: Option<Vec<f32>>,
    /// Share of the target that is spread evenly over all classes.
    pub label_smoothing: f64,
}

impl LossOptions {
    /// Cross-entropy of one image's logits, and the weight that it has in the mean, as PyTorch defines both:
    /// `sum_c w_c t_c (-log p_c)` with `t = (1 - s) onehot + s / K`, and `w_label`.
    fn of(&self, logits: &[f32], label: usize) -> (f64, f64) {
        let largest = logits.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(f64::from(x)));
        let sum: f64 = logits.iter().map(|&x| (f64::from(x) - largest).exp()).sum();
        let log_sum = largest + sum.ln();
        let weight = |c: usize| self.class_weights.as_ref().map_or(1.0, |w| f64::from(w[c]));
        let spread = self.label_smoothing / logits.len() as f64;
        let term = |(c, &x): (usize, &f32)| {
            let target = spread + if c == label { 1.0 - self.label_smoothing } else { 0.0 };
            weight(c) * target * (log_sum - f64::from(x))
        };
        (logits.iter().enumerate().map(term).sum(), weight(label))
    }
}

/// What a model said about a part of a data set.
#[derive(Debug, Clone)]
pub struct Evaluation {
    /// Mean loss.
    pub loss: f64,
    /// Labels and probabilities.
    pub predictions: Predictions,
    /// Item of the data set behind each prediction.
    pub items: Vec<usize>,
}

/// A model and what is needed to evaluate it.
#[derive(Clone, Copy)]
pub struct Evaluator<'a> {
    /// The model.
    pub model: &'a Model,
    /// Where it lies.
    pub device: &'a Device,
    /// How activations are stored.
    pub precision: Precision,
    /// The loss that is reported.
    pub loss: &'a LossOptions,
    /// The data set that loaders load from.
    pub dataset: &'a Dataset,
    /// How to show the work.
    pub progress: Progress,
}

impl Evaluator<'_> {
    /// Runs the model over a loader's images, in evaluation mode and off the tape. `label_of` turns the data set's class
    /// numbers into the model's. `what` names the work on the screen.
    ///
    /// Errors: `Training` where a logit is not finite; else those of loading and of the device.
    pub fn run(
        &self,
        what: &str,
        loader: &Loader,
        label_of: impl Fn(u32) -> u32,
    ) -> Result<Evaluation> {
        let classes = self.model.num_classes();
        let mut predictions = Predictions::new(classes);
        let mut items = Vec::with_capacity(loader.len());
        let (mut sum, mut weights) = (0.0, 0.0);
        let mut work = self.progress.start(what, loader.batches() as u64);
        for (i, batch) in loader.epoch(0, 0)?.enumerate() {
            let batch = batch?;
            let images = Tensor::from_f32(self.device, &batch.shape(), &batch.images)?;
            let logits = logits(self.model, &images, self.precision)?;
            if let Some(bad) = logits.iter().position(|x| !x.is_finite()) {
                let image = self.dataset.describe(batch.indices[bad / classes]);
                let message = format!("{what}: the model's output for {image} is {}", logits[bad]);
                return Err(Error::Training(message));
            }
            let labels: Vec<u32> = batch.labels.iter().map(|&l| label_of(l)).collect();
            for (row, &label) in logits.chunks_exact(classes).zip(&labels) {
                let (value, weight) = self.loss.of(row, label as usize);
                sum += value;
                weights += weight;
            }
            predictions.push_logits(&logits, &labels)?;
            items.extend(batch.indices);
            work.at(i as u64 + 1, "");
        }
        Ok(Evaluation { loss: sum / weights, predictions, items })
    }
}

/// Logits of normalised images in evaluation, off the tape: `[N, classes]`, row-major.
pub(super) fn logits(model: &Model, images: &Tensor, precision: Precision) -> Result<Vec<f32>> {
    let images = cast(images, precision.dtype())?;
    tape::no_grad(|| model.forward(&images, &Mode::EVAL))?.to_f32()
}

/// The metrics of one part, as `summary.json` holds them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartMetrics {
    /// `val`, `test`, ...
    pub part: String,
    /// Number of images.
    pub images: usize,
    /// Mean loss.
    pub loss: f64,
    /// Share of images that were right.
    pub accuracy: Option<f64>,
    /// Mean recall over the classes that occur.
    pub balanced_accuracy: Option<f64>,
    /// Area under the ROC curve.
    pub auc: Option<f64>,
    /// Class names, in the order of the two below.
    pub classes: Vec<String>,
    /// Recall of each class; `None` for a class without images.
    pub recall: Vec<Option<f64>>,
    /// Counts of true (outer) against predicted (inner) classes.
    pub confusion: Vec<Vec<u64>>,
}

impl Evaluation {
    /// Everything counted.
    pub fn metrics(&self, part: &str, classes: &[String]) -> PartMetrics {
        let confusion = self.predictions.confusion();
        let k = confusion.classes();
        PartMetrics {
            part: part.to_owned(),
            images: self.predictions.len(),
            loss: self.loss,
            accuracy: confusion.accuracy(),
            balanced_accuracy: confusion.balanced_accuracy(),
            auc: self.predictions.auc(),
            classes: classes.to_vec(),
            recall: (0..k).map(|c| confusion.recall(c)).collect(),
            confusion: confusion.counts().chunks_exact(k).map(<[u64]>::to_vec).collect(),
        }
    }

    /// Writes `predictions_<part>.csv` and `confusion_<part>.svg` into `dir`.
    pub fn write(
        &self,
        dir: &Path,
        part: &str,
        dataset: &Dataset,
        classes: &[String],
    ) -> Result<PartMetrics> {
        self.write_predictions(&dir.join(format!("predictions_{part}.csv")), dataset, classes)?;
        let metrics = self.metrics(part, classes);
        let title = format!("{part}: balanced accuracy {}", show(metrics.balanced_accuracy));
        let picture = dir.join(format!("confusion_{part}.svg"));
        plots::confusion_matrix(&picture, &title, &self.predictions.confusion(), classes)?;
        Ok(metrics)
    }

    /// `id,label,predicted,p_<class>...`, a row an image.
    fn write_predictions(&self, path: &Path, dataset: &Dataset, classes: &[String]) -> Result<()> {
        let fail = |e: csv::Error| Error::io(path, std::io::Error::other(e));
        let mut writer = csv::Writer::from_writer(Vec::new());
        let mut header: Vec<String> = ["id", "label", "predicted"].map(String::from).into();
        header.extend(classes.iter().map(|class| format!("p_{class}")));
        writer.write_record(&header).map_err(fail)?;
        for (image, &item) in self.items.iter().enumerate() {
            let name = |class: u32| classes[class as usize].clone();
            let (label, predicted) =
                (self.predictions.labels[image], self.predictions.predicted(image));
            let mut row = vec![dataset.items[item].id.clone(), name(label), name(predicted)];
            row.extend(self.predictions.row(image).iter().map(|p| format!("{p:.6}")));
            writer.write_record(&row).map_err(fail)?;
        }
        let bytes = writer.into_inner().map_err(|e| Error::io(path, e.into_error()))?;
        crate::io::write_atomic(path, &bytes)
    }
}

/// A metric with three digits, or a dash.
pub fn show(metric: Option<f64>) -> String {
    metric.map_or("-".into(), |v| format!("{v:.3}"))
}

/// The metrics of some parts as an aligned table.
pub fn table(parts: &[PartMetrics]) -> String {
    let mut lines = vec![format!(
        "  {:<8} {:>6}  {:>12}  {:>8}  {:>6}   {}",
        "part", "images", "balanced acc", "accuracy", "AUC", "recall"
    )];
    for p in parts {
        let recall = p.classes.iter().zip(&p.recall).map(|(c, r)| format!("{c} {}", show(*r)));
        lines.push(format!(
            "  {:<8} {:>6}  {:>12}  {:>8}  {:>6}   {}",
            p.part,
            p.images,
            show(p.balanced_accuracy),
            show(p.accuracy),
            show(p.auc),
            recall.collect::<Vec<_>>().join(", ")
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_by_hand() {
        let logits = [0.0, (3.0_f32).ln()]; // probabilities 1/4 and 3/4
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-7, "{a} {b}");
        let plain = LossOptions::default();
        close(plain.of(&logits, 1).0, -(0.75_f64.ln()));
        let options = LossOptions { class_weights: Some(vec![2.0, 0.5]), label_smoothing: 0.2 };
        let (loss, weight) = options.of(&logits, 0);
        close(loss, -(2.0 * 0.9 * 0.25_f64.ln() + 0.5 * 0.1 * 0.75_f64.ln()));
        close(weight, 2.0);
    }
}
