//! CPU kernels: one file per op, plain functions over slices, and the few tools they share ([`gemm`], [`simd`]).

pub(crate) mod gemm;
pub(crate) mod simd;
