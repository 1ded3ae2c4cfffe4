//! A run in progress: everything that an optimiser step needs, the step, the epoch, and saving.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::checkpoint::{self, Best, RandomState, Running, ScheduleState, State};
use super::ema::Ema;
use super::evaluate::{Evaluation, Evaluator, LossOptions, PartMetrics, show};
use super::images::{self, Images};
use super::log::{EpochRow, RunLog, StepRow};
use super::loss_scale::LossScale;
use super::metrics::{Confusion, argmax};
use super::optim::Optimizer;
use super::plots;
use super::progress::{Progress, Work};
use super::run_dir;
use super::schedule::Schedule;
use super::trained;
use crate::config::{Config, Precision};
use crate::data::{Batch, Loader, Part};
use crate::io::safetensors;
use crate::models::{Load, Model, Spec};
use crate::nn::Mode;
use crate::ops::{ClipGradNorm, CrossEntropy, cast, class_labels, clip_grad_norm, cross_entropy};
use crate::{Device, Error, Result, Tensor};

/// A run in progress.
pub(super) struct Session {
    config: Config,
    progress: Progress,
    dir: PathBuf,
    device: Device,
    images: Images,
    train: Loader,
    val: Option<Loader>,
    model: Model,
    optimizer: Optimizer,
    /// Of the weights, where the config wants one.
    ema: Option<Ema>,
    schedule: Schedule,
    loss: LossOptions,
    /// The loss's class weights on the device.
    class_weights: Option<Tensor>,
    log: RunLog,
    state: State,
}

/// What a run is made of before there is a run directory: whatever a wrong config can break, breaks here.
pub(super) struct Parts {
    pub(super) device: Device,
    pub(super) images: Images,
    pub(super) model: Model,
}

/// Opens a device that can compute in this precision.
///
/// Errors: `Usage` where it cannot; else those of [`Device::new`].
pub(super) fn open_device(name: &str, precision: Precision) -> Result<Device> {
    let device = Device::new(name)?;
    let dtype = precision.dtype();
    if dtype.is_half() && !device.caps().half.contains(&dtype) {
        return Err(Error::usage(format!(
            "--precision {}: {} ({}) has no kernels for it; use --precision f32, or another --device: `attn2d doctor` tells what each has",
            dtype.suffix(),
            device.name(),
            device.caps().adapter
        )));
    }
    Ok(device)
}

/// Whether a run that stands so has steps left that its config allows.
pub(super) fn goes_on(config: &Config, state: &State) -> bool {
    let most = config.train.max_steps;
    state.epoch < config.train.epochs as u64 && (most == 0 || state.step < most)
}

/// Refuses batches and images so small that a batch norm would see one value a channel, which has no variance. `batch` is the number of
/// images in a step.
fn check_norms(model: &Model, batch: usize) -> Result<()> {
    let Some((name, 1)) = model.smallest_norm().filter(|_| batch == 1) else { return Ok(()) };
    let (h, w) = model.image();
    Err(Error::usage(format!(
        "steps of one image (--batch-size, or one image to train on) are too small for {} at {h}x{w} pixels: batch norm '{name}' would see \
         a map of 1x1, one value a channel, and training needs two; take --batch-size 2 or more, or a larger --img-size",
        model.spec()
    )))
}

impl Parts {
    /// Opens device and data, and builds the model with its first weights.
    pub(super) fn new(config: &Config, split: Option<&Path>) -> Result<Self> {
        config.check()?;
        let spec: Spec = config.model.name.parse()?;
        let device = open_device(&config.train.device, config.train.precision)?;
        let images = match split {
            Some(file) => Images::with_split_file(config, file)?,
            None => Images::new(config)?,
        };
        let classes = images::num_classes(config, &images.dataset)?;
        let size = config.data.img_size;
        let mut model = Model::build(&spec, classes, (size, size), &device, config.train.seed)?;
        if !config.train.freeze.is_empty() {
            model.freeze(&config.train.freeze)?;
        }
        let batch = config.train.batch_size.min(images.split.train.len());
        check_norms(&model, batch)?;
        Ok(Self { device, images, model })
    }

