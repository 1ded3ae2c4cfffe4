//! CPU kernels of [`crate::ops::max_pool2d`].

use super::rows;
use crate::kernel::CpuArgs;
use crate::ops::max_pool2d::MaxPool2dParams;
use std::ops::Range;

/// Channels handled together in vector registers.
const LANES: usize = 16;

/// A place in the window, `i * kw + j`, as it is stored: one byte where the window has at most 256 places.
trait Place: Copy + Send + Sync {
    fn new(place: u32) -> Self;
    fn get(self) -> u32;
}

impl Place for u8 {
    #[inline(always)]
    fn new(place: u32) -> Self {
        place as u8
    }
    #[inline(always)]
    fn get(self) -> u32 {
        u32::from(self)
    }
}

impl Place for u32 {
    #[inline(always)]
    fn new(place: u32) -> Self {
        place
    }
    #[inline(always)]
    fn get(self) -> u32 {
        self
    }
}

/// `x -> y, places`.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    let p: MaxPool2dParams = a.params();
    let (x, y, places) = (a.f32(0), a.f32_mut(1), a.u32_mut(2));
    if p.wide != 0 {
        forward(&p, x, y, places)
    } else {
        forward::<u8>(&p, x, y, bytemuck::cast_slice_mut(places))
    }
}

/// `dy, places -> dx`.
pub(crate) fn bwd(a: &CpuArgs<'_>) {
    let p: MaxPool2dParams = a.params();
    let (dy, places, dx) = (a.f32(0), a.u32(1), a.f32_mut(2));
    if p.wide != 0 {
        backward(&p, dy, places, dx)
    } else {
        backward::<u8>(&p, dy, bytemuck::cast_slice(places), dx)
    }
}

fn forward<P: Place>(p: &MaxPool2dParams, x: &[f32], y: &mut [f32], places: &mut [P]) {
    let [w, c, ow] = [p.w, p.c, p.ow].map(|v| v as usize);
    let row = ow * c;
    rows::each2!((y, row), (places, row), x.len(), |number, y, places| {
        let (n, oy) = (number / p.oh as usize, (number % p.oh as usize) as u32);
        let image = &x[n * p.h as usize * w * c..][..p.h as usize * w * c];
        let rows = taps(oy, p.sh, p.ph, p.kh, p.h);
        for ox in 0..ow {
            let columns = taps(ox as u32, p.sw, p.pw, p.kw, p.w);
            let window = Window { p, image, rows: rows.clone(), columns, corner: [oy, ox as u32] };
            let (y, places) = (&mut y[ox * c..][..c], &mut places[ox * c..][..c]);
            let mut at = 0;
            while at + LANES <= c {
                largest::<LANES, P>(&window, at, y, places);
                at += LANES;
            }
            for at in at..c {
                largest::<1, P>(&window, at, y, places);
            }
        }
    });
}

/// One window: the taps that lie inside the image.
struct Window<'a> {
    p: &'a MaxPool2dParams,
    image: &'a [f32],
    rows: Range<u32>,
    columns: Range<u32>,
    corner: [u32; 2],
}

/// The taps of a window of `kernel` at `out * stride - padding` that lie in `0..size`.
#[inline(always)]
pub(super) fn taps(out: u32, stride: u32, padding: u32, kernel: u32, size: u32) -> Range<u32> {
    let start = out * stride;
    padding.saturating_sub(start)..kernel.min(size + padding - start)
}

/// Maximum over the window of channels `at..at + L`: the first in reading order wins, NaN wins over all (PyTorch's rule).
#[inline(always)]
fn largest<const L: usize, P: Place>(win: &Window<'_>, at: usize, y: &mut [f32], places: &mut [P]) {
    let p = win.p;
    let mut best = [f32::NEG_INFINITY; L];
    let mut place = [win.rows.start * p.kw + win.columns.start; L];
    for i in win.rows.clone() {
        let iy = win.corner[0] * p.sh + i - p.ph;
        for j in win.columns.clone() {
            let ix = win.corner[1] * p.sw + j - p.pw;
            let x = &win.image[(iy * p.w + ix) as usize * p.c as usize + at..][..L];
            let here = i * p.kw + j;
            for l in 0..L {
                let take = x[l] > best[l] || x[l].is_nan();
                best[l] = if take { x[l] } else { best[l] };
                place[l] = if take { here } else { place[l] };
            }
        }
    }
    y[at..][..L].copy_from_slice(&best);
    for (to, &place) in places[at..][..L].iter_mut().zip(&place) {
        *to = P::new(place);
    }
}

/// Every input pixel asks the windows that cover it whether they took it: no two threads write the same place, and sums
/// have a fixed order.
fn backward<P: Place>(p: &MaxPool2dParams, dy: &[f32], places: &[P], dx: &mut [f32]) {
    let [w, c] = [p.w, p.c].map(|v| v as usize);
    let size = dx.len();
    rows::each!(dx, w * c, size, |number, dx| {
        let (n, y) = ((number / p.h as usize) as u32, (number % p.h as usize) as u32);
        let rows = covering(y, p.sh, p.ph, p.kh, p.oh);
        for x in 0..p.w {
            let columns = covering(x, p.sw, p.pw, p.kw, p.ow);
            let pixel = Pixel { p, n, at: [y, x], rows: rows.clone(), columns };
            let dx = &mut dx[x as usize * c..][..c];
            let mut at = 0;
            while at + LANES <= c {
                gather::<LANES, P>(&pixel, at, dy, places, dx);
                at += LANES;
            }
            for at in at..c {
                gather::<1, P>(&pixel, at, dy, places, dx);
            }
        }
    });
}

/// One input pixel and the windows that cover it.
struct Pixel<'a> {
    p: &'a MaxPool2dParams,
    n: u32,
    at: [u32; 2],
    rows: Range<u32>,
    columns: Range<u32>,
}

/// The windows along one axis that cover position `at`.
#[inline(always)]
pub(super) fn covering(at: u32, stride: u32, padding: u32, kernel: u32, out: u32) -> Range<u32> {
    let end = at + padding;
    (end + 1).saturating_sub(kernel).div_ceil(stride)..(end / stride + 1).min(out)
}

#[inline(always)]
fn gather<const L: usize, P: Place>(
    pixel: &Pixel<'_>,
    at: usize,
    dy: &[f32],
    places: &[P],
    dx: &mut [f32],
) {
    let p = pixel.p;
    let mut sum = [0.0f32; L];
    for oy in pixel.rows.clone() {
        let i = pixel.at[0] + p.ph - oy * p.sh;
        for ox in pixel.columns.clone() {
            let here = i * p.kw + (pixel.at[1] + p.pw - ox * p.sw);
            let start = ((pixel.n * p.oh + oy) * p.ow + ox) as usize * p.c as usize + at;
            let (dy, places) = (&dy[start..][..L], &places[start..][..L]);
            for l in 0..L {
                // All ones where the window took this pixel: a mask, which is vector code, and a branch is not.
                let taken = u32::from(places[l].get() == here).wrapping_neg();
                sum[l] += f32::from_bits(dy[l].to_bits() & taken);
            }
        }
    }
    dx[at..][..L].copy_from_slice(&sum);
}
