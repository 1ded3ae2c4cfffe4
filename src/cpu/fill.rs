//! CPU kernel of [`crate::Tensor::full`].

use super::rows;
use crate::kernel::CpuArgs;
use crate::tensor::FillParams;

/// `y = value`.
pub(crate) fn fill(a: &CpuArgs<'_>) {
    let p: FillParams = a.params();
    let slab = rows::slab_len(1);
    rows::each!(a.f32_mut(0), slab, p.len as usize, |_i, y| y.fill(p.value));
}
