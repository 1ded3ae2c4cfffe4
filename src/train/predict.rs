//! `attn2d predict`: what a trained model says about pictures without labels.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};

use super::evaluate;
use super::metrics::Predictions;
use super::progress::Progress;
use super::session::open_device;
use super::trained::Trained;
use crate::config::Precision;
use crate::data::{self, Transform};
use crate::io::{paths, write_atomic};
use crate::models::Model;
use crate::{Error, Result, Tensor};

/// What to predict, and by what.
#[derive(Debug, Clone)]
pub struct Predict {
    /// As [`Trained::open`] takes it.
    pub checkpoint: PathBuf,
    /// Pictures, and folders of them at any depth.
    pub inputs: Vec<PathBuf>,
    /// The CSV file; `None` writes to the standard output.
    pub out: Option<PathBuf>,
    /// The device string.
    pub device: String,
    /// How activations are stored; `None` takes what the model was trained in.
    pub precision: Option<Precision>,
    /// Pictures that go through the model at once.
    pub batch_size: usize,
    /// Threads that read and prepare pictures.
    pub workers: usize,
    /// Write logits too.
    pub logits: bool,
    /// The weights of the last step also where the checkpoint has an average of them.
    pub raw_weights: bool,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Predicted {
    /// Pictures with a prediction.
    pub images: usize,
    /// The others, with the reason.
    pub unreadable: Vec<(PathBuf, String)>,
}

/// A batch from a reading thread: the pictures that could be read, side by side, and what became of each path.
struct Read {
    images: Vec<f32>,
    outcome: Vec<Result<()>>,
}

impl Predict {
    /// Writes a row for each picture that can be read, in the order of the inputs: `path,predicted,p_<class>..`, with `logit_<class>..`
    /// where they are asked for.
    ///
    /// Errors: `Usage` for an input that is not there or has no pictures; `Training` for an output that is not finite; those of
    /// checkpoint, device and files. A picture that cannot be read is none: it is told in [`Predicted::unreadable`].
    pub fn run(&self, progress: Progress) -> Result<Predicted> {
        // The standard output belongs to the table where no file does.
        let say = |text: &str| match (progress, &self.out) {
            (Progress::Quiet, _) => {}
            (_, None) => eprintln!("{text}"),
            _ => progress.line(text),
        };
        if self.batch_size == 0 {
            return Err(Error::usage("--batch-size 0: expected at least 1"));
        }
        let paths = self.paths()?;
        if let Some(out) = &self.out {
            paths::check_output("--out", out)?;
        }
        let trained = Trained::open(&self.checkpoint, self.raw_weights)?;
        let precision = self.precision.or(trained.precision).unwrap_or_default();
        let device = open_device(&self.device, precision)?;
        let model = trained.build(&device)?;
        say(&trained.introduce());
        say(&format!("data      {} pictures", paths.len()));
        say(&format!("device    {}", device.name()));
        let mut table = Table::new(&trained.classes, self.logits)?;
        let done =
            self.predict(&paths, &trained.transform(), progress, |images, shape, paths| {
                let x = Tensor::from_f32(&device, &shape, images)?;
                table.add(&model, &evaluate::logits(&model, &x, precision)?, paths)
            })?;
        if done.images == 0 && self.out.is_some() {
            return Ok(done); // a table without rows is not worth the file that it would replace
        }
        let bytes = table.finish()?;
        match &self.out {
            Some(out) => write_atomic(out, &bytes)?,
            None => std::io::stdout().write_all(&bytes).map_err(|e| Error::io("stdout", e))?,
        }
        if let Some(out) = &self.out {
            say(&format!("{} predictions are in {}", done.images, out.display()));
        }
        Ok(done)
    }

    fn paths(&self) -> Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for input in &self.inputs {
            let found = data::pictures(input)?;
            if found.is_empty() {
                let message =
                    format!("{}: no pictures (png, jpg, tif, bmp) in it", input.display());
                return Err(Error::usage(message));
            }
            paths.extend(found);
        }
        Ok(paths)
    }

