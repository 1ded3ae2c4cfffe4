//! Does attention help on these images? A study searches each model's settings with the same budget, trains the winner with many fresh
//! seeds, and says what the difference is and how sure one may be of it.
//!
//! A study is a file ([`Study`]) and a folder ([`Folder`]). From the file follows a plan ([`plan`]) of trials, each a run directory of
//! [`crate::train`] under the hash of its settings. Workers ([`work`]) take trials that nobody else works on and run each in a process of its
//! own, until none is left; what they leave is gathered ([`gather`]) into [`Results`], compared
//! ([`compare`]) and reported ([`report`]). Nothing but the trials' own files says how far a study
//! is, so it may be killed at any time, go on anywhere, and be worked on by any number of processes that see the folder.

pub mod answers;
pub mod compare;
pub mod config;
mod edit;
pub mod engines;
pub mod folder;
pub mod gather;
pub mod optuna;
pub mod parts;
pub mod plan;
pub mod report;
pub mod results;
pub mod run;
pub mod space;
pub mod verdict;
pub mod work;

pub use config::Study;
pub use folder::Folder;
pub use results::Results;
pub use work::{Work, Worked};

#[cfg(test)]
mod compare_tests;
#[cfg(test)]
mod config_tests;
#[cfg(test)]
mod example_tests;