    /// Starts from the weights of a file.
    pub(super) fn load_pretrained(&self, config: &Config, progress: Progress) -> Result<()> {
        if config.model.pretrained.is_empty() {
            return Ok(());
        }
        let weights = safetensors::read(&config.model.pretrained)?;
        let loaded = self.model.load_pretrained(&weights, config.model.drop_head)?;
        progress.line(&format!(
            "weights   {}: {} arrays taken over{}",
            config.model.pretrained,
            loaded.taken,
            match &*loaded.prefixes {
                [] => String::new(),
                prefixes => format!(", without the prefix {}", prefixes.join(" ")),
            }
        ));
        if let Some((from, to)) = loaded.positions {
            progress.line(&format!(
                "          position embeddings interpolated (bicubic) from {}x{} patches to {}x{}",
                from.0, from.1, to.0, to.1
            ));
        }
        if let Some(why) = &loaded.new_head {
            progress.line(&format!("          the classifier starts anew: {why}"));
        }
        let differences = &loaded.differences;
        for (what, names) in
            [("new in the model", &differences.missing), ("left out", &differences.unexpected)]
        {
            if !names.is_empty() {
                progress.line(&format!("          {what}: {}", names.join(", ")));
            }
        }
        Ok(())
    }
}

impl Session {
    /// Puts a run together; `state` says where it stands.
    pub(super) fn new(
        config: &Config,
        progress: Progress,
        dir: &Path,
        parts: Parts,
        log: RunLog,
        state: State,
    ) -> Result<Self> {
        let Parts { device, images, model } = parts;
        let train = images.train_loader(config)?;
        let val = images.eval_loader(config, Part::Val)?;
        let loss = LossOptions {
            class_weights: images.class_weights(config),
            label_smoothing: config.train.label_smoothing,
        };
        let on_device = |w: &Vec<f32>| Tensor::from_f32(&device, &[w.len()], w);
        let class_weights = loss.class_weights.as_ref().map(on_device).transpose()?;
        let schedule =
            Schedule::new(&config.sched, &config.optim, config.train.epochs, train.batches());
        let optimizer = Optimizer::new(&config.optim, model.parameters())?;
        let decay = config.train.ema;
        let ema = (decay > 0.0).then(|| Ema::new(decay, model.parameters())).transpose()?;
        Ok(Self {
            config: config.clone(),
            progress,
            dir: dir.to_path_buf(),
            device,
            images,
            train,
            val,
            model,
            optimizer,
            ema,
            schedule,
            loss,
            class_weights,
            log,
            state,
        })
    }

    /// Takes weights and optimiser state from the checkpoint that `state` came from.
    pub(super) fn restore(&mut self, checkpoint: &Path) -> Result<()> {
        if let Some(ema) = &mut self.ema {
            ema.load(&self.model, &safetensors::read(checkpoint.join(checkpoint::EMA))?)?;
        }
        let weights = safetensors::read(checkpoint.join(checkpoint::MODEL))?;
        self.model.load(&weights, Load::Exact)?;
        self.optimizer.load(self.model.parameters(), &checkpoint.join(checkpoint::OPTIM))
    }

    /// Trains until the last epoch, or the last step that the config allows.
    pub(super) fn fit(&mut self) -> Result<()> {
        while goes_on(&self.config, &self.state) {
            self.epoch()?;
        }
        Ok(())
    }

    /// One epoch, or the rest of one.
    fn epoch(&mut self) -> Result<()> {
        let (epoch, total) = (self.state.epoch, self.train.batches() as u64);
        let (start, first_step) = (Instant::now(), self.state.step);
        let what = format!("epoch {}/{}", epoch + 1, self.config.train.epochs);
        let mut work = self.progress.start(&what, total);
        let mut batches = self.train.epoch(epoch, self.state.epoch_step as usize)?;
        while let Some(batch) = batches.next() {
            self.step(&batch?, batches.last_wait(), &mut work)?;
            if !goes_on(&self.config, &self.state) {
                break;
            }
            let every = self.config.train.checkpoint_every;
            if every > 0 && self.state.step.is_multiple_of(every) && self.state.epoch_step < total {
                self.save(&[checkpoint::LAST])?;
            }
        }
        drop(batches);
        drop(work);
        let images = (self.state.step - first_step) as f64 * self.config.train.batch_size as f64;
        self.end_epoch(&what, images / start.elapsed().as_secs_f64())
    }

