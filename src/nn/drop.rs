//! Layers that leave things out at random in training.

use super::{Mode, Module, Slot};
use crate::error::Result;
use crate::ops;
use crate::tensor::Tensor;

/// Dropout: in training, elements are set to zero with probability `p` and the others divided by `1 - p`.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    p: f32,
    op: u32,
}

impl Dropout {
    /// Drops with probability `p`, drawing from stream `op` of each step: every random layer of a model has its own.
    pub const fn new(p: f32, op: u32) -> Self {
        Self { p, op }
    }
}

impl Module for Dropout {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        if mode.training && self.p > 0.0 {
            ops::dropout(x, self.p, mode.random(self.op))
        } else {
            Ok(x.clone())
        }
    }

    fn visit(&mut self, _: &str, _: &mut dyn FnMut(Slot<'_>)) {}
}

/// Stochastic depth (Huang et al. 2016): in training a residual branch is left out with probability `p`, for each image by
/// itself, and else divided by `1 - p`.
#[derive(Clone, Copy, Debug)]
pub struct StochasticDepth {
    p: f32,
    op: u32,
}

impl StochasticDepth {
    /// Leaves out with probability `p`, drawing from stream `op` of each step.
    pub const fn new(p: f32, op: u32) -> Self {
        Self { p, op }
    }

    /// Whether it ever leaves anything out.
    pub fn acts(&self, mode: &Mode) -> bool {
        mode.training && self.p > 0.0
    }

    /// `shortcut + branch`, or in training what is left of it.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] where the two differ.
    pub fn add(&self, branch: &Tensor, shortcut: &Tensor, mode: &Mode) -> Result<Tensor> {
        let p = if self.acts(mode) { self.p } else { 0.0 };
        ops::stochastic_depth(branch, shortcut, p, mode.random(self.op))
    }
}