    /// Hands the readable pictures of each batch to `work`, in order.
    fn predict(
        &self,
        paths: &[PathBuf],
        transform: &Transform,
        progress: Progress,
        mut work: impl FnMut(&[f32], [usize; 4], &[&PathBuf]) -> Result<()>,
    ) -> Result<Predicted> {
        let mut done = Predicted::default();
        let mut shown = progress.start("predict", paths.len() as u64);
        std::thread::scope(|scope| {
            let threads = self.workers.clamp(1, paths.len().div_ceil(self.batch_size).max(1));
            let queues: Vec<Receiver<Read>> = (0..threads)
                .map(|thread| {
                    let (sender, receiver) = sync_channel(2);
                    let batches = paths.chunks(self.batch_size).skip(thread).step_by(threads);
                    scope.spawn(move || {
                        for batch in batches {
                            if sender.send(read(batch, transform)).is_err() {
                                break;
                            }
                        }
                    });
                    receiver
                })
                .collect();
            for (i, batch) in paths.chunks(self.batch_size).enumerate() {
                let Ok(Read { images, outcome }) = queues[i % threads].recv() else {
                    return Err(Error::Training("a thread that reads pictures has ended".into()));
                };
                let mut readable = Vec::new();
                for (path, outcome) in batch.iter().zip(outcome) {
                    match outcome {
                        Ok(()) => readable.push(path),
                        Err(error) => done.unreadable.push((path.clone(), error.to_string())),
                    }
                }
                if !readable.is_empty() {
                    let shape = [readable.len(), transform.size, transform.size, 3];
                    work(&images, shape, &readable)?;
                }
                done.images += readable.len();
                shown.at((done.images + done.unreadable.len()) as u64, "");
            }
            Ok(())
        })?;
        Ok(done)
    }
}

fn read(paths: &[PathBuf], transform: &Transform) -> Read {
    let mut images = Vec::new();
    let add = |path: &PathBuf| {
        data::read_picture(path).map(|image| images.extend(transform.apply(&image)))
    };
    Read { outcome: paths.iter().map(add).collect(), images }
}

/// The table that is written.
struct Table {
    writer: csv::Writer<Vec<u8>>,
    classes: Vec<String>,
    logits: bool,
}

fn csv_error(error: impl std::fmt::Display) -> Error {
    Error::Training(format!("the table of predictions: {error}"))
}

impl Table {
    fn new(classes: &[String], logits: bool) -> Result<Self> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        let mut header: Vec<String> = ["path", "predicted"].map(String::from).into();
        header.extend(classes.iter().map(|class| format!("p_{class}")));
        if logits {
            header.extend(classes.iter().map(|class| format!("logit_{class}")));
        }
        writer.write_record(&header).map_err(csv_error)?;
        Ok(Self { writer, classes: classes.to_vec(), logits })
    }

    fn add(&mut self, model: &Model, logits: &[f32], paths: &[&PathBuf]) -> Result<()> {
        let classes = model.num_classes();
        if let Some(bad) = logits.iter().position(|x| !x.is_finite()) {
            let path = paths[bad / classes].display();
            let message = format!("the model's output for {path} is {}", logits[bad]);
            return Err(Error::Training(message));
        }
        let mut predictions = Predictions::new(classes);
        predictions.push_logits(logits, &vec![0; paths.len()])?;
        for (i, path) in paths.iter().enumerate() {
            let mut row =
                vec![text_of(path), self.classes[predictions.predicted(i) as usize].clone()];
            row.extend(predictions.row(i).iter().map(|p| format!("{p:.6}")));
            if self.logits {
                row.extend(logits[i * classes..][..classes].iter().map(|x| x.to_string()));
            }
            self.writer.write_record(&row).map_err(csv_error)?;
        }
        Ok(())
    }

    fn finish(self) -> Result<Vec<u8>> {
        self.writer.into_inner().map_err(csv_error)
    }
}

fn text_of(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
