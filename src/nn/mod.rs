//! Modules: layers that own named parameters. The names are torchvision's, so a module's parameters are a state dict
//! that PyTorch reads, and PyTorch's is one that we read.
//!
//! A model is built from modules, then [`Parameters::flatten`] moves all that they own into flat buffers. From there on
//! the modules compute and the [`Parameters`] hold: values, gradients, running statistics, and everything by name.

mod appended;
mod attention;
mod attention_bottleneck;
mod conv;
mod conv_norm;
mod describe;
mod drop;
mod init;
mod layer_norm;
mod lesa;
mod linear;
mod nonlocal;
mod norm;
mod parameters;
mod squeeze_excite;
mod state;
mod token_attention;

pub use appended::Appended;
pub use attention::{Attention, AttentionConfig, Reach, Tables};
pub use attention_bottleneck::AttentionBottleneck;
pub use conv::Conv;
pub use conv_norm::ConvNorm;
pub use describe::Layer;
pub(crate) use describe::product;
pub use drop::{Dropout, StochasticDepth};
pub use init::Init;
pub use layer_norm::LayerNorm;
pub use lesa::{Lesa, LesaConfig};
pub use linear::Linear;
pub use nonlocal::NonLocal;
pub use norm::{BatchNorm, conv_norm};
pub use parameters::{Differences, Parameters, Reshaped};
pub use squeeze_excite::SqueezeExcite;
pub use state::{Data, StateArray, StateDict};
pub use token_attention::TokenAttention;

use crate::error::Result;
use crate::ops::case::Layout;
use crate::tensor::Tensor;
use crate::tensor::philox::Philox;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Something that maps a tensor to a tensor and owns named parameters.
pub trait Module: Send + Sync {
    /// The output for input `x`. In training, batch norms update their running statistics in place.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] where `x` does not fit, [`crate::Error::Device`] where the device refuses.
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor>;

    /// Calls `f` on everything the module owns, in a fixed order. Names begin with `prefix` and a dot, or have no
    /// prefix where it is empty.
    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>));

    /// Adds its layers to `rows`, in the order of the data, for an input of shape `input` (of one image: H, W, C of a map, T, C of
    /// tokens, or C), and returns its output's shape. Names begin with `prefix`, as in [`Module::visit`]. A module that does not say
    /// adds none and keeps the shape.
    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let _ = (prefix, rows);
        input.to_vec()
    }
}

/// What a forward pass is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Training (batch statistics, dropout) or evaluation (running statistics).
    pub training: bool,
    /// The run's seed, for layers that draw random numbers.
    pub seed: u64,
    /// The optimiser step, from 1: step 0 is initialisation's.
    pub step: u32,
}

impl Mode {
    /// Evaluation.
    pub const EVAL: Self = Self { training: false, seed: 0, step: 0 };

    /// Training step `step` (from 1) of the run with this seed.
    pub const fn train(seed: u64, step: u32) -> Self {
        Self { training: true, seed, step }
    }

    /// The random numbers of one layer in this step; `op` tells layers apart.
    pub const fn random(&self, op: u32) -> Philox {
        Philox { seed: self.seed, step: self.step, op }
    }
}

/// One thing that a module owns, as [`Module::visit`] shows it.
pub struct Slot<'a> {
    /// Its full name: `layer4.1.bn2.weight`.
    pub name: String,
    /// What it is.
    pub value: Value<'a>,
}

/// What a module can own.
pub enum Value<'a> {
    /// A tensor that is learned.
    Parameter {
        /// Its present home; [`Parameters::flatten`] gives it another.
        tensor: &'a mut Tensor,
        /// How it lies in files.
        layout: Layout,
        /// Whether weight decay applies: to weights of convolutions and linear layers and to position tables, not to
        /// biases, norms and a transformer's class token and position embeddings.
        decay: bool,
    },
    /// A tensor that is kept but not learned: running statistics.
    Buffer(&'a mut Tensor),
    /// A count: a batch norm's `num_batches_tracked`.
    Counter(&'a mut Counter),
}

/// A count that a module and the [`Parameters`] share, and whether what it counts for is frozen.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<(AtomicU64, AtomicBool)>);

impl Counter {
    /// The count.
    pub fn get(&self) -> u64 {
        self.0.0.load(Ordering::Relaxed)
    }

    /// Sets the count.
    pub fn set(&self, count: u64) {
        self.0.0.store(count, Ordering::Relaxed);
    }

    /// Counts one more.
    pub fn increment(&self) {
        self.0.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the norm that this is the count of stays in evaluation mode ([`Parameters::freeze`]).
    pub fn is_frozen(&self) -> bool {
        self.0.1.load(Ordering::Relaxed)
    }

    fn freeze(&self) {
        self.0.1.store(true, Ordering::Relaxed);
    }
}

/// `prefix.name`, or `name` under an empty prefix.
pub fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.into() } else { format!("{prefix}.{name}") }
}

/// Shows a parameter to a visitor.
pub(crate) fn parameter(
    f: &mut dyn FnMut(Slot<'_>),
    prefix: &str,
    name: &str,
    tensor: &mut Tensor,
    layout: Layout,
    decay: bool,
) {
    f(Slot { name: join(prefix, name), value: Value::Parameter { tensor, layout, decay } });
}
