//! Multiply-adds in registers, for the ceiling that [`crate::bench`] measures.

use super::lanes::{F32x8, LANES};
use super::simd::vectorise;
use crate::bench::PeakParams;
use crate::kernel::CpuArgs;
use rayon::prelude::*;

/// Vectors at once: two units of latency four want eight at least, and 16 registers hold 12 beside the constants.
const VECTORS: usize = 12;

/// `y[i] = i`, then `rounds` times `a y[i] + b`.
pub(crate) fn fma(args: &CpuArgs<'_>) {
    let p: PeakParams = args.params();
    let block = VECTORS * LANES;
    args.f32_mut(0).par_chunks_mut(block).enumerate().for_each(|(chunk, y)| {
        let mut v = [F32x8::ZERO; VECTORS];
        for (i, x) in bytemuck::cast_slice_mut::<F32x8, f32>(&mut v).iter_mut().enumerate() {
            *x = (chunk * block + i) as f32;
        }
        vectorise!(|| {
            let (a, b) = (F32x8::splat(p.a), F32x8::splat(p.b));
            let mut w = v;
            for _ in 0..p.rounds {
                for x in &mut w {
                    *x = x.mul_add(a, b);
                }
            }
            v = w;
        });
        y.copy_from_slice(&bytemuck::cast_slice::<F32x8, f32>(&v)[..y.len()]);
    });
}
