//! What a convolution's forward does with a tile of its output beyond a bias: statistics for a batch norm, or a whole norm. Both happen
//! right behind the product of a tile, while its 6 pixels of 16 channels lie in the first-level cache, and save a pass over the image.

use crate::cpu::batch_norm::{activate, normalise};
use crate::cpu::gemm::{COLS, ROWS};
use crate::cpu::lanes::{F32x8, LANES};
use crate::cpu::simd::vector_fn;
use crate::cpu::threads::SharedMut;

/// How a forward ends.
#[derive(Clone, Copy)]
pub(super) enum End<'a> {
    /// y starts from these numbers, one a channel, or from zero.
    Bias(Option<&'a [f32]>),
    /// y is the plain sum; mean and sum of squared deviations of each channel go to `[bands, 2, O]`.
    Stats(SharedMut<'a>),
    /// y is normalised.
    Norm(Norm<'a>),
}

/// Sums of 16 channels over the pixels of a band, of deviations from a shift and of their squares.
///
/// The shift is the mean of the first tile. Its pixels are among those that are summed, so it cannot lie far outside what the
/// others spread over: `S2 - S1^2 / n` loses at most a factor of n / 6 of the precision, n being some thousands, and next to nothing
/// where neighbours are no exception.
#[derive(Default)]
pub(super) struct Sums {
    begun: bool,
    shift: [F32x8; 2],
    sum: [F32x8; 2],
    squares: [F32x8; 2],
}

impl Sums {
    /// Adds a tile: of each pixel some 16 channels, always the same.
    pub(super) fn add(&mut self, rows: &mut [&mut [f32]]) {
        if !self.begun {
            self.begun = true;
            let share = F32x8::splat(1.0 / rows.len() as f32);
            for row in rows.iter() {
                for half in 0..2 {
                    self.shift[half] = load(row, half).mul_add(share, self.shift[half]);
                }
            }
        }
        add_tile(self, rows);
    }

    /// Mean and sum of squared deviations from it of each channel, after `pixels` pixels.
    pub(super) fn finish(&self, pixels: usize, mean: &mut [f32], m2: &mut [f32]) {
        let n = pixels as f32;
        for (i, (mean, m2)) in mean.iter_mut().zip(m2).enumerate() {
            let of = |v: &[F32x8; 2]| v[i / LANES].0[i % LANES];
            let (sum, squares) = (of(&self.sum), of(&self.squares));
            *mean = of(&self.shift) + sum / n;
            *m2 = (squares - sum * (sum / n)).max(0.0);
        }
    }
}

vector_fn! {
    fn add_tile(sums: &mut Sums, rows: &mut [&mut [f32]]) {
        let whole: [Option<&[f32; COLS]>; ROWS] =
            std::array::from_fn(|i| rows.get(i).and_then(|row| row.first_chunk()));
        if let [Some(a), Some(b), Some(c), Some(d), Some(e), Some(f)] = whole {
            return add_whole(sums, [a, b, c, d, e, f]);
        }
        for half in 0..2 {
            for row in rows.iter() {
                let d = load(row, half).sub(sums.shift[half]);
                sums.sum[half] = sums.sum[half].add(d);
                sums.squares[half] = d.mul_add(d, sums.squares[half]);
            }
        }
    }
}

/// [`add_tile`] of a whole tile: the six rows are added among themselves first, so that none waits for another.
#[inline(always)]
fn add_whole(sums: &mut Sums, rows: [&[f32; COLS]; ROWS]) {
    for half in 0..2 {
        let shift = sums.shift[half];
        let d = |i: usize| eight(&rows[i][half * LANES..]).sub(shift);
        let (d0, d1, d2, d3, d4, d5) = (d(0), d(1), d(2), d(3), d(4), d(5));
        sums.sum[half] = sums.sum[half].add(d0.add(d1).add(d2.add(d3)).add(d4.add(d5)));
        let first = d4.mul_add(d4, d2.mul_add(d2, d0.mul(d0)));
        let second = d5.mul_add(d5, d3.mul_add(d3, d1.mul(d1)));
        sums.squares[half] = sums.squares[half].add(first.add(second));
    }
}

/// Half of a row of at most 16 channels; zeros past the last.
#[inline(always)]
fn load(row: &[f32], half: usize) -> F32x8 {
    let mut out = F32x8::ZERO;
    let rest = row.get(half * LANES..).unwrap_or_default();
    out.0.iter_mut().zip(rest).for_each(|(out, v)| *out = *v);
    out
}

#[inline(always)]
fn eight(x: &[f32]) -> F32x8 {
    let x = &x[..LANES];
    F32x8([x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]])
}

/// A norm by its table (see [`crate::ops::batch_norm()`]), residual and activation.
#[derive(Clone, Copy)]
pub(super) struct Norm<'a> {
    table: &'a [f32],
    residual: &'a [f32],
    apply: Apply,
}

/// Of a norm, the first channel, where the pixels start in y, and these channels of the pixels.
type Apply = fn(&Norm<'_>, usize, &[usize], &mut [&mut [f32]]);

impl<'a> Norm<'a> {
    /// `mode` is 2 * activation + residual (which is not looked at where there is none).
    pub(super) fn new(table: &'a [f32], residual: &'a [f32], mode: u32) -> Self {
        // A function for each mode, chosen once and not at every tile.
        let apply = match mode {
            0 => apply::<0>,
            1 => apply::<1>,
            2 => apply::<2>,
            3 => apply::<3>,
            4 => apply::<4>,
            _ => apply::<5>,
        };
        Self { table, residual, apply }
    }

    /// Normalises a tile in place: `rows` are the channels from `first` on of the pixels that start at `offsets` in y, and so in the residual.
    pub(super) fn apply(&self, first: usize, offsets: &[usize], rows: &mut [&mut [f32]]) {
        (self.apply)(self, first, offsets, rows)
    }
}

vector_fn! {
    fn apply<const MODE: u32>(norm: &Norm<'_>, first: usize, offsets: &[usize], rows: &mut [&mut [f32]]) {
        let (c, cols) = (norm.table.len() / 4, rows[0].len());
        let (mean, scale, bias) = (&norm.table[first..], &norm.table[2 * c + first..], &norm.table[3 * c + first..]);
        let mut tile = [0.0f32; ROWS * COLS];
        for ((row, z), offset) in rows.iter().zip(tile.chunks_exact_mut(COLS)).zip(offsets) {
            let whole = cols / LANES * LANES;
            for i in (0..whole).step_by(LANES) {
                let mut v = eight(&row[i..]).sub(eight(&mean[i..])).mul_add(eight(&scale[i..]), eight(&bias[i..]));
                if MODE % 2 == 1 {
                    v = v.add(eight(&norm.residual[offset + first + i..]));
                }
                z[i..i + LANES].copy_from_slice(&v.0);
            }
            for i in whole..cols {
                z[i] = normalise(row[i], mean[i], scale[i], bias[i]);
                if MODE % 2 == 1 {
                    z[i] += norm.residual[offset + first + i];
                }
            }
        }
        // One flat loop: of eight lanes at a time the compiler makes no vectors where there is an exponential.
        for z in &mut tile {
            *z = activate::<MODE>(*z);
        }
        for (row, z) in rows.iter_mut().zip(tile.chunks_exact(COLS)) {
            match row.first_chunk_mut::<COLS>() {
                Some(row) => row.copy_from_slice(z),
                None => row.copy_from_slice(&z[..cols]),
            }
        }
    }
}
