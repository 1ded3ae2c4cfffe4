//! Operands laid out as the register tile of [`super::gemm`] reads them: in panels of 16 columns.

use super::gemm::COLS;
use super::simd::vector_fn;

/// Rows as a panel: panel[k][i] = scale * x[i * stride + k] for k up to `depth` and the `rows <= 16` rows, zeros past the last.
///
/// # Panics
/// Where x or the panel is too short: a bug of the caller.
pub(crate) fn pack_rows(
    x: &[f32],
    stride: usize,
    (rows, depth): (usize, usize),
    scale: f32,
    panel: &mut [f32],
) {
    let whole = depth - depth % COLS;
    squares(x, stride, rows, scale, &mut panel[..whole * COLS]);
    for k in whole..depth {
        let row = &mut panel[k * COLS..][..COLS];
        for (i, out) in row.iter_mut().enumerate() {
            *out = if i < rows { scale * x[i * stride + k] } else { 0.0 };
        }
    }
}

/// Columns as a panel: panel[k][j] = scale * x[k * stride + j] for the `columns <= 16`, zeros past the last; as many k as the panel holds.
///
/// # Panics
/// Where x is too short: a bug of the caller.
pub(crate) fn pack_columns(
    x: &[f32],
    stride: usize,
    columns: usize,
    scale: f32,
    panel: &mut [f32],
) {
    if columns == COLS {
        return whole_columns(x, stride, scale, panel);
    }
    for (k, out) in panel.chunks_exact_mut(COLS).enumerate() {
        let row = &x[k * stride..][..columns];
        out[..columns].iter_mut().zip(row).for_each(|(out, x)| *out = scale * x);
        out[columns..].fill(0.0);
    }
}

vector_fn! {
    fn whole_columns(x: &[f32], stride: usize, scale: f32, panel: &mut [f32]) {
        for (k, out) in panel.chunks_exact_mut(COLS).enumerate() {
            let row = &x[k * stride..][..COLS];
            for j in 0..COLS {
                out[j] = scale * row[j];
            }
        }
    }
}

vector_fn! {
    /// [`pack_rows`] of as many k as fill squares of 16 x 16.
    fn squares(x: &[f32], stride: usize, rows: usize, scale: f32, panel: &mut [f32]) {
        let mut square = [[0.0f32; COLS]; COLS];
        for (block, out) in panel.chunks_exact_mut(COLS * COLS).enumerate() {
            for (i, row) in square.iter_mut().enumerate().take(rows) {
                let x = &x[i * stride + block * COLS..][..COLS];
                for j in 0..COLS {
                    row[j] = scale * x[j];
                }
            }
            transpose(&square, out);
        }
    }
}

/// out[i][j] = square[j][i], in steps of 8 x 8 that fit the registers.
#[inline(always)]
fn transpose(square: &[[f32; COLS]; COLS], out: &mut [f32]) {
    for i0 in (0..COLS).step_by(8) {
        for j0 in (0..COLS).step_by(8) {
            let rows: [[f32; 8]; 8] =
                std::array::from_fn(|j| std::array::from_fn(|i| square[j0 + j][i0 + i]));
            for i in 0..8 {
                let column: [f32; 8] = std::array::from_fn(|j| rows[j][i]);
                out[(i0 + i) * COLS + j0..][..8].copy_from_slice(&column);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_its_place_and_what_is_left_is_zero() {
        for (rows, depth, stride) in
            [(1, 1, 1), (3, 16, 16), (16, 33, 40), (7, 50, 51), (16, 64, 64)]
        {
            let x: Vec<f32> = (0..rows * stride).map(|i| i as f32).collect();
            let mut panel = vec![f32::NAN; depth * COLS];
            pack_rows(&x, stride, (rows, depth), 0.5, &mut panel);
            for (at, &v) in panel.iter().enumerate() {
                let (k, i) = (at / COLS, at % COLS);
                let want = if i < rows { 0.5 * x[i * stride + k] } else { 0.0 };
                assert_eq!(v, want, "k {k}, row {i} of {rows} x {depth}");
            }
            let columns = depth.min(COLS);
            let mut panel = vec![f32::NAN; rows * COLS];
            pack_columns(&x, stride, columns, 0.5, &mut panel);
            for (at, &v) in panel.iter().enumerate() {
                let (k, j) = (at / COLS, at % COLS);
                let want = if j < columns { 0.5 * x[k * stride + j] } else { 0.0 };
                assert_eq!(v, want, "k {k} of {rows}, column {j} of {columns}");
            }
        }
    }
}
