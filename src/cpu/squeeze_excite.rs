//! CPU kernels of [`crate::ops::squeeze_excite`].

use super::elementwise::{silu, silu_slope};
use super::rows;
use super::simd::vectorise;
use super::vmath::sigmoid;
use crate::kernel::CpuArgs;
use crate::ops::squeeze_excite::SqueezeExciteParams;
use rayon::prelude::*;

/// The pixels of block `number`, as a range of elements of x.
fn block(p: &SqueezeExciteParams, number: usize) -> std::ops::Range<usize> {
    let [pixels, c, blocks, len] =
        [p.pixels, p.channels, p.blocks, p.pixels_per_block].map(|v| v as usize);
    let (image, first) = (number / blocks * pixels, number % blocks * len);
    (image + first) * c..(image + (first + len).min(pixels)) * c
}

/// Sums of x over each block of pixels: `x -> part [N, blocks, C]`.
pub(crate) fn sums(a: &CpuArgs<'_>) {
    let p: SqueezeExciteParams = a.params();
    let x = a.f32(0);
    rows::each!(a.f32_mut(1), p.channels as usize, x.len(), |number, part| {
        part.fill(0.0);
        rows::fold(&x[block(&p, number)], part, |sum, x, _| *sum += x);
    });
}

/// Sums of dy * x over each block of pixels: `x, dy -> part [N, blocks, C]`.
pub(crate) fn bwd_sums(a: &CpuArgs<'_>) {
    let p: SqueezeExciteParams = a.params();
    let (x, dy, c) = (a.f32(0), a.f32(1), p.channels as usize);
    rows::each!(a.f32_mut(2), c, x.len(), |number, part| {
        let part = &mut part[..c];
        part.fill(0.0);
        let here = block(&p, number);
        let (mut x, mut dy) = (x[here.clone()].chunks_exact(2 * c), dy[here].chunks_exact(2 * c));
        // Two pixels at a time, so that the sums pass through the cache half as often.
        for (x, dy) in (&mut x).zip(&mut dy) {
            let ((x0, x1), (dy0, dy1)) = (x.split_at(c), dy.split_at(c));
            for i in 0..c {
                part[i] = x1[i].mul_add(dy1[i], x0[i].mul_add(dy0[i], part[i]));
            }
        }
        for (sum, (x, dy)) in part.iter_mut().zip(x.remainder().iter().zip(dy.remainder())) {
            *sum = x.mul_add(*dy, *sum);
        }
    });
}

/// The sums of an image's blocks: `part [blocks, C] -> total [C]`.
#[inline(always)]
fn total(part: &[f32], total: &mut [f32]) {
    total.fill(0.0);
    rows::fold(part, total, |sum, x, _| *sum += x);
}

/// Both layers: `part, w1, b1, w2, b2 -> mean, hidden, gate`.
pub(crate) fn gate(a: &CpuArgs<'_>) {
    let p: SqueezeExciteParams = a.params();
    let [c, s, blocks] = [p.channels, p.squeezed, p.blocks].map(|v| v as usize);
    let (part, w1, b1, w2, b2) = (a.f32(0), a.f32(1), a.f32(2), a.f32(3), a.f32(4));
    let (mean, hidden, gate) = (a.f32_mut(5), a.f32_mut(6), a.f32_mut(7));
    let out = mean.par_chunks_mut(c).zip(hidden.par_chunks_mut(2 * s)).zip(gate.par_chunks_mut(c));
    out.zip(part.par_chunks(blocks * c)).for_each(|(((mean, hidden), gate), part)| {
        vectorise!(|| {
            total(part, mean);
            let share = 1.0 / p.pixels as f32;
            mean.iter_mut().for_each(|m| *m *= share);
            let (z, act) = hidden.split_at_mut(s);
            for (z, (w, b)) in z.iter_mut().zip(w1.chunks_exact(c).zip(b1)) {
                *z = b + dot(w, mean);
            }
            act.iter_mut().zip(&*z).for_each(|(act, &z)| *act = silu(z));
            for (g, (w, b)) in gate.iter_mut().zip(w2.chunks_exact(s).zip(b2)) {
                *g = b + dot(w, act);
            }
            gate.iter_mut().for_each(|g| *g = sigmoid(*g));
        })
    });
}

#[inline(always)]
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<8>(), y.as_chunks::<8>());
    let mut lanes = [0.0f32; 8];
    for (x, y) in x.iter().zip(y) {
        for l in 0..8 {
            lanes[l] = x[l].mul_add(y[l], lanes[l]);
        }
    }
    let rest: f32 = x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum();
    lanes.iter().sum::<f32>() + rest
}

