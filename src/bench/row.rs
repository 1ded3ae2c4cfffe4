//! What is timed: a row is a name and a description that is data, so that programs of other languages can time the same.

use super::work::{Work, work};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fmt;

/// How many rows, and of which size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Size {
    /// A few rows that take milliseconds: to see that everything runs, also on an emulated device.
    Tiny,
    /// Batches of 8, for CPUs.
    #[default]
    Small,
    /// Batches that fill a large GPU.
    Large,
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tiny => "tiny",
            Self::Small => "small",
            Self::Large => "large",
        })
    }
}

/// Learned positions of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Position {
    /// None.
    None,
    /// Tables of row and column offsets, multiplied with the query.
    Rel,
    /// A number for each head and offset, added to the logit (Swin's).
    Bias,
}

/// What a local window sees outside the map, as [`crate::ops::Border`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outside {
    /// Nothing.
    Mask,
    /// Zeros.
    Zero,
}

/// What a row runs. Maps are square, `n` counts images; everything is NHWC.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Subject {
    /// A convolution without bias, padded by `kernel / 2`. With 3 channels it is a stem, whose input wants no gradient.
    Conv2d {
        /// Images.
        n: usize,
        /// Height and width.
        size: usize,
        /// Channels.
        channels: usize,
        /// Channels of the output.
        out: usize,
        /// Height and width of the kernel.
        kernel: usize,
        /// Pixels from one output to the next.
        stride: usize,
    },
    /// A convolution with a kernel for each channel, without bias, padded by `kernel / 2`.
    Depthwise {
        /// Images.
        n: usize,
        /// Height and width.
        size: usize,
        /// Channels.
        channels: usize,
        /// Height and width of the kernel.
        kernel: usize,
        /// Pixels from one output to the next.
        stride: usize,
    },
    /// Squeeze and excitation.
    SqueezeExcite {
        /// Images.
        n: usize,
        /// Height and width.
        size: usize,
        /// Channels.
        channels: usize,
        /// Numbers between its two layers.
        squeezed: usize,
    },
    /// A linear layer without bias.
    Linear {
        /// Rows of x.
        rows: usize,
        /// Columns of x.
        inputs: usize,
        /// Columns of the output.
        outputs: usize,
    },
    /// Batch norm in training with ReLU, with or without a residual.
    BatchNorm {
        /// Images.
        n: usize,
        /// Height and width.
        size: usize,
        /// Channels.
        channels: usize,
        /// Whether a residual is added before the ReLU.
        residual: bool,
    },
    /// Max pooling, 3x3 at step 2.
    MaxPool2d {
        /// Images.
        n: usize,
        /// Height and width.
        size: usize,
        /// Channels.
        channels: usize,
    },
    /// Every place sees every place.
    GlobalAttention {
        /// Images.
        n: usize,
        /// Height and width.
        size: usize,
        /// Heads.
        heads: usize,
        /// Channels of a head.
        d: usize,
        /// Learned positions.
        position: Position,
    },
    /// Every place sees a window.
    LocalAttention {
        /// Images.
        n: usize,
        /// Height and width.
        size: usize,
        /// Heads.
        heads: usize,
        /// Channels of a head.
        d: usize,
        /// Height and width of the window.
        window: usize,
        /// What a window sees outside the map.
        border: Outside,
        /// Learned positions.
        position: Position,
    },
    /// Projections, attention of every place with relative positions, output projection and residual, all as wide as x.
    AttentionBlock {
        /// Images.
        n: usize,
        /// Height and width.
        size: usize,
        /// Heads.
        heads: usize,
        /// Channels of a head.
        d: usize,
    },
    /// One AdamW step over flat f32 buffers: there is no backward.
    Adamw {
        /// Parameters.
        len: usize,
    },
    /// A training step of a model at 1000 classes: forward, cross entropy, backward, SGD with momentum.
    Step {
        /// Model string.
        model: String,
        /// Height and width.
        size: usize,
        /// Images.
        n: usize,
    },
}

/// Where a row stands among the others of its suite, for tables and charts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Place {
    /// Nowhere in particular.
    #[default]
    Alone,
    /// One of several that give an output of the same shape, at a stage of a net.
    Stage {
        /// The net.
        net: String,
        /// Channels x map.
        shape: String,
        /// What gives that output.
        unit: String,
    },
    /// A point of a line over one size.
    Line {
        /// Which line.
        line: String,
        /// The size.
        against: String,
        /// Its value here.
        x: f64,
        /// The exponents of x that the arithmetic has: of time, and of memory.
        expected: (f64, f64),
    },
}

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Bench id: the same in criterion's benches, in `attn2d bench` and for every peer.
    pub name: String,
    /// The suite that it belongs to.
    pub suite: String,
    /// Where it stands among the others of its suite.
    #[serde(default)]
    pub place: Place,
    /// What it runs.
    pub subject: Subject,
}

impl Row {
    /// What the row has to do at least, with elements of `bytes` bytes.
    pub fn work(&self, bytes: usize) -> Work {
        work(&self.subject, bytes)
    }

    /// The row for other programs: name, suite, place, `op` and its sizes, FLOP and least bytes at `bytes` an element.
    pub fn json(&self, bytes: usize) -> Value {
        let mut json = json!(self);
        json["work"] = json!(self.work(bytes));
        json
    }
}
