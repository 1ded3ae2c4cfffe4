//! How the CUDA kernels cut `[rows, channels]` in half precision; `column_plan` of `reduce.rs` does it for f32. A thread's access
//! is 16 bytes there and here, so it has twice as many elements here.

use crate::kernel::CudaPlan;

/// Elements of a 16-bit type that a thread moves by one access.
pub(crate) const HALF_WIDE: u32 = 8;

/// `chunks` of channels along x and `rows` along y, as `kernels/columns.cuh` cuts them.
pub(crate) fn half_column_plan(channels: u32, rows: u32) -> CudaPlan {
    CudaPlan::grid([half_column_chunks(channels), rows, 1], 256)
}

/// Blocks along the channels: each has a power of two of threads, at most 32, with 8 channels each where 8 divides them, else 4
/// or 1.
pub(crate) fn half_column_chunks(channels: u32) -> u32 {
    let width = [HALF_WIDE, 4].into_iter().find(|n| channels.is_multiple_of(*n)).unwrap_or(1);
    let packs = channels / width;
    packs.div_ceil(packs.next_power_of_two().min(32))
}
