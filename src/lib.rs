//! Fused 2D self-attention and convolution kernels for CNNs, forward and backward.

pub mod error;
pub use error::{Error, Result};
