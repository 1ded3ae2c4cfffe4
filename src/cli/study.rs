//! `attn2d study`: compares models by experiment.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::html;
use crate::io::{machine, paths, write_atomic};
use crate::study::engines::{Job, kubernetes, shell, slurm};
use crate::study::plan::{Plan, Stage, Task};
use crate::study::run::Runner;
use crate::study::{Folder, Study, Work, Worked, gather, report};
use crate::train::Progress;
use crate::{Device, Error, Result};

const HELP: &str = "Examples:
  attn2d study configs/quick.toml
      built-in pictures, minutes on two cores: search, seeds, tests and a report
  attn2d study configs/isic2017.toml --workers 2 --device cuda:0
      two trials at a time
  attn2d study configs/isic2017.toml --list
      what is to be done, what is done, what failed
  attn2d study configs/isic2017.toml --index 17
      one trial, and what it needs that nobody else is doing

A study that was stopped goes on when it is started again. Several may work on one folder at once, on one machine or on many.";

/// Compare models by experiment: search settings, train many seeds, test statistically, report
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Options {
    /// The study's file, such as configs/quick.toml
    #[arg(value_name = "CONFIG")]
    config: PathBuf,
    /// The study's folder; that of the file if not given
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Change a value of the file: seeds=3, search.trials=9, config.data.img_size=64, datasets.NAME.config.data.path=PATH
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Only this model, and the one that it is compared with; may be given several times
    #[arg(long, value_name = "MODEL")]
    only: Vec<String>,
    /// Show every trial and how far it is, and run none
    #[arg(long, conflicts_with_all = ["index", "report", "retry_failed"])]
    list: bool,
    /// Run this trial of the list, and those that it needs
    #[arg(long, value_name = "I")]
    index: Option<usize>,
    /// Trials at a time: 1 if not given, 16 in the files of --slurm and --k8s
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
    /// The device of all trials, instead of the file's
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Write the report of what is there, and run none
    #[arg(long, conflicts_with_all = ["index", "retry_failed"])]
    report: bool,
    /// Run trials again that failed
    #[arg(long)]
    retry_failed: bool,
    /// Write an array job for Slurm's sbatch, and run nothing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["list", "index", "report", "retry_failed"])]
    slurm: Option<PathBuf>,
    /// Write an Indexed Job for kubectl, and run nothing; paths in it are those of the volume, mounted at /study
    #[arg(long, value_name = "FILE", conflicts_with_all = ["list", "index", "report", "retry_failed", "slurm"])]
    k8s: Option<PathBuf>,
    /// With --k8s: the image that has the program
    #[arg(long, value_name = "IMAGE", default_value = "attn2d:latest", requires = "k8s")]
    image: String,
    /// With --k8s: the volume claim mounted at /study
    #[arg(long, value_name = "NAME", default_value = "attn2d-study", requires = "k8s")]
    claim: String,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

/// Runs, lists or reports a study; `false` where trials failed.
///
/// # Errors
/// `Usage` for a study's file that is not right or cannot run; those of files.
pub fn study(options: &Options) -> Result<bool> {
    paths::check_input(
        "CONFIG",
        &options.config,
        "a study's TOML file such as configs/quick.toml",
    )?;
    let study = Study::load(&options.config, &options.set)?.only(&options.only)?;
    let root = options.output.clone().unwrap_or_else(|| PathBuf::from(&study.output));
    paths::check_output_folder("--output", &root)?;
    let folder = Folder::new(root);
    let progress = if options.quiet { Progress::Quiet } else { Progress::auto() };
    if options.list {
        progress.line(list(&study, &folder)?.trim_end());
        return Ok(true);
    }
    if options.slurm.is_some() || options.k8s.is_some() {
        engines(options, &study, &folder, progress)?;
        return Ok(true);
    }
    if options.report {
        if !folder.root().is_dir() {
            let message = format!("--report: there is no study in {} yet", folder.root().display());
            return Err(Error::usage(message));
        }
        report(&study, &folder, options.device.as_deref(), progress)?;
        return Ok(true);
    }
    if options.retry_failed {
        folder.forget_failed()?;
    }
    let workers = options.workers.map_or(1, usize::from);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runner = Runner {
        program: std::env::current_exe().map_err(|e| Error::io("attn2d", e))?,
        device: options.device.clone(),
        threads: if workers == 1 { 0 } else { (cores / workers).max(1) },
        keep: study.keep,
    };
    let work = Work { workers, runner, index: options.index, progress };
    let Worked { ran, failed, unjudged, open } = work.run(&study, &folder)?;
    progress.line(&format!("\n{ran} trials run, {failed} failed, {open} open"));
    if open == 0 {
        report(&study, &folder, options.device.as_deref(), progress)?;
    }
    // One task of many has done its part when its trial is written down.
    Ok(unjudged == 0 || options.index.is_some())
}

/// Writes the report.
fn report(study: &Study, folder: &Folder, device: Option<&str>, progress: Progress) -> Result<()> {
    // Another that writes it is done in a moment, and may not have seen what this process has.
    let _lock = loop {
        match folder.lock(".report.lock")? {
            Some(lock) => break lock,
            None => std::thread::sleep(std::time::Duration::from_millis(100)),
        }
    };
    let results = gather::results(study, folder, environment(study, device)?)?;
    let verdict = report::write(&results, folder.root())?;
    progress.line(verdict.trim_end());
    progress.line(&format!("\nReport: {}", folder.root().join("report.html").display()));
    Ok(())
}

/// Where and how the report was made.
fn environment(study: &Study, device: Option<&str>) -> Result<Vec<(String, String)>> {
    let mut devices: Vec<String> = Vec::new();
    for cell in study.cells() {
        let name = device
            .map_or_else(|| study.config(cell).map(|c| c.train.device), |d| Ok(d.to_owned()))?;
        if !devices.contains(&name) {
            devices.push(name);
        }
    }
    let adapter = |name: &String| match Device::new(name) {
        Ok(device) => format!("{} ({})", device.name(), device.caps().adapter),
        Err(_) => format!("{name} (not on the machine that wrote the report)"),
    };
    let pairs = [
        ("program", format!("attn2d {}", env!("CARGO_PKG_VERSION"))),
        ("device", devices.iter().map(adapter).collect::<Vec<_>>().join("; ")),
        ("host", machine::host()),
        ("system", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)),
        ("report written", machine::now()),
        (
            "command",
            machine::command().iter().map(|word| shell(word)).collect::<Vec<_>>().join(" "),
        ),
    ];
    Ok(pairs.map(|(name, value)| (name.to_owned(), value)).into())
}

