//! `attn2d data`: what is in a data set.

use clap::{Args, Subcommand};

use crate::Result;
use crate::config::Config;
use crate::train::{Progress, images};

/// Look at a data set
#[derive(Debug, Subcommand)]
pub enum Options {
    /// Show format, classes, parts, sizes, duplicates and caveats of a data set
    Info(Info),
}

/// Which data set.
#[derive(Debug, Args)]
pub struct Info {
    /// Folder or file of images, or synthetic:dermoscopy, synthetic:longrange
    #[arg(value_name = "PATH", required_unless_present = "data")]
    path: Option<String>,
    /// The same, spelled as for `train`
    #[arg(long, visible_alias = "data-dir", value_name = "PATH", conflicts_with = "path")]
    data: Option<String>,
    /// The reader, where it cannot be recognised
    #[arg(long, value_name = "NAME")]
    data_format: Option<String>,
    /// Show the parts as they are with this domain (hospital, camera, archive; several between commas) held out for the test
    #[arg(long, value_name = "NAME")]
    holdout_domain: Option<String>,
    /// Leave out images that cannot be read, and count them
    #[arg(long)]
    skip_bad: bool,
}

/// Looks.
///
/// # Errors
/// Those of opening, splitting and reading the data set.
pub fn data(options: &Options) -> Result<()> {
    let Options::Info(info) = options;
    let mut config = Config::default();
    if let Some(path) = info.path.as_ref().or(info.data.as_ref()) {
        config.data.path.clone_from(path);
    }
    config.data.skip_bad = info.skip_bad;
    if let Some(format) = &info.data_format {
        config.data.format.clone_from(format);
    }
    if let Some(domain) = &info.holdout_domain {
        config.data.holdout_domain.clone_from(domain);
    }
    let dataset = images::open(&config)?;
    let split = images::split(&config, &dataset)?;
    Progress::Lines.line(crate::data::info(&dataset, &split)?.trim_end());
    Ok(())
}
