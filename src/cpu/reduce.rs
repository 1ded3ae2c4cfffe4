//! CPU kernel of [`crate::ops::reduce`].

use super::rows;
use crate::kernel::CpuArgs;
use crate::ops::reduce::SumRowsParams;

/// Sums over blocks of rows: `x [rows, C] -> sum [blocks, C]`.
pub(crate) fn sum_rows_fwd(a: &CpuArgs<'_>) {
    let p: SumRowsParams = a.params();
    rows::sum_blocks(a.f32(0), p.channels as usize, p.rows_per_block as usize, a.f32_mut(1));
}
