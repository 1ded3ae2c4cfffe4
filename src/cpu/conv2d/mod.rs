//! 2D convolution on the CPU, NHWC: forward, and the gradients of input, weight and bias. `correlate.rs` has the
//! product that forward and input gradient are made of, `weight.rs` the weight gradient.
//!
//! Each output element is summed by one thread in an order that depends on the shape alone: results are the same for
//! any number of threads.
//!
//! Measured with N = 8, ms of CPU time on one thread (EPYC Zen 4), forward + both gradients, beside PyTorch 2.13 (oneDNN,
//! AVX-512; the better of NCHW and channels_last):
//!
//! | 3x3 | forward | dx | dw | sum | PyTorch |
//! |---|---|---|---|---|---|
//! | 64 channels, 56x56 | 17.5 | 17.6 | 22 | 57 | 59 |
//! | 128 channels, 28x28 | 17.4 | 17.0 | 20 | 54 | 54 |
//! | 256 channels, 14x14 | 18.2 | 18.0 | 19 | 55 | 54 |
//! | 512 channels, 7x7 | 20.5 | 20.5 | 19 | 60 | 64 |
//! | 64 to 128, stride 2, 56x56 | 9.4 | 10.3 | 11 | 31 | 34 |
//! | stem 7x7 / 2, 224x224 (no dx) | 18.0 | | 29 | 47 | 42 |
//!
//! What it took: weights packed by 8 x 8 transposes and not number by number (512 channels: 27 to 20.5 ms forward), patches
//! of three-channel images copied by kernel rows and not by taps (stem dw: 42 to 29), tasks of the weight gradient that
//! keep their pixels in cache over several panels (512 channels: 23 to 19). Bands of padded input of 128 KiB instead
//! of 256 cost 20 % at 512 channels (the packed weight is read more often), 512 KiB gain nothing.

mod correlate;
mod ends;
mod weight;

use super::simd::vectorise;
use super::threads::{SharedMut, with_scratch};
use crate::kernel::CpuArgs;
use crate::ops::conv2d::Conv2dParams;
use correlate::{forward, input_gradient};
use ends::{End, Norm};
use rayon::prelude::*;
pub(crate) use weight::pointwise_weight_gradient;
use weight::weight_gradient;

/// [`Conv2dParams`] as `usize`.
#[derive(Clone, Copy)]
pub(super) struct Dims {
    pub(super) n: usize,
    pub(super) h: usize,
    pub(super) w: usize,
    pub(super) c: usize,
    pub(super) o: usize,
    pub(super) kh: usize,
    pub(super) kw: usize,
    pub(super) p: usize,
    pub(super) q: usize,
    pub(super) stride: (usize, usize),
    pub(super) pad: (usize, usize),
}

impl Dims {
    pub(super) fn new(s: &Conv2dParams) -> Self {
        let u = |v: u32| v as usize;
        Dims {
            n: u(s.n),
            h: u(s.h),
            w: u(s.w),
            c: u(s.c),
            o: u(s.o),
            kh: u(s.kh),
            kw: u(s.kw),
            p: u(s.p),
            q: u(s.q),
            stride: (u(s.stride_h), u(s.stride_w)),
            pad: (u(s.pad_h), u(s.pad_w)),
        }
    }

    /// 1x1, stride 1, no border: every pixel for itself, wherever it lies in the image.
    fn pointwise(&self) -> bool {
        (self.kh, self.kw, self.stride, self.pad) == (1, 1, (1, 1), (0, 0))
    }
}

/// Adaptor of [`forward`].
pub(crate) fn fwd(args: &CpuArgs<'_>) {
    let p: Conv2dParams = args.params();
    let end = End::Bias((p.bias == 1).then(|| args.f32(2)));
    forward(&p, args.f32(0), args.f32(1), end, args.f32_mut(3));
}

