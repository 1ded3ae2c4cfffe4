//! Fused 2D self-attention and convolution kernels for CNNs, forward and backward.

mod backend;
pub mod cli;
pub mod config;
mod cpu;
pub mod data;
pub mod error;
pub mod io;
pub mod kernel;
pub mod models;
pub mod nn;
pub mod ops;
pub mod tape;
pub mod tensor;
pub mod train;
pub mod verify;

pub use backend::{Caps, Device, DeviceReport, KernelTime, MemoryStats, device_reports};
pub use error::{Error, Result};
pub use tensor::{DType, Tensor};
