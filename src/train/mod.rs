//! Training and evaluation: everything between data and a finished run directory.

pub mod checkpoint;
pub mod events;
pub mod log;
pub mod metrics;
pub mod plots;
pub mod schedule;
