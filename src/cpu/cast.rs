//! CPU kernels of [`crate::ops::cast`].

use crate::kernel::CpuArgs;

/// The conversion is the device's: numbers in half precision are widened before, and rounded after.
pub(crate) fn copy(a: &CpuArgs<'_>) {
    a.f32_mut(1).copy_from_slice(a.f32(0));
}
