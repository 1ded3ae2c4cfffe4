//! CPU kernel of [`crate::ops::ema_step`].

use super::rows;
use crate::kernel::CpuArgs;
use crate::ops::ema_step::EmaParams;

/// `value, average -> average`, in place.
pub(crate) fn step(a: &CpuArgs<'_>) {
    let p: EmaParams = a.params();
    let (value, slab) = (a.f32(0), rows::slab_len(1));
    rows::each!(a.f32_mut(1), slab, value.len(), |number, average| {
        for (average, value) in average.iter_mut().zip(&value[number * slab..]) {
            *average = p.rest.mul_add(value - *average, *average);
        }
    });
}
