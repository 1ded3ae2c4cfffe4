//! A study on engines that exist: files that hand its places, one by one, to Slurm or Kubernetes.
//!
//! Either starts `attn2d study CONFIG --index I` for every place of the plan. A task whose trial waits for others does those that nobody
//! is doing, and waits for those that somebody is; so tasks may start in any order and on any number of machines, as long as all see the
//! study's folder and its file system has locks. A task that is lost may be started again: its run goes on from its last checkpoint.

use std::path::Path;

use crate::train::run_dir;

/// How a study's tasks are started.
#[derive(Debug, Clone)]
pub struct Job<'a> {
    /// The study's name.
    pub name: &'a str,
    /// Number of places in the plan.
    pub tasks: usize,
    /// Tasks at a time.
    pub parallel: usize,
    /// The program on the machines that run it.
    pub program: &'a Path,
    /// The study's file as those machines see it.
    pub config: &'a Path,
    /// The study's folder as those machines see it.
    pub folder: &'a Path,
    /// Where the program was called.
    pub start: &'a Path,
    /// Other words for every task, as `--device cuda:0`.
    pub words: &'a [String],
}

/// An array job for `sbatch`.
pub fn slurm(job: &Job) -> String {
    let Job { name, tasks, parallel, .. } = job;
    // Slurm's arrays end at 1000 unless a cluster is set up otherwise; tasks of a longer study take several trials.
    let array = (*tasks).min(1000);
    let (label, folder) = (label(name), shell(&job.folder.display().to_string()));
    format!(
        "#!/bin/bash\n\
         # The study {name:?}: a task a trial, {parallel} at a time. Submit it with what your cluster wants besides, as in\n\
         #   sbatch --partition=gpu --gres=gpu:1 --cpus-per-task=8 --time=04:00:00 THIS_FILE\n\
         # A task that is preempted or runs out of time goes on when it is started again. The last to end writes the report.\n\
         #SBATCH --job-name=attn2d-{label}\n\
         #SBATCH --array=0-{}%{parallel}\n\
         #SBATCH --requeue\n\
         #SBATCH --open-mode=append\n\
         #SBATCH --output=slurm-%A_%a.log\n\
         set -eu\n\
         mkdir -p {folder}\n\
         # Where the study's file was given: paths of data may be as seen from here.\n\
         cd {}\n\
         for index in $(seq \"$SLURM_ARRAY_TASK_ID\" {array} {}); do\n    {} --index \"$index\"\ndone\n",
        array - 1,
        shell(&job.start.display().to_string()),
        tasks - 1,
        words(job)
    )
}

/// A manifest of an Indexed Job for `kubectl apply`: an `image` that holds the program, and a volume `claim` mounted at /study that holds the
/// study's file, its folder and the data.
pub fn kubernetes(job: &Job, image: &str, claim: &str) -> String {
    let Job { name, tasks, parallel, .. } = job;
    let label = label(name).to_lowercase();
    let text = |s: &str| serde_json::Value::from(s).to_string();
    let mut command =
        vec![job.program.display().to_string(), "study".into(), job.config.display().to_string()];
    command.extend(["--output".into(), job.folder.display().to_string()]);
    command.extend(job.words.iter().cloned());
    command.extend(["--index".into(), "$(JOB_COMPLETION_INDEX)".into()]);
    let command: String =
        command.iter().map(|word| format!("            - {}\n", text(word))).collect();
    format!(
        "# The study {name:?}: an index a trial, {parallel} at a time. kubectl apply -f THIS_FILE\n\
         # The volume must be one that many pods can write to and that has locks (NFS 4, CephFS). The last index to end writes the report.\n\
         apiVersion: batch/v1\n\
         kind: Job\n\
         metadata:\n  name: attn2d-{label}\n\
         spec:\n  completionMode: Indexed\n  completions: {tasks}\n  parallelism: {parallel}\n  backoffLimitPerIndex: 3\n  template:\n    spec:\n      \
         restartPolicy: Never\n      containers:\n        - name: trial\n          image: {}\n          workingDir: /study\n          command:\n{command}          \
         # resources:\n          #   limits:\n          #     nvidia.com/gpu: 1\n          volumeMounts:\n            - name: study\n              mountPath: /study\n      \
         volumes:\n        - name: study\n          persistentVolumeClaim:\n            claimName: {}\n",
        text(image),
        text(claim)
    )
}

/// The words of a task, but for its index, for a shell.
fn words(job: &Job) -> String {
    let path = |path: &Path| shell(&path.display().to_string());
    let mut words = vec![
        path(job.program),
        "study".into(),
        path(job.config),
        "--output".into(),
        path(job.folder),
    ];
    words.extend(job.words.iter().map(|word| shell(word)));
    words.join(" ")
}

/// A word as a shell reads it back.
pub(crate) fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// A name that engines take: letters, digits and dashes, at most 40, neither first nor last a dash.
fn label(name: &str) -> String {
    let name = run_dir::file_name(name);
    let safe = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let safe: String = name.chars().map(safe).skip_while(|c| *c == '-').take(40).collect();
    let label = safe.trim_matches('-');
    if label.is_empty() { "study".into() } else { label.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job<'a>(words: &'a [String]) -> Job<'a> {
        Job {
            name: "ISIC 2017 (small)",
            tasks: 40,
            parallel: 8,
            program: Path::new("/opt/attn2d"),
            config: Path::new("/data/my study.toml"),
            folder: Path::new("/data/out"),
            start: Path::new("/home/me"),
            words,
        }
    }

    #[test]
    fn an_array_of_slurm() {
        let words = ["--set".to_owned(), "seeds=3".into()];
        let text = slurm(&job(&words));
        assert!(text.starts_with("#!/bin/bash\n"));
        for line in [
            "#SBATCH --job-name=attn2d-ISIC-2017--small",
            "#SBATCH --array=0-39%8",
            "cd /home/me",
            "for index in $(seq \"$SLURM_ARRAY_TASK_ID\" 40 39); do",
            "    /opt/attn2d study '/data/my study.toml' --output /data/out --set seeds=3 --index \"$index\"",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
        assert_eq!(shell("it's"), "'it'\\''s'");
        let long = slurm(&Job { tasks: 2548, ..job(&[]) });
        assert!(long.contains("--array=0-999%8"), "{long}");
        assert!(long.contains("seq \"$SLURM_ARRAY_TASK_ID\" 1000 2547"), "{long}");
        assert_eq!(
            [label("ÄÖ"), label(".."), label(&"x".repeat(90))],
            ["study".into(), "study".into(), "x".repeat(40)]
        );
    }

    #[test]
    fn an_indexed_job_of_kubernetes() {
        let text = kubernetes(&job(&[]), "registry/attn2d:1", "claim");
        for line in [
            "  completions: 40",
            "  parallelism: 8",
            "  completionMode: Indexed",
            "            - \"/data/my study.toml\"",
            "            - \"$(JOB_COMPLETION_INDEX)\"",
            "            claimName: \"claim\"",
            "  name: attn2d-isic-2017--small",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
    }
}