/// Writes the file for an engine.
fn engines(options: &Options, study: &Study, folder: &Folder, progress: Progress) -> Result<()> {
    let mut words: Vec<String> =
        options.set.iter().flat_map(|set| ["--set".into(), set.clone()]).collect();
    words.extend(options.only.iter().flat_map(|name| ["--only".into(), name.clone()]));
    words.extend(options.device.iter().flat_map(|device| ["--device".to_owned(), device.clone()]));
    // A task is started in a directory that this program does not know.
    let absolute = |path: &Path| std::path::absolute(path).map_err(|e| Error::io(path, e));
    let (config, root) = (absolute(&options.config)?, absolute(folder.root())?);
    let program = std::env::current_exe().map_err(|e| Error::io("attn2d", e))?;
    let start = absolute(Path::new("."))?;
    let job = Job {
        name: &study.name,
        tasks: Plan::new(study)?.places().len(),
        parallel: options.workers.map_or(16, usize::from),
        program: &program,
        config: &config,
        folder: &root,
        start: &start,
        words: &words,
    };
    let (option, file, text, next) = match (&options.slurm, &options.k8s) {
        (Some(file), _) => ("--slurm", file, slurm(&job), "sbatch"),
        (None, Some(file)) => {
            let inside = Job {
                program: Path::new("attn2d"),
                config: &options.config,
                folder: folder.root(),
                ..job
            };
            ("--k8s", file, kubernetes(&inside, &options.image, &options.claim), "kubectl apply -f")
        }
        (None, None) => return Ok(()),
    };
    paths::check_output(option, file)?;
    write_atomic(file, text.as_bytes())?;
    progress.line(&format!(
        "{} tasks, {} at a time: {next} {}",
        job.tasks,
        job.parallel,
        file.display()
    ));
    Ok(())
}

/// Every place of the plan with what stands there.
fn list(study: &Study, folder: &Folder) -> Result<String> {
    let plan = Plan::new(study)?;
    let (tasks, outcomes) = gather::tasks(study, &plan, folder)?;
    let row = |(index, (place, task)): (usize, (&crate::study::plan::Place, &Task))| {
        let stage = match place.stage {
            Stage::Search { rung, place } => format!("search {rung}.{place}"),
            Stage::Seed(n) => format!("seed {}", n + 1),
        };
        let (state, id, what) = match task {
            Task::Void => {
                ("none".into(), String::new(), "too few of the rung before succeeded".into())
            }
            Task::Ask => ("to be asked for".into(), String::new(), String::new()),
            Task::Waits(others) => {
                (format!("waits for {}", others.len()), String::new(), String::new())
            }
            Task::Trial(trial) => {
                let state =
                    match outcomes.get(&trial.id).map(|o| (o.val_balanced_accuracy, &o.error)) {
                        Some((Some(val), _)) => format!("done {val:.3}"),
                        Some(_) => "failed".into(),
                        None => "ready".into(),
                    };
                (
                    state,
                    trial.id.clone(),
                    format!(
                        "{} epochs, {}; {}",
                        trial.config.train.epochs,
                        trial.setting.spec,
                        trial.setting.text()
                    ),
                )
            }
        };
        let (data, model) =
            (&study.datasets[place.cell.dataset].name, &study.models[place.cell.model].name);
        vec![index.to_string(), data.clone(), model.clone(), stage, state, id, what]
    };
    let head = ["index", "data", "model", "stage", "state", "directory", "settings"]
        .map(String::from)
        .to_vec();
    let rows = plan.places().iter().zip(&tasks).enumerate().map(row).collect();
    Ok(html::aligned(&html::Table {
        caption: format!("{}: {} trials in {}", study.name, tasks.len(), folder.root().display()),
        head,
        rows,
    }))
}