    /// Forward, backward, update, and a line in the log.
    fn step(&mut self, batch: &Batch, waited: Duration, shown: &mut Work) -> Result<()> {
        let start = Instant::now();
        let step = self.state.step + 1;
        let lr = self.schedule.lr(self.state.step);
        let images = Tensor::from_f32(&self.device, &batch.shape(), &batch.images)?;
        let labels = class_labels(&self.device, &batch.labels, self.model.num_classes())?;
        let mode = Mode::train(self.config.train.seed, step as u32);
        let options = CrossEntropy { label_smoothing: self.config.train.label_smoothing as f32 };
        let parameters = self.model.parameters();
        let scale = self.state.loss_scale;
        let factor = scale.map_or(1.0, LossScale::scale);
        let work = || {
            let images = cast(&images, self.config.train.precision.dtype())?;
            let logits = self.model.forward(&images, &mode)?;
            let loss = cross_entropy(&logits, &labels, self.class_weights.as_ref(), options)?;
            parameters.gather(&loss.backward_with(&loss.full_like(factor)?)?)?;
            let control = self.control(factor)?;
            self.optimizer.step(parameters, control.as_ref(), lr, step - self.state.left_out)?;
            if let Some(ema) = &self.ema {
                ema.step(parameters)?;
            }
            Ok((logits, loss, control))
        };
        let graph = self.config.train.graph;
        let (logits, loss, control) = if graph { self.device.step(work) } else { work() }?;
        let loss = f64::from(loss.item()?);
        if !loss.is_finite() {
            return Err(self.diverged("loss", loss, step, lr));
        }
        let norm = control.map(|control| Ok(f64::from(control.to_f32()?[0]))).transpose()?;
        let left_out = self.judge(norm, step, lr)?;
        self.count(&logits.to_f32()?, batch, loss);
        (self.state.step, self.state.epoch_step) = (step, self.state.epoch_step + 1);
        let (data_ms, step_ms) = (1e3 * waited.as_secs_f64(), 1e3 * start.elapsed().as_secs_f64());
        let images_per_s = 1e3 * batch.labels.len() as f64 / (data_ms + step_ms);
        self.log.step(&StepRow {
            step,
            epoch: self.state.epoch + 1,
            loss,
            lr,
            data_ms,
            step_ms,
            images_per_s,
            grad_norm: norm.filter(|norm| norm.is_finite()),
            loss_scale: scale.map(|_| f64::from(factor)),
            left_out,
        })?;
        shown.at(self.state.epoch_step, &format!("loss {loss:.4}  {images_per_s:.0} images/s"));
        Ok(())
    }

    /// Adds a batch to the training metrics of the epoch.
    fn count(&mut self, logits: &[f32], batch: &Batch, loss: f64) {
        let classes = self.model.num_classes();
        let running = &mut self.state.running;
        for (row, &label) in logits.chunks_exact(classes).zip(&batch.labels) {
            running.confusion[label as usize * classes + argmax(row) as usize] += 1;
        }
        running.loss_sum += loss * batch.labels.len() as f64;
        running.images += batch.labels.len() as u64;
    }

    /// What the optimiser step is told of the gradients, where anything is to be known of them: whether they are finite, their norm,
    /// and what to multiply them by.
    fn control(&self, loss_scale: f32) -> Result<Option<Tensor>> {
        let max_norm = self.config.optim.clip_grad as f32;
        if max_norm == 0.0 && self.state.loss_scale.is_none() {
            return Ok(None);
        }
        let opt = ClipGradNorm { max_norm: (max_norm > 0.0).then_some(max_norm), loss_scale };
        clip_grad_norm(self.model.parameters().gradients(), opt).map(Some)
    }

