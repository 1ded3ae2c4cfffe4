//! Checkpoints: the directories `last/` and `best/` of a run.
//!
//! Each holds `model.safetensors`, `optim.safetensors`, `state.json`, `config.toml` and, where weights are averaged,
//! `ema.safetensors`. Saving writes a whole new directory beside the old one, syncs it, and then renames:
//!
//! 1. write and sync `last.new/`       killed here: `last/` is the old one, `last.new/` is rubbish
//! 2. rename `last/` to `last.old/`    killed here: `last/` is missing, `last.old/` is whole
//! 3. rename `last.new/` to `last/`    killed here: `last/` is the new one, `last.old/` is rubbish
//! 4. remove `last.old/`
//!
//! [`recover`] undoes step 2 and is called before every load and save, so a kill at any instant, and an error such as a
//! full disk, leave one whole checkpoint.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::loss_scale::LossScale;
use crate::config::{Config, Precision};
use crate::{Error, Result};

/// The newest checkpoint of a run.
pub const LAST: &str = "last";
/// The checkpoint with the highest validation balanced accuracy.
pub const BEST: &str = "best";
/// Weights and buffers, with torchvision's names.
pub const MODEL: &str = "model.safetensors";
/// The same with averaged weights, where a run has an average.
pub const EMA: &str = "ema.safetensors";
/// Momentum or moments of the optimiser.
pub const OPTIM: &str = "optim.safetensors";
/// Where the run stands.
pub const STATE: &str = "state.json";
/// The resolved config.
pub const CONFIG: &str = "config.toml";

/// Version of `state.json`; raised when its meaning changes.
const VERSION: u32 = 1;

/// Where a run stands. Learning rate and random numbers are pure functions of seed and step, so what is kept of them is
/// little; it is here to be read by people and other programs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of this file's layout.
    pub version: u32,
    /// Version of the program that wrote it.
    pub attn2d: String,
    /// The model string.
    pub model: String,
    /// The names of the classes, in the order of the logits.
    pub classes: Vec<String>,
    /// Subtracted from the images' channels (values in 0..=1).
    pub mean: [f32; 3],
    /// Divides after that.
    pub std: [f32; 3],
    /// Epochs done.
    pub epoch: u64,
    /// Steps done in the epoch under way.
    pub epoch_step: u64,
    /// Optimiser steps done in all.
    pub step: u64,
    /// The best epoch so far.
    pub best: Option<Best>,
    /// Training metrics of the epoch under way.
    pub running: Running,
    /// Learning rate of the next step.
    pub schedule: ScheduleState,
    /// Random numbers of the next step.
    pub random: RandomState,
    /// The loss scale of the next step, in f16.
    #[serde(default)]
    pub loss_scale: Option<LossScale>,
    /// Steps that overflow left out.
    #[serde(default)]
    pub left_out: u64,
    /// Fingerprint of the config, without what a resumed run may change.
    pub config_sha256: String,
}

/// The best epoch so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Epochs done when it was reached, 1 for the first.
    pub epoch: u64,
    /// Steps done when it was reached.
    pub step: u64,
    /// Validation balanced accuracy.
    #[serde(with = "exact")]
    pub val_balanced_accuracy: f64,
}

/// Sums over the training batches of the epoch under way.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Running {
    /// Sum over batches of loss times images.
    #[serde(with = "exact")]
    pub loss_sum: f64,
    /// Images seen.
    pub images: u64,
    /// Counts of true against predicted classes, true class after true class.
    pub confusion: Vec<u64>,
}

impl Running {
    /// All zeros, for so many classes.
    pub fn new(classes: usize) -> Self {
        Self { confusion: vec![0; classes * classes], ..Self::default() }
    }
}

/// Learning rate of the next step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScheduleState {
    /// The schedule's name.
    pub name: String,
    /// The step it is asked for next.
    pub step: u64,
    /// What it answers.
    pub lr: f64,
}

/// Random numbers of the next step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RandomState {
    /// The generator.
    pub generator: String,
    /// Its key.
    pub seed: u64,
    /// Its counter's step.
    pub step: u64,
}

