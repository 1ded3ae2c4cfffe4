//! CPU kernels of [`crate::ops::avg_pool2d`].

use super::max_pool2d::{covering, taps};
use super::rows;
use crate::kernel::CpuArgs;
use crate::ops::avg_pool2d::AvgPool2dParams;

/// One over the number of places that count in a window, of `rows` x `columns` places inside the image.
#[inline(always)]
fn share(p: &AvgPool2dParams, rows: u32, columns: u32) -> f32 {
    let places = if p.include_pad != 0 { p.kh * p.kw } else { rows * columns };
    1.0 / places as f32
}

/// `x -> y`.
pub(crate) fn fwd(a: &CpuArgs<'_>) {
    let p: AvgPool2dParams = a.params();
    let [w, c, ow] = [p.w, p.c, p.ow].map(|v| v as usize);
    let x = a.f32(0);
    rows::each!(a.f32_mut(1), ow * c, x.len(), |number, y| {
        let (n, oy) = (number / p.oh as usize, (number % p.oh as usize) as u32);
        let image = &x[n * p.h as usize * w * c..];
        let rows = taps(oy, p.sh, p.ph, p.kh, p.h);
        for (ox, y) in (0u32..).zip(y.chunks_exact_mut(c)) {
            let columns = taps(ox, p.sw, p.pw, p.kw, p.w);
            y.fill(0.0);
            for i in rows.clone() {
                let row = (oy * p.sh + i - p.ph) * p.w;
                for j in columns.clone() {
                    let x = &image[(row + ox * p.sw + j - p.pw) as usize * c..][..c];
                    y.iter_mut().zip(x).for_each(|(y, &x)| *y += x);
                }
            }
            let share = share(&p, rows.len() as u32, columns.len() as u32);
            y.iter_mut().for_each(|y| *y *= share);
        }
    });
}

/// `dy -> dx`: every input pixel asks the windows that cover it.
pub(crate) fn bwd(a: &CpuArgs<'_>) {
    let p: AvgPool2dParams = a.params();
    let [w, c] = [p.w, p.c].map(|v| v as usize);
    let (dy, dx) = (a.f32(0), a.f32_mut(1));
    let size = dx.len();
    rows::each!(dx, w * c, size, |number, dx| {
        let (n, y) = ((number / p.h as usize) as u32, (number % p.h as usize) as u32);
        let rows = covering(y, p.sh, p.ph, p.kh, p.oh);
        for (x, dx) in (0u32..).zip(dx.chunks_exact_mut(c)) {
            dx.fill(0.0);
            for oy in rows.clone() {
                let height = taps(oy, p.sh, p.ph, p.kh, p.h).len() as u32;
                for ox in covering(x, p.sw, p.pw, p.kw, p.ow) {
                    let width = taps(ox, p.sw, p.pw, p.kw, p.w).len() as u32;
                    let share = share(&p, height, width);
                    let dy = &dy[((n * p.oh + oy) * p.ow + ox) as usize * c..][..c];
                    dx.iter_mut().zip(dy).for_each(|(dx, &dy)| *dx = dy.mul_add(share, *dx));
                }
            }
        }
    });
}
