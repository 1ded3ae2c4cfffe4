//! The plain loops that [`crate::ops::tensor_cores`] is compared with.

use crate::kernel::CpuArgs;

/// product = a b, a with its rows moved down by one, and 2^b.
pub(crate) fn each(args: &CpuArgs<'_>) {
    let (a, b, product, shifted) = (args.f32(0), args.f32(1), args.f32_mut(2), args.f32_mut(3));
    for (i, sum) in product.iter_mut().enumerate() {
        *sum = (0..16).map(|k| a[i / 8 * 16 + k] * b[k * 8 + i % 8]).sum();
    }
    shifted[..16].fill(0.0);
    shifted[16..].copy_from_slice(&a[..15 * 16]);
    args.f32_mut(4).iter_mut().zip(b).for_each(|(power, x)| *power = x.exp2());
}
