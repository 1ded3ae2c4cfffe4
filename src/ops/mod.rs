//! What can be computed. One file an op: parameters, the one place where shapes are checked, forward, backward, and the
//! cases that parity tests, gradient checks, benchmarks and `attn2d verify` all walk.

pub mod case;
pub(crate) mod conv2d;
mod elementwise;
pub(crate) mod global_attention;
mod linear;

pub use conv2d::{Conv2d, conv2d};
pub use elementwise::{add, relu};
pub use global_attention::{GlobalAttention, global_attention};
pub use linear::linear;

use case::OpSpec;

/// Every op that has conformance cases.
pub fn specs() -> Vec<&'static OpSpec> {
    vec![&elementwise::RELU, &conv2d::CONV2D, &linear::LINEAR, &global_attention::SPEC]
}
