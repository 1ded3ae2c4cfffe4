//! What a convolution's forward does with a tile of its output beyond a bias: statistics for a batch norm, or a whole norm. Both happen
//! right behind the product of a tile, while its 6 pixels of 16 channels lie in the first-level cache, and save a pass over the image.

use crate::cpu::batch_norm::apply_to;
use crate::cpu::gemm::{COLS, ROWS};
use crate::cpu::lanes::{F32x8, LANES};
use crate::cpu::simd::vectorise;
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
    /// Adds `rows` pixels, of which `row(i)` gives `cols` channels.
    #[inline(always)]
    pub(super) fn add<'y>(
        &mut self,
        rows: usize,
        cols: usize,
        row: impl Fn(usize) -> &'y mut [f32],
    ) {
        if !self.begun {
            self.begin(rows, cols, &row);
        }
        if rows == ROWS && cols == COLS {
            vectorise!(|| {
                let rows: [&[f32]; ROWS] = std::array::from_fn(|i| &*row(i));
                self.add_rows(&rows);
            });
            return;
        }
        for i in 0..rows {
            // What is past the last channel is summed too, and left behind by `finish`.
            let mut wide = [0.0; COLS];
            wide[..cols].copy_from_slice(row(i));
            self.add_rows(&[&wide[..]]);
        }
    }

    #[inline(always)]
    fn add_rows<const R: usize>(&mut self, rows: &[&[f32]; R]) {
        for half in 0..2 {
            let (mut sum, mut squares) = (self.sum[half], self.squares[half]);
            for row in rows {
                let d = eight(&row[half * LANES..]).sub(self.shift[half]);
                sum = sum.add(d);
                squares = d.mul_add(d, squares);
            }
            (self.sum[half], self.squares[half]) = (sum, squares);
        }
    }

    fn begin<'y>(&mut self, rows: usize, cols: usize, row: &impl Fn(usize) -> &'y mut [f32]) {
        let mut mean = [0.0; COLS];
        for i in 0..rows {
            mean.iter_mut().zip(row(i).iter()).for_each(|(m, v)| *m += v / rows as f32);
        }
        mean[cols..].fill(0.0);
        self.shift = [eight(&mean), eight(&mean[LANES..])];
        self.begun = true;
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

#[inline(always)]
fn eight(x: &[f32]) -> F32x8 {
    let x = &x[..LANES];
    F32x8(std::array::from_fn(|l| x[l]))
}

/// A norm by its table (see [`crate::ops::batch_norm()`]), residual and activation.
#[derive(Clone, Copy)]
pub(super) struct Norm<'a> {
    pub(super) table: &'a [f32],
    pub(super) residual: &'a [f32],
    /// 2 * activation + residual.
    pub(super) mode: u32,
}

impl<'a> Norm<'a> {
    /// Normalises pixels of which `row(i)` gives the channels from `first` on; they stand at `offsets[i] + first` in y, and so in
    /// the residual.
    #[inline(always)]
    pub(super) fn apply(
        &self,
        first: usize,
        offsets: &[usize],
        row: impl Fn(usize) -> &'a mut [f32],
    ) {
        vectorise!(|| apply_to(self.mode, self.table, first, offsets.len(), |i| {
            let y = row(i);
            let residual: &[f32] = match self.mode % 2 {
                1 => &self.residual[offsets[i] + first..][..y.len()],
                _ => &[],
            };
            (y, residual)
        }));
    }
}
