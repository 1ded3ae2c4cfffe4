//! CPU kernels of [`crate::ops::split_rows`].

use super::rows;
use crate::kernel::CpuArgs;
use crate::ops::split_rows::SplitRowsParams;

/// `w -> block` number `p.number`.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    let p: SplitRowsParams = a.params();
    let block = p.block as usize;
    a.f32_mut(1).copy_from_slice(&a.f32(0)[p.number as usize * block..][..block]);
}

/// `d0 .. d6 -> dw`: the first `p.number`, one after the other; zeros where none is given.
pub(crate) fn bwd(a: &CpuArgs<'_>) {
    let p: SplitRowsParams = a.params();
    let parts: [&[f32]; 7] = std::array::from_fn(|i| a.f32(i));
    let dw = a.f32_mut(7);
    let size = dw.len();
    rows::each!(dw, p.block as usize, size, |i, dw| match p.given >> i & 1 {
        0 => dw.fill(0.0),
        _ => dw.copy_from_slice(parts[i]),
    });
}