/// The forward that also gathers the mean and the sum of squared deviations of each channel over each band of pixels, see
/// [`block_pixels`]: `x, w -> part [bands, 2, O], y`.
pub(crate) fn fwd_stats(args: &CpuArgs<'_>) {
    let end = End::Stats(SharedMut::new(args.f32_mut(2)));
    forward(&args.params(), args.f32(0), args.f32(1), end, args.f32_mut(3));
}

/// The forward with a norm, a residual and an activation behind it: `x, w, table [4, O], residual -> y`.
pub(crate) fn fwd_norm(args: &CpuArgs<'_>) {
    let p: Conv2dParams = args.params();
    let norm = Norm::new(args.f32(2), args.f32(3), 2 * p.act + p.residual);
    forward(&p, args.f32(0), args.f32(1), End::Norm(norm), args.f32_mut(4));
}

/// Pixels whose statistics [`fwd_stats`] puts together.
pub(crate) fn block_pixels(p: &Conv2dParams) -> u32 {
    correlate::band_pixels(p) as u32
}

/// Adaptor of [`input_gradient`].
pub(crate) fn dgrad(args: &CpuArgs<'_>) {
    input_gradient(&args.params(), args.f32(0), args.f32(1), args.f32_mut(2));
}

/// Adaptor of [`weight_gradient`], which needs no parts.
pub(crate) fn wgrad(args: &CpuArgs<'_>) {
    weight_gradient(&args.params(), args.f32(0), args.f32(1), args.f32_mut(2));
}

/// Adaptor of [`bias_gradient`], which needs no parts.
pub(crate) fn dbias(args: &CpuArgs<'_>) {
    bias_gradient(args.params::<Conv2dParams>().o as usize, args.f32(0), args.f32_mut(1));
}

/// out[i] = sum over parts of sums[part][i].
pub(crate) fn sum(args: &CpuArgs<'_>) {
    let out = args.f32_mut(1);
    out.fill(0.0);
    args.f32(0).chunks_exact(out.len()).for_each(|part| add_to(out, part));
}

/// db[o] = sum over all pixels of dy[pixel, o]; `o` numbers a pixel.
///
/// Each thread sums blocks of 512 pixels; the blocks' sums are added in order, which also keeps the error of long
/// sums small.
fn bias_gradient(o: usize, dy: &[f32], db: &mut [f32]) {
    const PIXELS: usize = 512;
    db.fill(0.0);
    if dy.is_empty() {
        return;
    }
    let blocks = dy.len().div_ceil(PIXELS * o);
    with_scratch(blocks * o, |sums| {
        sums.par_chunks_exact_mut(o).zip(dy.par_chunks(PIXELS * o)).for_each(|(sum, block)| {
            vectorise!(|| {
                sum.fill(0.0);
                block.chunks_exact(o).for_each(|pixel| add_to(sum, pixel));
            });
        });
        sums.chunks_exact(o).for_each(|sum| add_to(db, sum));
    });
}

