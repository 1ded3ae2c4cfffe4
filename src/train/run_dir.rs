//! The run directory: where it lies, and what a newcomer finds in it.

use std::path::{Path, PathBuf};

use super::checkpoint;
use crate::config::Config;
use crate::io::{Locked, lock, paths};
use crate::{Error, Result};

/// Items by part, written once when the run begins.
pub const SPLIT: &str = "split.csv";
/// Learning curves.
pub const CURVES: &str = "curves.svg";
/// Metrics of the best checkpoint on every part.
pub const SUMMARY: &str = "summary.json";

/// Held by the process that trains; empty.
const LOCK: &str = ".lock";

/// Makes the directory of a new run: the one that the config names, which must not hold a run yet, or else a new one below
/// `runs/`. Returns its path.
pub fn create(config: &Config) -> Result<PathBuf> {
    let dir = if config.output.dir.is_empty() {
        unused(Path::new("runs"), &name(config))
    } else {
        PathBuf::from(&config.output.dir)
    };
    check(&dir)?;
    std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
    Ok(dir)
}

/// Takes the directory for this process; with another process in it, `Busy`. A file system without locks: better unguarded than not at all.
pub(crate) fn try_lock(dir: &Path) -> Result<Locked> {
    lock(&dir.join(LOCK))
}

/// Takes the directory for this process until what it returns is dropped or the process ends, however it ends.
///
/// Errors: `Usage` where another process has it.
pub(super) fn take(dir: &Path) -> Result<Locked> {
    match try_lock(dir)? {
        Locked::Busy => Err(Error::usage(format!(
            "{}: another process is training in this directory; stop it or wait for its end",
            dir.display()
        ))),
        locked => Ok(locked),
    }
}

/// Refuses a directory that a new run cannot have: one that holds a run, or a path that is or goes through a file.
pub(super) fn check(dir: &Path) -> Result<()> {
    paths::check_output_folder("--output", dir)?;
    if dir.join(checkpoint::CONFIG).exists() {
        let shown = dir.display();
        return Err(Error::usage(format!(
            "{shown} holds a run already: go on with it by --resume {shown}, or give another --output"
        )));
    }
    Ok(())
}

/// The config that a run was started with, its output directory being `dir`.
pub fn read_config(dir: &Path) -> Result<Config> {
    let path = dir.join(checkpoint::CONFIG);
    if !path.exists() {
        return Err(Error::usage(format!(
            "{}: not a run directory (it has no {})",
            dir.display(),
            checkpoint::CONFIG
        )));
    }
    let mut config = Config::load(&path)?;
    config.output.dir = dir.display().to_string();
    Ok(config)
}

/// The run directory behind what a user gave: the directory itself, or one of its checkpoints.
pub fn of(given: &Path) -> PathBuf {
    let name = given.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if (name == checkpoint::LAST || name == checkpoint::BEST)
        && given.join(checkpoint::STATE).exists()
    {
        return given.parent().unwrap_or(Path::new(".")).to_path_buf();
    }
    given.to_path_buf()
}

/// `resnet18+ga@4-dermoscopy`: model and data, with characters that no file system minds.
fn name(config: &Config) -> String {
    let data = config.data.path.trim_end_matches(['/', '\\']);
    let data = data.rsplit(['/', '\\', ':']).next().unwrap_or(data);
    let data = data.strip_suffix(".npz").unwrap_or(data);
    file_name(&format!("{}-{data}", config.model.name))
}

/// A name with a dash for each character that some file system minds.
pub(crate) fn file_name(name: &str) -> String {
    let safe = |c: char| if c.is_alphanumeric() || "+@-_.".contains(c) { c } else { '-' };
    name.chars().map(safe).collect()
}

fn unused(parent: &Path, name: &str) -> PathBuf {
    numbered(parent, name, |dir| !dir.exists())
}

/// The first of `name`, `name-2`, `name-3` and on in a folder that will do.
pub(super) fn numbered(parent: &Path, name: &str, will_do: impl Fn(&Path) -> bool) -> PathBuf {
    let others = (2_u32..).map(|n| parent.join(format!("{name}-{n}")));
    let mut candidates = std::iter::once(parent.join(name)).chain(others);
    candidates.find(|dir| will_do(dir)).unwrap_or_else(|| parent.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_model_and_data() {
        let mut config = Config::default();
        assert_eq!(name(&config), "resnet18+ga@4-dermoscopy");
        config.model.name = "resnet18+la7@3,4:append".into();
        config.data.path = "../shared/data/pcam kaggle/".into();
        assert_eq!(name(&config), "resnet18+la7@3-4-append-pcam-kaggle");
    }

    #[test]
    fn one_process_at_a_time() {
        let root = tempfile::tempdir().expect("a folder");
        let held = take(root.path()).expect("free");
        let error = take(root.path()).map(|_| ()).expect_err("held").to_string();
        assert!(error.contains("another process is training in this directory"), "{error}");
        drop(held);
        take(root.path()).expect("free again");
    }

    #[test]
    fn a_run_is_never_overwritten() {
        let root = tempfile::tempdir().expect("a temporary directory");
        assert_eq!(unused(root.path(), "a"), root.path().join("a"));
        std::fs::create_dir(root.path().join("a")).expect("made");
        assert_eq!(unused(root.path(), "a"), root.path().join("a-2"));
        let mut config = Config::default();
        config.output.dir = root.path().join("a").display().to_string();
        let dir = create(&config).expect("an empty directory will do");
        std::fs::write(dir.join(checkpoint::CONFIG), config.to_toml()).expect("written");
        let error = create(&config).expect_err("there is a run");
        assert!(error.to_string().contains("holds a run already"), "{error}");
        assert_eq!(error.exit_code(), 2);
        assert_eq!(read_config(&dir).expect("its config"), config);
        let error = read_config(root.path()).expect_err("no run").to_string();
        assert!(error.contains("not a run directory"), "{error}");
    }

    #[test]
    fn a_checkpoint_stands_for_its_run() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let last = root.path().join("last");
        assert_eq!(of(&last), last);
        std::fs::create_dir(&last).expect("made");
        std::fs::write(last.join(checkpoint::STATE), "{}").expect("written");
        assert_eq!(of(&last), root.path());
        assert_eq!(of(root.path()), root.path());
    }
}