/// f64 as text, because `serde_json` may miss the last bit of a number that it reads.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &f64, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl State {
    /// The state at the beginning of a run.
    pub fn new(config: &crate::config::Config, classes: &[String]) -> Self {
        Self {
            version: VERSION,
            attn2d: env!("CARGO_PKG_VERSION").into(),
            model: config.model.name.clone(),
            classes: classes.to_vec(),
            mean: [0.0; 3],
            std: [1.0; 3],
            epoch: 0,
            epoch_step: 0,
            step: 0,
            best: None,
            running: Running::new(classes.len()),
            schedule: ScheduleState { name: String::new(), step: 0, lr: 0.0 },
            random: RandomState {
                generator: "philox4x32-10".into(),
                seed: config.train.seed,
                step: 0,
            },
            loss_scale: (config.train.precision == Precision::F16).then(LossScale::default),
            left_out: 0,
            config_sha256: config.fingerprint(),
        }
    }

    /// As the text of `state.json`.
    pub fn to_json(&self) -> String {
        let mut text =
            serde_json::to_string_pretty(self).expect("numbers and strings are always JSON");
        text.push('\n');
        text
    }

    /// Reads the state of the checkpoint directory `dir`.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(STATE);
        let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let head: Head = serde_json::from_str(&text)
            .map_err(|e| Error::file(&path, format!("not the state of a run: {e}")))?;
        if head.version != VERSION {
            let message =
                format!("version {} of this file is not known (expected {VERSION})", head.version);
            return Err(Error::file(&path, message));
        }
        serde_json::from_str(&text)
            .map_err(|e| Error::file(&path, format!("not the state of a run: {e}")))
    }
}

/// The file of weights that a checkpoint stands for: the average, where its run has one and `raw` does not ask for the last step's.
///
/// Errors: `File` where weights should be there and are not; those of its config.
pub fn weights(dir: &Path, raw: bool) -> Result<PathBuf> {
    let (average, model) = (dir.join(EMA), dir.join(MODEL));
    if !model.exists() {
        return Err(Error::file(
            &model,
            "is missing: the checkpoint is not whole; give another one",
        ));
    }
    if raw {
        return Ok(model);
    }
    if average.exists() {
        return Ok(average);
    }
    let ema = Config::load(&dir.join(CONFIG))?.train.ema;
    if ema > 0.0 {
        let message = format!(
            "is missing, although the run averages its weights (train.ema = {ema}); --raw-weights takes {MODEL} instead"
        );
        return Err(Error::file(&average, message));
    }
    Ok(model)
}

/// Saves `files` (name and content) as the checkpoint directory `dir`, whole or not at all.
///
/// Errors name the file that could not be written; the checkpoint that was there before then still is.
pub fn save(dir: &Path, files: &[(&str, &[u8])]) -> Result<()> {
    recover(dir)?;
    let (fresh, old) = (beside(dir, ".new"), beside(dir, ".old"));
    remove(&fresh)?;
    if let Err(error) = write_all(&fresh, files) {
        // Half a checkpoint is of no use, and on a full disk its space is.
        let _ = fs::remove_dir_all(&fresh);
        return Err(error);
    }
    remove(&old)?;
    if dir.exists() {
        fs::rename(dir, &old).map_err(|e| Error::io(dir, e))?;
    }
    fs::rename(&fresh, dir).map_err(|e| Error::io(dir, e))?;
    sync_directory(dir.parent().unwrap_or(Path::new(".")))?;
    remove(&old)
}

/// Puts the checkpoint at `dir` back in place if a kill fell between the two renames of [`save`]. Says whether there is
/// a checkpoint.
pub fn recover(dir: &Path) -> Result<bool> {
    let old = beside(dir, ".old");
    if !dir.exists() && old.exists() {
        fs::rename(&old, dir).map_err(|e| Error::io(&old, e))?;
    }
    Ok(dir.exists())
}

fn write_all(dir: &Path, files: &[(&str, &[u8])]) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    for (name, content) in files {
        write_synced(&dir.join(name), content)?;
    }
    sync_directory(dir)
}

