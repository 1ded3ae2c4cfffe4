//! CPU kernels, one file per op: plain functions over slices, the adaptors that a [`crate::kernel::Kernel`] names, and the
//! few tools they share ([`gemm`], [`simd`], [`threads`]).
//!
//! Results do not depend on the number of threads: work is cut into the same pieces whoever does them, and sums are
//! taken in a fixed order.

pub(crate) mod attention_block;
pub(crate) mod attention_rows;
pub(crate) mod avg_pool2d;
pub(crate) mod batch_norm;
pub(crate) mod cast;
pub(crate) mod clip_grad_norm;
pub(crate) mod conv2d;
pub(crate) mod cross_entropy;
pub(crate) mod depthwise;
pub(crate) mod dropout;
pub(crate) mod elementwise;
pub(crate) mod ema_step;
pub(crate) mod fill;
pub(crate) mod gemm;
pub(crate) mod global_attention;
pub(crate) mod global_avg_pool;
pub(crate) mod grouped;
pub(crate) mod lanes;
pub(crate) mod layer_norm;
pub(crate) mod lesa;
pub(crate) mod local_attention;
pub(crate) mod max_pool2d;
pub(crate) mod optim_step;
pub(crate) mod pack;
pub(crate) mod peak;
pub(crate) mod reduce;
pub(crate) mod rows;
pub(crate) mod simd;
pub(crate) mod softmax;
pub(crate) mod split_rows;
pub(crate) mod squeeze_excite;
pub(crate) mod stochastic_depth;
pub(crate) mod tensor_cores;
pub(crate) mod threads;
pub(crate) mod tokens;
pub(crate) mod vmath;
