//! What can be computed. One file an op: parameters, the one place where shapes are checked, forward, backward, and the
//! cases that parity tests, gradient checks, benchmarks and `attn2d verify` all walk.

pub(crate) mod attention;
pub(crate) mod attention_block;
pub(crate) mod attention_rows;
pub(crate) mod avg_pool2d;
pub(crate) mod batch_norm;
pub mod case;
pub(crate) mod cast;
pub(crate) mod clip_grad_norm;
mod columns;
pub(crate) mod conv2d;
mod conv_block;
pub(crate) mod cross_entropy;
mod depthwise;
pub(crate) mod dropout;
pub(crate) mod elementwise;
pub(crate) mod ema_step;
pub(crate) mod global_attention;
pub(crate) mod global_avg_pool;
mod grouped;
pub(crate) mod layer_norm;
pub(crate) mod lesa;
mod linear;
pub(crate) mod local_attention;
pub(crate) mod max_pool2d;
pub(crate) mod optim_step;
pub(crate) mod reduce;
pub(crate) mod softmax;
pub(crate) mod split_rows;
pub(crate) mod squeeze_excite;
pub(crate) mod stochastic_depth;
pub(crate) mod tensor_cores;
pub(crate) mod tokens;

pub use attention_block::{AttentionBlock, attention_block};
pub use avg_pool2d::{AvgPool2d, avg_pool2d};
pub use batch_norm::{Activation, BatchNorm, batch_norm};
pub use cast::cast;
pub use clip_grad_norm::{ClipGradNorm, clip_grad_norm};
pub use conv_block::{ConvBlock, ConvBlockNorm, conv_block};
pub use conv2d::{Conv2d, conv2d};
pub use cross_entropy::{CrossEntropy, class_labels, cross_entropy};
pub use dropout::dropout;
pub use elementwise::{add, add_bias, gelu, mul, relu, sigmoid, silu};
pub use ema_step::ema_step;
pub use global_attention::{GlobalAttention, global_attention};
pub use global_avg_pool::global_avg_pool;
pub use layer_norm::{LayerNorm, layer_norm};
pub use lesa::{MAX_PIXELS as LESA_MAX_PIXELS, lesa_context, lesa_logits};
pub use linear::linear;
pub use local_attention::{Border, LocalAttention, MAX_WINDOW, local_attention};
pub use max_pool2d::{MaxPool2d, max_pool2d};
pub use optim_step::{AdamW, Guide, Sgd, adamw_step, sgd_step};
pub use softmax::softmax;
pub use split_rows::split_rows;
pub use squeeze_excite::squeeze_excite;
pub use stochastic_depth::stochastic_depth;
pub use tokens::{embed_tokens, first_token};

use case::OpSpec;

/// Every op that has conformance cases.
pub fn specs() -> Vec<&'static OpSpec> {
    vec![
        &cast::SPEC,
        &tensor_cores::SPEC,
        &elementwise::RELU,
        &elementwise::SIGMOID,
        &elementwise::SILU,
        &elementwise::GELU,
        &elementwise::ADD,
        &elementwise::MUL,
        &elementwise::ADD_BIAS,
        &conv2d::SPEC,
        &linear::LINEAR,
        &global_attention::SPEC,
        &local_attention::SPEC,
        &attention_block::SPEC,
        &lesa::LOGITS,
        &lesa::CONTEXT,
        &batch_norm::SPEC,
        &conv_block::SPEC,
        &layer_norm::SPEC,
        &max_pool2d::SPEC,
        &avg_pool2d::SPEC,
        &global_avg_pool::SPEC,
        &squeeze_excite::SPEC,
        &tokens::EMBED,
        &tokens::FIRST,
        &split_rows::SPEC,
        &softmax::SPEC,
        &cross_entropy::SPEC,
        &dropout::SPEC,
        &stochastic_depth::SPEC,
        &optim_step::SGD_SPEC,
        &optim_step::ADAMW_SPEC,
        &clip_grad_norm::SPEC,
        &ema_step::SPEC,
    ]
}
