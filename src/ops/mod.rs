//! What can be computed. One file an op: parameters, the one place where shapes are checked, forward, backward, and the
//! cases that parity tests, gradient checks, benchmarks and `attn2d verify` all walk.

pub mod case;
mod elementwise;

pub use elementwise::{add, relu};

use case::OpSpec;

/// Every op that has conformance cases.
pub fn specs() -> Vec<&'static OpSpec> {
    vec![&elementwise::RELU]
}
