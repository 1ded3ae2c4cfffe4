//! CPU kernel of [`crate::ops::dropout`].

use super::rows;
use crate::kernel::CpuArgs;
use crate::ops::dropout::DropoutParams;
use crate::tensor::philox::philox4x32_10;

/// `y[i] = x[i] * scale` where the random word of element i reaches the threshold, else 0. The backward is the same.
pub(crate) fn apply(a: &CpuArgs<'_>) {
    let p: DropoutParams = a.params();
    let x = a.f32(0);
    let slab = rows::slab_len(4);
    rows::each!(a.f32_mut(1), slab, x.len(), |number, y| {
        let start = number * slab;
        for (block, (y, x)) in y.chunks_mut(4).zip(x[start..].chunks(4)).enumerate() {
            let counter = [(start / 4 + block) as u32, 0, p.step, p.op];
            let words = philox4x32_10([p.seed_low, p.seed_high], counter);
            for ((y, &x), word) in y.iter_mut().zip(x).zip(words) {
                *y = if word >= p.threshold { x * p.scale } else { 0.0 };
            }
        }
    });
}