fn write_synced(path: &Path, content: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(|e| Error::io(path, e))
}

/// Makes renames and new files in `dir` last through a power cut; only Unix needs and allows it.
fn sync_directory(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io(dir, e))?;
    }
    Ok(())
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(dir, e)),
        _ => Ok(()),
    }
}

fn beside(dir: &Path, suffix: &str) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    dir.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn read(dir: &Path) -> String {
        fs::read_to_string(dir.join("a")).expect("file a of the checkpoint")
    }

    #[test]
    fn state_comes_back_to_the_bit() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut state = State::new(&Config::default(), &["x".into(), "y".into()]);
        state.running.loss_sum = 0.1 + 0.2;
        state.best = Some(Best { epoch: 3, step: 30, val_balanced_accuracy: 2.0 / 3.0 });
        save(dir.path(), &[(STATE, state.to_json().as_bytes())]).expect("saved");
        assert_eq!(State::load(dir.path()).expect("loaded"), state);
        // Shortest decimal texts all the way: every bit pattern survives.
        for i in 1..2000_u32 {
            state.running.loss_sum = f64::from(i).sqrt() / 7.0;
            let back: State = serde_json::from_str(&state.to_json()).expect("own text");
            assert_eq!(back.running.loss_sum.to_bits(), state.running.loss_sum.to_bits());
        }
    }

    #[test]
    fn foreign_state_files_are_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let error = State::load(dir.path()).expect_err("no file").to_string();
        assert!(error.contains("state.json"), "{error}");
        for (text, expected) in [
            ("{\"version\": 99}", "version 99"),
            ("{}", "not the state of a run: missing field"),
            ("{\"version\": 1}", "not the state of a run: missing field"),
        ] {
            fs::write(dir.path().join(STATE), text).expect("written");
            let error = State::load(dir.path()).expect_err(text).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_kill_at_any_instant_leaves_a_whole_checkpoint() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let last = root.path().join(LAST);
        let (fresh, old) = (root.path().join("last.new"), root.path().join("last.old"));
        assert!(!recover(&last).expect("nothing there"));
        save(&last, &[("a", b"1")]).expect("saved");
        // While writing: rubbish beside a whole one.
        fs::create_dir(&fresh).expect("made");
        fs::write(fresh.join("a"), b"torn").expect("written");
        assert!(recover(&last).expect("whole"));
        assert_eq!(read(&last), "1");
        save(&last, &[("a", b"2")]).expect("rubbish does not hinder");
        assert_eq!(read(&last), "2");
        // Between the renames.
        fs::rename(&last, &old).expect("step 2");
        write_all(&fresh, &[("a", b"3")]).expect("step 1");
        assert!(recover(&last).expect("undone"));
        assert_eq!(read(&last), "2");
        fs::rename(&last, &old).expect("step 2");
        save(&last, &[("a", b"4")]).expect("saving recovers first");
        assert_eq!(read(&last), "4");
        // After the renames, before the clean-up.
        write_all(&old, &[("a", b"3")]).expect("an old one left over");
        assert!(recover(&last).expect("whole"));
        assert_eq!(read(&last), "4");
        save(&last, &[("a", b"5")]).expect("saved");
        assert_eq!(read(&last), "5");
        assert!(!old.exists() && !fresh.exists());
    }

    #[test]
    fn an_error_names_the_file_and_leaves_the_old_checkpoint() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let last = root.path().join(LAST);
        save(&last, &[("a", b"1")]).expect("saved");
        // A name that cannot be created stands for any failed write.
        let error = save(&last, &[("a", b"2"), ("no/such/b", b"3")]).expect_err("no directory");
        assert!(error.to_string().contains("last.new/no/such/b"), "{error}");
        assert_eq!(read(&last), "1");
        assert!(!root.path().join("last.new").exists());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_one_clear_line() {
        let error = write_synced(Path::new("/dev/full"), b"anything").expect_err("always full");
        assert!(error.to_string().starts_with("/dev/full: No space left on device"), "{error}");
    }
}
