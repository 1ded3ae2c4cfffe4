//! CPU kernels of [`crate::ops::global_avg_pool`].

use super::rows;
use crate::kernel::CpuArgs;
use crate::ops::global_avg_pool::GlobalAvgPoolParams;

/// Rows summed in f32 before they join the total: keeps long sums accurate.
const BLOCK: usize = 256;

/// `y[n, c] = mean over the pixels of x[n, pixel, c]`.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    let p: GlobalAvgPoolParams = a.params();
    let (x, c, pixels) = (a.f32(0), p.channels as usize, p.pixels as usize);
    rows::each!(a.f32_mut(1), c, x.len(), |n, y| {
        let mut block = vec![0.0f32; c];
        y.fill(0.0);
        for x in x[n * pixels * c..][..pixels * c].chunks(BLOCK * c) {
            block.fill(0.0);
            rows::fold(x, &mut block, |sum, x, _| *sum += x);
            y.iter_mut().zip(&block).for_each(|(y, &b)| *y += b);
        }
        let scale = 1.0 / pixels as f32;
        y.iter_mut().for_each(|y| *y *= scale);
    });
}

/// `dx[n, pixel, c] = dy[n, c] / pixels`.
pub(crate) fn bwd(a: &CpuArgs<'_>) {
    let p: GlobalAvgPoolParams = a.params();
    let (dy, c, pixels) = (a.f32(0), p.channels as usize, p.pixels as usize);
    let dx = a.f32_mut(1);
    let (scale, size) = (1.0 / pixels as f32, dx.len());
    rows::each!(dx, pixels * c, size, |n, dx| {
        let dy = &dy[n * c..][..c];
        for dx in dx.chunks_exact_mut(c) {
            dx.iter_mut().zip(dy).for_each(|(dx, &dy)| *dx = dy * scale);
        }
    });
}
