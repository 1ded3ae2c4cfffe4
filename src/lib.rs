//! Fused 2D self-attention and convolution kernels for CNNs, forward and backward.

pub(crate) mod cpu;
pub mod error;
pub use error::{Error, Result};
