//! Elementwise kernels: one pass, memory-bound.

use super::simd::fast;
use crate::kernel::CpuArgs;
use rayon::prelude::*;

/// Elements a thread takes at a time: large enough to pay for the hand-over, small enough to share out.
const CHUNK: usize = 16 * 1024;

/// y = a + b.
pub(crate) fn add_fwd(args: &CpuArgs<'_>) {
    zip2(args.f32(0), args.f32(1), args.f32_mut(2), |a, b| a + b);
}

/// y = max(x, 0); NaN stays NaN.
pub(crate) fn relu_fwd(args: &CpuArgs<'_>) {
    map(args.f32(0), args.f32_mut(1), |x| if x < 0.0 { 0.0 } else { x });
}

/// dx = dy where y > 0, else 0.
pub(crate) fn relu_bwd(args: &CpuArgs<'_>) {
    zip2(args.f32(0), args.f32(1), args.f32_mut(2), |y, dy| if y > 0.0 { dy } else { 0.0 });
}

fn map(x: &[f32], y: &mut [f32], f: impl Fn(f32) -> f32 + Sync) {
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
        fast(|| y.iter_mut().zip(x).for_each(|(y, x)| *y = f(*x)));
    });
}

fn zip2(a: &[f32], b: &[f32], y: &mut [f32], f: impl Fn(f32, f32) -> f32 + Sync) {
    y.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK))).for_each(
        |(y, (a, b))| {
            fast(|| y.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (a, b))| *y = f(*a, *b)));
        },
    );
}