#[inline(always)]
fn add_to(sum: &mut [f32], x: &[f32]) {
    for (s, v) in sum.iter_mut().zip(x) {
        *s += v;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(next).collect()
    }

    fn params(
        x: [u32; 4],
        o: u32,
        k: (u32, u32),
        stride: (u32, u32),
        pad: (u32, u32),
    ) -> Conv2dParams {
        let [n, h, w, c] = x;
        let (p, q) = ((h + 2 * pad.0 - k.0) / stride.0 + 1, (w + 2 * pad.1 - k.1) / stride.1 + 1);
        Conv2dParams {
            n,
            h,
            w,
            c,
            o,
            kh: k.0,
            kw: k.1,
            p,
            q,
            stride_h: stride.0,
            stride_w: stride.1,
            pad_h: pad.0,
            pad_w: pad.1,
            bias: 0,
            parts: 1,
            groups: 1,
            act: 0,
            residual: 0,
        }
    }

    /// Calls `f(output index, input index, weight index)` for every product of the convolution.
    fn every_product(d: &Conv2dParams, mut f: impl FnMut(usize, usize, usize)) {
        let d = Dims::new(d);
        for (n, p, q) in (0..d.n * d.p * d.q).map(|i| (i / (d.p * d.q), i / d.q % d.p, i % d.q)) {
            for (r, s) in (0..d.kh * d.kw).map(|i| (i / d.kw, i % d.kw)) {
                let (h, w) = (
                    (p * d.stride.0 + r).wrapping_sub(d.pad.0),
                    (q * d.stride.1 + s).wrapping_sub(d.pad.1),
                );
                if h >= d.h || w >= d.w {
                    continue;
                }
                for (o, c) in (0..d.o * d.c).map(|i| (i / d.c, i % d.c)) {
                    f(
                        ((n * d.p + p) * d.q + q) * d.o + o,
                        ((n * d.h + h) * d.w + w) * d.c + c,
                        ((o * d.kh + r) * d.kw + s) * d.c + c,
                    );
                }
            }
        }
    }

    fn close(got: &[f32], want: &[f64], what: &str) {
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((*g as f64 - w).abs() < 1e-4 * (1.0 + w.abs()), "{what} at {i}: {g} for {w}");
        }
    }

    fn shapes() -> Vec<Conv2dParams> {
        vec![
            params([2, 7, 9, 5], 7, (3, 3), (1, 1), (1, 1)),
            params([2, 8, 6, 16], 32, (3, 3), (1, 1), (1, 1)),
            params([3, 5, 7, 17], 33, (3, 3), (2, 2), (1, 1)),
            params([1, 23, 22, 3], 10, (7, 7), (2, 2), (3, 3)),
            params([2, 9, 8, 12], 20, (1, 1), (2, 2), (0, 0)),
            params([2, 5, 6, 20], 18, (1, 1), (1, 1), (0, 0)),
            params([1, 1, 1, 1], 1, (1, 1), (1, 1), (0, 0)),
            params([2, 1, 1, 33], 17, (3, 3), (1, 1), (1, 1)),
            params([1, 11, 6, 4], 5, (2, 5), (3, 1), (0, 2)),
            params([1, 6, 13, 2], 3, (4, 1), (1, 4), (3, 0)),
            params([2, 6, 6, 2], 3, (2, 2), (3, 3), (2, 2)),
            params([40, 7, 7, 48], 16, (3, 3), (1, 1), (0, 0)),
            params([1, 3, 2, 1], 129, (3, 2), (1, 1), (0, 0)),
        ]
    }

    #[test]
    fn all_passes_agree_with_plain_loops() {
        for d in shapes() {
            let x = numbers((d.n * d.h * d.w * d.c) as usize, 1);
            let w = numbers((d.o * d.kh * d.kw * d.c) as usize, 2);
            let dy = numbers((d.n * d.p * d.q * d.o) as usize, 3);
            let bias = numbers(d.o as usize, 4);
            let mut y: Vec<f64> = (0..dy.len()).map(|i| bias[i % bias.len()] as f64).collect();
            let (mut dx, mut dw) = (vec![0.0f64; x.len()], vec![0.0f64; w.len()]);
            every_product(&d, |iy, ix, iw| {
                y[iy] += x[ix] as f64 * w[iw] as f64;
                dx[ix] += dy[iy] as f64 * w[iw] as f64;
                dw[iw] += dy[iy] as f64 * x[ix] as f64;
            });
            let mut got = vec![f32::NAN; y.len()];
            forward(&d, &x, &w, End::Bias(Some(&bias)), &mut got);
            close(&got, &y, &format!("y of {d:?}"));
            forward(&d, &x, &w, End::Bias(None), &mut got);
            for (i, v) in y.iter_mut().enumerate() {
                *v -= bias[i % bias.len()] as f64;
            }
            close(&got, &y, &format!("y without bias of {d:?}"));
            let mut got = vec![f32::NAN; x.len()];
            input_gradient(&d, &dy, &w, &mut got);
            close(&got, &dx, &format!("dx of {d:?}"));
            let mut got = vec![f32::NAN; w.len()];
            weight_gradient(&d, &x, &dy, &mut got);
            close(&got, &dw, &format!("dw of {d:?}"));
        }
    }

    /// Each band's mean and squared deviations, and norms of every mode.
    #[test]
    fn ends_agree_with_plain_loops() {
        for d in shapes() {
            let x = numbers((d.n * d.h * d.w * d.c) as usize, 1);
            let w = numbers((d.o * d.kh * d.kw * d.c) as usize, 2);
            let (o, pixels) = (d.o as usize, (d.n * d.p * d.q) as usize);
            let (mut plain, mut y) = (vec![f32::NAN; pixels * o], vec![f32::NAN; pixels * o]);
            forward(&d, &x, &w, End::Bias(None), &mut plain);
            let block = block_pixels(&d) as usize;
            let mut part = vec![f32::NAN; pixels.div_ceil(block) * 2 * o];
            forward(&d, &x, &w, End::Stats(SharedMut::new(&mut part)), &mut y);
            assert_eq!(y, plain, "y of {d:?}");
            for (part, y) in part.chunks_exact(2 * o).zip(plain.chunks(block * o)) {
                for i in 0..o {
                    let values = || y.iter().skip(i).step_by(o).map(|&v| f64::from(v));
                    let mean = values().sum::<f64>() / (y.len() / o) as f64;
                    let m2 = values().map(|v| (v - mean).powi(2)).sum::<f64>();
                    close(&[part[i], part[o + i]], &[mean, m2], &format!("statistics of {d:?}"));
                }
            }
            let (table, residual) = (numbers(4 * o, 3), numbers(pixels * o, 4));
            for mode in 0..6 {
                let end = End::Norm(Norm::new(&table, &residual, mode));
                forward(&d, &x, &w, end, &mut y);
                let want: Vec<f64> = (0..y.len())
                    .map(|i| {
                        let at = |row: usize| f64::from(table[row * o + i % o]);
                        let z = (f64::from(plain[i]) - at(0)) * at(2) + at(3);
                        let z = z + f64::from(mode % 2) * f64::from(residual[i]);
                        [z, z.max(0.0), z / (1.0 + (-z).exp())][mode as usize / 2]
                    })
                    .collect();
                close(&y, &want, &format!("norm {mode} of {d:?}"));
            }
        }
    }

    #[test]
    fn bias_gradient_sums_pixels() {
        let dy = numbers(3 * 1300, 5);
        let mut db = [f32::NAN; 3];
        bias_gradient(3, &dy, &mut db);
        let want: Vec<f64> =
            (0..3).map(|o| dy.iter().skip(o).step_by(3).map(|&v| v as f64).sum()).collect();
        close(&db, &want, "db");
    }

    #[test]
    fn bits_do_not_depend_on_the_thread_count() {
        let d = params([3, 20, 21, 24], 40, (3, 3), (2, 1), (1, 1));
        let x = numbers((d.n * d.h * d.w * d.c) as usize, 1);
        let w = numbers((d.o * d.kh * d.kw * d.c) as usize, 2);
        let dy = numbers((d.n * d.p * d.q * d.o) as usize, 3);
        let all = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let (mut y, mut dx, mut dw, mut db) = (
                    vec![0.0; dy.len()],
                    vec![0.0; x.len()],
                    vec![0.0; w.len()],
                    vec![0.0; d.o as usize],
                );
                let bands = (d.n * d.p * d.q).div_ceil(block_pixels(&d)) as usize;
                let mut part = vec![0.0; bands * 2 * d.o as usize];
                forward(&d, &x, &w, End::Stats(SharedMut::new(&mut part)), &mut y);
                input_gradient(&d, &dy, &w, &mut dx);
                weight_gradient(&d, &x, &dy, &mut dw);
                bias_gradient(d.o as usize, &dy, &mut db);
                (y, part, dx, dw, db)
            })
        };
        assert_eq!(all(1), all(3));
    }
}
