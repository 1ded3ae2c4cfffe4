//! CPU kernels of [`crate::ops::stochastic_depth`].

use super::rows;
use crate::kernel::CpuArgs;
use crate::ops::stochastic_depth::StochasticDepthParams;
use crate::tensor::philox::Philox;

/// Calls `work(start, end, keep)` for the runs of elements of one image that make up `start..end`.
#[inline(always)]
fn images(
    p: &StochasticDepthParams,
    start: usize,
    end: usize,
    mut work: impl FnMut(usize, usize, bool),
) {
    let seed = u64::from(p.seed_low) | u64::from(p.seed_high) << 32;
    let random = Philox { seed, step: p.step, op: p.op };
    let sample = p.sample as usize;
    let mut at = start;
    while at < end {
        let image = at / sample;
        let stop = ((image + 1) * sample).min(end);
        work(at, stop, random.word(image as u64) >= p.threshold);
        at = stop;
    }
}

/// `y = shortcut + branch * scale` where the image keeps its branch, else `y = shortcut`.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    let p: StochasticDepthParams = a.params();
    let (branch, shortcut, slab) = (a.f32(0), a.f32(1), rows::slab_len(1));
    rows::each!(a.f32_mut(2), slab, branch.len(), |number, y| {
        let first = number * slab;
        images(&p, first, first + y.len(), |from, to, keep| {
            let y = &mut y[from - first..to - first];
            if !keep {
                y.copy_from_slice(&shortcut[from..to]);
                return;
            }
            for ((y, &b), &s) in y.iter_mut().zip(&branch[from..to]).zip(&shortcut[from..to]) {
                *y = b.mul_add(p.scale, s);
            }
        });
    });
}

/// `dbranch = dy * scale` where the image keeps its branch, else 0.
pub(crate) fn bwd(a: &CpuArgs<'_>) {
    let p: StochasticDepthParams = a.params();
    let (dy, slab) = (a.f32(0), rows::slab_len(1));
    rows::each!(a.f32_mut(1), slab, dy.len(), |number, dx| {
        let first = number * slab;
        images(&p, first, first + dx.len(), |from, to, keep| {
            let dx = &mut dx[from - first..to - first];
            if !keep {
                dx.fill(0.0);
                return;
            }
            dx.iter_mut().zip(&dy[from..to]).for_each(|(dx, &dy)| *dx = dy * p.scale);
        });
    });
}