    /// After a step whose gradients had this norm: whether the device left it out, and the loss scale of the next.
    fn judge(&mut self, norm: Option<f64>, step: u64, lr: f64) -> Result<bool> {
        let finite = norm.is_none_or(f64::is_finite);
        let goes_on = match &mut self.state.loss_scale {
            Some(scale) => scale.update(finite),
            None => finite,
        };
        if !goes_on {
            let norm = norm.unwrap_or(f64::NAN);
            return Err(self.diverged("norm of the gradients", norm, step, lr));
        }
        self.state.left_out += u64::from(!finite);
        Ok(!finite)
    }

    fn diverged(&self, what: &str, value: f64, step: u64, lr: f64) -> Error {
        let epoch = self.state.epoch + 1;
        let other = match self.config.train.precision {
            Precision::F16 => ", or --precision bf16, which has larger numbers",
            _ => "",
        };
        Error::Training(format!(
            "the {what} of step {step} (epoch {epoch}, learning rate {lr:.3e}) is {value}; try a lower --lr or a longer \
             --warmup-epochs{other}. Checkpoints in {} are from before",
            self.dir.display()
        ))
    }

    /// Evaluates, writes the row, keeps the best, saves.
    fn end_epoch(&mut self, what: &str, images_per_s: f64) -> Result<()> {
        let val = match &self.val {
            Some(loader) => Some(self.validate(loader)?),
            None => None,
        };
        let row = self.row(val.as_ref())?;
        let whole = self.state.epoch_step == self.train.batches() as u64;
        if whole {
            (self.state.epoch, self.state.epoch_step) = (self.state.epoch + 1, 0);
            self.state.running = Running::new(self.model.num_classes());
        }
        // Without a validation part there is nothing to choose by, and the latest is called the best. A part of an epoch is the best
        // only until there is a whole one: a run that was stopped within an epoch and resumed chooses as one that was not.
        let reached = row.val_balanced_accuracy.unwrap_or(f64::NAN);
        let stands = |best: &Best| best.val_balanced_accuracy >= reached || !whole; // >= is false where one is NaN
        let beaten = !self.state.best.as_ref().is_some_and(stands);
        if beaten {
            self.state.best =
                Some(Best { epoch: row.epoch, step: row.step, val_balanced_accuracy: reached });
        }
        let mut mark = String::from(if beaten && val.is_some() { "  best so far" } else { "" });
        if self.state.left_out > 0 {
            mark += &format!("  ({} steps left out: overflow in f16)", self.state.left_out);
        }
        self.progress.line(&format!(
            "{what}  train: loss {:.4}, bal. acc. {}   val: loss {}, bal. acc. {}, AUC {}   {images_per_s:.0} images/s{mark}",
            row.train_loss,
            show(row.train_balanced_accuracy),
            row.val_loss.map_or("-".into(), |v| format!("{v:.4}")),
            show(row.val_balanced_accuracy),
            show(row.val_auc),
        ));
        self.log.epoch(row)?;
        plots::learning_curves(
            &self.dir.join(run_dir::CURVES),
            self.log.rows(),
            self.model.num_classes(),
        )?;
        self.log.sync()?;
        // The best first: a kill in between repeats this epoch and writes the best again, with the same bits.
        let both = [checkpoint::BEST, checkpoint::LAST];
        self.save(if beaten { &both } else { &both[1..] })
    }

    /// Evaluates the validation part by the averaged weights, where there are any.
    fn validate(&self, loader: &Loader) -> Result<Evaluation> {
        let run = || self.evaluator().run("validation", loader, |label| label);
        match &self.ema {
            Some(ema) => ema.with(self.model.parameters(), run),
            None => run(),
        }
    }