/// `y += factor * x`.
#[inline(always)]
fn add_scaled(factor: f32, x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = factor.mul_add(x, *y));
}

/// `part, w1, w2, hidden, gate -> u, v, dmean`.
pub(crate) fn bwd_gate(a: &CpuArgs<'_>) {
    let p: SqueezeExciteParams = a.params();
    let [c, s, blocks] = [p.channels, p.squeezed, p.blocks].map(|v| v as usize);
    let (part, w1, w2, hidden, gate) = (a.f32(0), a.f32(1), a.f32(2), a.f32(3), a.f32(4));
    let (u, v, dmean) = (a.f32_mut(5), a.f32_mut(6), a.f32_mut(7));
    let out = u.par_chunks_mut(c).zip(v.par_chunks_mut(s)).zip(dmean.par_chunks_mut(c));
    out.zip(part.par_chunks(blocks * c)).enumerate().for_each(|(n, (((u, v), dmean), part))| {
        vectorise!(|| {
            total(part, u);
            u.iter_mut().zip(&gate[n * c..]).for_each(|(u, &g)| *u *= g * (1.0 - g));
            v.fill(0.0);
            for (&u, w) in u.iter().zip(w2.chunks_exact(s)) {
                add_scaled(u, w, v);
            }
            v.iter_mut().zip(&hidden[n * 2 * s..]).for_each(|(v, &z)| *v *= silu_slope(z));
            dmean.fill(0.0);
            let share = 1.0 / p.pixels as f32;
            for (&v, w) in v.iter().zip(w1.chunks_exact(c)) {
                add_scaled(v * share, w, dmean);
            }
        })
    });
}

/// `u, v, mean, hidden -> dw1, db1, dw2, db2`: sums over the images, in order.
pub(crate) fn bwd_weights(a: &CpuArgs<'_>) {
    let p: SqueezeExciteParams = a.params();
    let [n, c, s] = [p.images, p.channels, p.squeezed].map(|v| v as usize);
    let (u, v, mean, hidden) = (a.f32(0), a.f32(1), a.f32(2), a.f32(3));
    rows::each!(a.f32_mut(4), c, n * c * s, |j, dw| {
        dw.fill(0.0);
        (0..n).for_each(|i| add_scaled(v[i * s + j], &mean[i * c..], dw));
    });
    let slab = rows::slab_len(s) / 4 / s * s + s;
    rows::each!(a.f32_mut(6), slab, n * c * s, |number, dw| {
        dw.fill(0.0);
        for (i, act) in hidden.chunks_exact(2 * s).map(|h| &h[s..]).enumerate() {
            let u = &u[i * c + number * slab / s..];
            dw.chunks_exact_mut(s).zip(u).for_each(|(dw, &u)| add_scaled(u, act, dw));
        }
    });
    for (sum, x) in [(a.f32_mut(5), v), (a.f32_mut(7), u)] {
        total(x, sum);
    }
}

/// `y = x * gate`.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    let p: SqueezeExciteParams = a.params();
    let (x, gate) = (a.f32(0), a.f32(1));
    let (c, pixels) = (p.channels as usize, p.pixels as usize);
    let slab = rows::slab_len(c);
    rows::each!(a.f32_mut(2), slab, x.len(), |number, y| {
        let first = number * slab;
        for (r, (y, x)) in y.chunks_exact_mut(c).zip(x[first..].chunks_exact(c)).enumerate() {
            let gate = &gate[(first / c + r) / pixels * c..][..c];
            y.iter_mut().zip(x).zip(gate).for_each(|((y, x), g)| *y = x * g);
        }
    });
}

/// `dx = dy * gate + dmean`.
pub(crate) fn bwd(a: &CpuArgs<'_>) {
    let p: SqueezeExciteParams = a.params();
    let (dy, gate, dmean) = (a.f32(0), a.f32(1), a.f32(2));
    let (c, pixels) = (p.channels as usize, p.pixels as usize);
    let slab = rows::slab_len(c);
    rows::each!(a.f32_mut(3), slab, dy.len(), |number, dx| {
        let first = number * slab;
        for (r, (dx, dy)) in dx.chunks_exact_mut(c).zip(dy[first..].chunks_exact(c)).enumerate() {
            let at = (first / c + r) / pixels * c;
            let (gate, dmean) = (&gate[at..][..c], &dmean[at..][..c]);
            for i in 0..c {
                dx[i] = dy[i].mul_add(gate[i], dmean[i]);
            }
        }
    });
}