    fn row(&self, val: Option<&Evaluation>) -> Result<EpochRow> {
        let running = &self.state.running;
        let train = Confusion::from_counts(self.model.num_classes(), running.confusion.clone())?;
        let val = val.map(|v| v.metrics("val", &self.images.dataset.classes));
        Ok(EpochRow {
            epoch: self.state.epoch + 1,
            step: self.state.step,
            lr: self.schedule.lr(self.state.step.saturating_sub(1)),
            train_loss: running.loss_sum / running.images.max(1) as f64,
            train_accuracy: train.accuracy(),
            train_balanced_accuracy: train.balanced_accuracy(),
            val_loss: val.as_ref().map(|v| v.loss),
            val_accuracy: val.as_ref().and_then(|v| v.accuracy),
            val_balanced_accuracy: val.as_ref().and_then(|v| v.balanced_accuracy),
            val_auc: val.as_ref().and_then(|v| v.auc),
            val_recall: val.map_or_else(|| vec![None; self.model.num_classes()], |v| v.recall),
        })
    }

    /// Saves the run as it stands under each of the given names.
    fn save(&mut self, names: &[&str]) -> Result<()> {
        let (name, step) = (self.config.sched.name, self.state.step);
        let name = format!("{name:?}").to_lowercase();
        self.state.schedule = ScheduleState { name, step, lr: self.schedule.lr(step) };
        self.state.random = RandomState { step: step + 1, ..self.state.random.clone() };
        let mut weights = self.model.state()?;
        if let Some((bad, _)) =
            weights.arrays.iter().find(|(_, a)| a.to_f32().iter().any(|x| !x.is_finite()))
        {
            let message = format!(
                "{bad} is not finite after step {step}; try a lower --lr. Nothing was saved"
            );
            return Err(Error::Training(message));
        }
        let mut average = self.ema.as_ref().map(|ema| ema.state(&self.model)).transpose()?;
        for dict in [&mut weights].into_iter().chain(&mut average) {
            trained::describe(dict, &self.state.classes, (self.state.mean, self.state.std));
        }
        let weights = safetensors::to_bytes(&weights);
        let average = average.as_ref().map(safetensors::to_bytes);
        let optimizer = safetensors::to_bytes(&self.optimizer.save(self.model.parameters())?);
        let (state, config) = (self.state.to_json(), self.config.to_toml());
        let mut files = vec![
            (checkpoint::MODEL, weights.as_slice()),
            (checkpoint::OPTIM, optimizer.as_slice()),
            (checkpoint::STATE, state.as_bytes()),
            (checkpoint::CONFIG, config.as_bytes()),
        ];
        files.extend(average.as_ref().map(|bytes| (checkpoint::EMA, bytes.as_slice())));
        names.iter().try_for_each(|name| checkpoint::save(&self.dir.join(name), &files))
    }

    /// Scores the best checkpoint on every part but the training part, and those that are sealed.
    pub(super) fn score_best(&mut self) -> Result<Vec<PartMetrics>> {
        let best = self.dir.join(checkpoint::BEST);
        let weights = safetensors::read(checkpoint::weights(&best, false)?)?;
        self.model.load(&weights, Load::Exact)?;
        let mut all = Vec::new();
        let parts = [Part::Val, Part::Test, Part::IdTest];
        let scored = if self.config.data.seal_test { &parts[..1] } else { &parts };
        for &part in scored {
            if let Some(loader) = self.images.eval_loader(&self.config, part)? {
                let evaluation = self.evaluator().run(part.name(), &loader, |label| label)?;
                let dataset = &self.images.dataset;
                all.push(evaluation.write(&self.dir, part.name(), dataset, &dataset.classes)?);
            }
        }
        Ok(all)
    }

    fn evaluator(&self) -> Evaluator<'_> {
        Evaluator {
            model: &self.model,
            device: &self.device,
            precision: self.config.train.precision,
            loss: &self.loss,
            dataset: &self.images.dataset,
            progress: self.progress,
        }
    }

    /// The best epoch so far.
    pub(super) fn best(&self) -> Option<Best> {
        self.state.best
    }

    /// What the run computes on.
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// The number of learned numbers.
    pub(super) fn parameters(&self) -> usize {
        self.model.parameters().count()
    }
}
