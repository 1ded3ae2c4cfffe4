//! The matrix product all dense CPU kernels share: one register tile of up to 6 rows x 16 columns.
//!
//! [`tile`] is the micro-kernel: 12 vectors of 8 sums stay in registers (AVX2 + FMA where the CPU has them), each
//! step loads one row of 16 from B and broadcasts one number of A per row of the tile. The rows of A start wherever
//! the caller says, so a convolution multiplies straight from its image (no im2col copy); see `conv2d.rs`. [`gemm`]
//! is the plain product on top of it, for one thread and matrices that fit the cache.
//!
//! Measured (EPYC Zen 4, one thread, inner loop of 576): 105 GFLOP/s, of 113 that the best library reaches. The tile
//! must not take the address of an accumulator (an iterator over them in the store loop is enough): they then live in
//! memory, 41 GFLOP/s. Built with the checks of debug assertions on pointers: 33.
//!
//! Every element of C is summed over k in order by one thread, so the bits of a result depend neither on the thread
//! count nor on where the tile borders lie.

/// Rows of the largest tile.
pub(crate) const ROWS: usize = 6;
/// Columns of a tile.
pub(crate) const COLS: usize = 16;

/// What the rows of a tile have in common. The sum runs over `segments * k` terms: A is read in `segments` runs of
/// `k` numbers that lie `a_k` apart, run `i` starting `i * a_segment` after the row's start; B is read in one go, a
/// row of 16 every `b_row`.
#[derive(Clone, Copy)]
pub(crate) struct Sum {
    pub k: usize,
    pub a_k: usize,
    pub segments: usize,
    pub a_segment: usize,
    pub b_row: usize,
    /// The product is multiplied by this before it is stored or added.
    pub alpha: f32,
    /// Add to C instead of overwriting it.
    pub accumulate: bool,
}

/// C[i][0..16] = alpha * sum over k of A[i][k] * B[k][0..16] (added to C where `sum.accumulate`), for `rows <= 6`
/// rows. Row i of A starts at `a.add(a_rows[i])`, row i of C at `c.add(c_rows[i])`.
///
/// # Safety
/// All that `sum` reaches from `a` (for each row) and from `b`, and 16 numbers at each row of C, lie inside live
/// allocations; nobody else touches those rows of C meanwhile; the rows of C do not overlap. `1 <= rows <= 6`, `a_rows`
/// and `c_rows` have at least `rows` entries.
#[inline]
pub(crate) unsafe fn tile(
    sum: &Sum,
    rows: usize,
    a: *const f32,
    a_rows: &[usize],
    b: *const f32,
    c: *mut f32,
    c_rows: &[usize],
) {
    // SAFETY: passed on to the caller; the AVX2 versions are reached only where the CPU has AVX2 and FMA.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if super::simd::has_avx2_fma() {
            return match rows {
                6 => tile_avx2::<6>(sum, a, a_rows, b, c, c_rows),
                5 => tile_avx2::<5>(sum, a, a_rows, b, c, c_rows),
                4 => tile_avx2::<4>(sum, a, a_rows, b, c, c_rows),
                3 => tile_avx2::<3>(sum, a, a_rows, b, c, c_rows),
                2 => tile_avx2::<2>(sum, a, a_rows, b, c, c_rows),
                _ => tile_avx2::<1>(sum, a, a_rows, b, c, c_rows),
            };
        }
        match rows {
            6 => tile_any::<6>(sum, a, a_rows, b, c, c_rows),
            5 => tile_any::<5>(sum, a, a_rows, b, c, c_rows),
            4 => tile_any::<4>(sum, a, a_rows, b, c, c_rows),
            3 => tile_any::<3>(sum, a, a_rows, b, c, c_rows),
            2 => tile_any::<2>(sum, a, a_rows, b, c, c_rows),
            _ => tile_any::<1>(sum, a, a_rows, b, c, c_rows),
        }
    }
}

/// [`tile`] for AVX2 and FMA: 2 x M accumulators, two loads of B and M broadcasts a step.
///
/// # Safety
/// As [`tile`]; `rows` is M.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2<const M: usize>(
    sum: &Sum,
    a: *const f32,
    a_rows: &[usize],
    mut b: *const f32,
    c: *mut f32,
    c_rows: &[usize],
) {
    use std::arch::x86_64::*;
    let mut acc = [[_mm256_setzero_ps(); 2]; M];
    let mut row = [a; M];
    // SAFETY: the caller vouches for all addresses that `sum` reaches.
    unsafe {
        for i in 0..M {
            row[i] = a.add(a_rows[i]);
        }
        for segment in 0..sum.segments {
            let mut at = segment * sum.a_segment;
            for _ in 0..sum.k {
                let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for i in 0..M {
                    let x = _mm256_broadcast_ss(&*row[i].add(at));
                    acc[i][0] = _mm256_fmadd_ps(x, b0, acc[i][0]);
                    acc[i][1] = _mm256_fmadd_ps(x, b1, acc[i][1]);
                }
                at = at.wrapping_add(sum.a_k);
                b = b.wrapping_add(sum.b_row);
            }
        }
        // Plain indices and constants: the accumulators must not need an address, or they are kept in memory.
        let alpha = _mm256_set1_ps(sum.alpha);
        for i in 0..M {
            let (y0, y1) = (c.add(c_rows[i]), c.add(c_rows[i]).add(8));
            let (mut v0, mut v1) =
                (_mm256_mul_ps(alpha, acc[i][0]), _mm256_mul_ps(alpha, acc[i][1]));
            if sum.accumulate {
                v0 = _mm256_add_ps(_mm256_loadu_ps(y0), v0);
                v1 = _mm256_add_ps(_mm256_loadu_ps(y1), v1);
            }
            _mm256_storeu_ps(y0, v0);
            _mm256_storeu_ps(y1, v1);
        }
    }
}

/// [`tile`] for any CPU; the loops over the 16 columns are left to the compiler's vectoriser.
///
/// # Safety
/// As [`tile`]; `rows` is M.
unsafe fn tile_any<const M: usize>(
    sum: &Sum,
    a: *const f32,
    a_rows: &[usize],
    mut b: *const f32,
    c: *mut f32,
    c_rows: &[usize],
) {
    let mut acc = [[0.0f32; COLS]; M];
    // SAFETY: the caller vouches for all addresses that `sum` reaches.
    unsafe {
        for segment in 0..sum.segments {
            let mut at = segment * sum.a_segment;
            for _ in 0..sum.k {
                let brow = b.cast::<[f32; COLS]>().read_unaligned();
                for (acc, &offset) in acc.iter_mut().zip(a_rows) {
                    let x = *a.add(offset + at);
                    for (s, y) in acc.iter_mut().zip(brow) {
                        *s += x * y;
                    }
                }
                at = at.wrapping_add(sum.a_k);
                b = b.wrapping_add(sum.b_row);
            }
        }
        for (acc, &offset) in acc.iter().zip(c_rows) {
            let y = c.add(offset);
            for (j, v) in acc.iter().enumerate() {
                let y = y.add(j);
                let old = if sum.accumulate { *y } else { 0.0 };
                *y = sum.alpha * v + old;
            }
        }
    }
}

/// [`tile`] for the last columns of a matrix: only the first `cols < 16` of each row are written. B still gives 16
/// numbers a row (pad a packed B, or copy the columns that are left).
///
/// # Safety
/// As [`tile`], with `cols` numbers at each row of C.
pub(crate) unsafe fn tile_narrow(
    sum: &Sum,
    rows: usize,
    cols: usize,
    a: *const f32,
    a_rows: &[usize],
    b: *const f32,
    c: *mut f32,
    c_rows: &[usize],
) {
    let mut full = [[0.0f32; COLS]; ROWS];
    const FULL_ROWS: [usize; ROWS] = [0, COLS, 2 * COLS, 3 * COLS, 4 * COLS, 5 * COLS];
    // SAFETY: `full` holds 6 rows of 16; the rest is the caller's promise.
    unsafe {
        tile(
            &Sum { accumulate: false, ..*sum },
            rows,
            a,
            a_rows,
            b,
            full.as_mut_ptr().cast(),
            &FULL_ROWS,
        );
        for (row, &offset) in full.iter().zip(&c_rows[..rows]) {
            let y = std::slice::from_raw_parts_mut(c.add(offset), cols);
            for (y, v) in y.iter_mut().zip(row) {
                *y = if sum.accumulate { *y + v } else { *v };
            }
        }
    }
}

/// C[m, n] = alpha * A[m, k] B[k, n], or C += that where `accumulate`; one thread, no allocation.
///
/// A has any strides: element (i, p) is `a[i * a_row + p * a_k]`, so a transposed A costs nothing. The rows of B and
/// C are contiguous: `b[p * b_row + j]`, `c[i * c_row + j]`. C with `k = 0` is zero (or stays, with `accumulate`).
/// Meant for matrices that fit the cache: B is read once per 6 rows of A, 16 columns at a time.
///
/// # Panics
/// Where a slice is too short for its strides, or rows of C overlap: a bug of the caller, who checked the shapes.
pub(crate) fn gemm(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: &[f32],
    a_row: usize,
    a_k: usize,
    b: &[f32],
    b_row: usize,
    accumulate: bool,
    c: &mut [f32],
    c_row: usize,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(k == 0 || (m - 1) * a_row + (k - 1) * a_k < a.len(), "gemm: A is too short");
    assert!(k == 0 || (k - 1) * b_row + n <= b.len(), "gemm: B is too short");
    assert!(
        (m - 1) * c_row + n <= c.len() && (m == 1 || c_row >= n),
        "gemm: C is too short or its rows overlap"
    );
    let whole = n - n % COLS;
    let sum = Sum { k, a_k, segments: 1, a_segment: 0, b_row, alpha, accumulate };
    for j in (0..whole).step_by(COLS) {
        // SAFETY: the asserts above cover all m rows and columns j..j+16 <= n; C is borrowed mutably and its rows do
        // not overlap.
        unsafe {
            let (b, c) = (b.as_ptr().wrapping_add(j), c.as_mut_ptr().wrapping_add(j));
            panel(m, &sum, a.as_ptr(), a_row, b, c, c_row);
        }
    }
    if whole < n {
        last_columns(
            m,
            n - whole,
            &sum,
            a,
            a_row,
            &b[whole.min(b.len())..],
            &mut c[whole..],
            c_row,
        );
    }
}

/// One panel of 16 columns of a product: all rows of A and C, `a_row` and `c_row` apart.
///
/// # Safety
/// As [`tile`], for m rows.
unsafe fn panel(
    m: usize,
    sum: &Sum,
    a: *const f32,
    a_row: usize,
    b: *const f32,
    c: *mut f32,
    c_row: usize,
) {
    // SAFETY: passed on to the caller; the AVX2 version is reached only where the CPU has AVX2 and FMA.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if super::simd::has_avx2_fma() {
            return panel_avx2(m, sum, a, a_row, b, c, c_row);
        }
        for i in (0..m).step_by(ROWS) {
            let a_rows: [usize; ROWS] = std::array::from_fn(|r| (i + r) * a_row);
            let c_rows: [usize; ROWS] = std::array::from_fn(|r| (i + r) * c_row);
            tile(sum, ROWS.min(m - i), a, &a_rows, b, c, &c_rows);
        }
    }
}

/// [`panel`] for AVX2 and FMA. A loop of its own, because the rows are evenly spaced: with short sums (k = 32 in
/// attention) the row tables and the calls of [`tile`] cost a third of the time.
///
/// # Safety
/// As [`panel`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn panel_avx2(
    m: usize,
    sum: &Sum,
    a: *const f32,
    a_row: usize,
    b: *const f32,
    c: *mut f32,
    c_row: usize,
) {
    let whole = m - m % ROWS;
    // SAFETY: the caller vouches for m rows of A and C.
    unsafe {
        for i in (0..whole).step_by(ROWS) {
            strip_avx2::<ROWS>(sum, a.add(i * a_row), a_row, b, c.add(i * c_row), c_row);
        }
        let (a, c) = (a.wrapping_add(whole * a_row), c.wrapping_add(whole * c_row));
        match m - whole {
            0 => {}
            1 => strip_avx2::<1>(sum, a, a_row, b, c, c_row),
            2 => strip_avx2::<2>(sum, a, a_row, b, c, c_row),
            3 => strip_avx2::<3>(sum, a, a_row, b, c, c_row),
            4 => strip_avx2::<4>(sum, a, a_row, b, c, c_row),
            _ => strip_avx2::<5>(sum, a, a_row, b, c, c_row),
        }
    }
}

/// M rows of [`panel_avx2`].
///
/// # Safety
/// As [`panel`], for M rows.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn strip_avx2<const M: usize>(
    sum: &Sum,
    a: *const f32,
    a_row: usize,
    b: *const f32,
    c: *mut f32,
    c_row: usize,
) {
    use std::arch::x86_64::*;
    let mut acc = [[_mm256_setzero_ps(); 2]; M];
    let (mut a, mut b) = (a, b);
    // SAFETY: the caller vouches for all addresses that `sum` reaches.
    unsafe {
        for _ in 0..sum.k {
            let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
            #[allow(
                clippy::needless_range_loop,
                reason = "M rows in registers: the plainest loop unrolls best"
            )]
            for i in 0..M {
                let x = _mm256_broadcast_ss(&*a.add(i * a_row));
                acc[i][0] = _mm256_fmadd_ps(x, b0, acc[i][0]);
                acc[i][1] = _mm256_fmadd_ps(x, b1, acc[i][1]);
            }
            a = a.wrapping_add(sum.a_k);
            b = b.wrapping_add(sum.b_row);
        }
        let alpha = _mm256_set1_ps(sum.alpha);
        for (i, acc) in acc.iter().enumerate() {
            for (half, &v) in acc.iter().enumerate() {
                let y = c.add(i * c_row + 8 * half);
                let v = match sum.accumulate {
                    true => _mm256_fmadd_ps(alpha, v, _mm256_loadu_ps(y)),
                    false => _mm256_mul_ps(alpha, v),
                };
                _mm256_storeu_ps(y, v);
            }
        }
    }
}

/// The last `cols < 16` columns of a product: B is copied block by block into rows of 16 so that the tile may read
/// whole rows.
fn last_columns(
    m: usize,
    cols: usize,
    sum: &Sum,
    a: &[f32],
    a_row: usize,
    b: &[f32],
    c: &mut [f32],
    c_row: usize,
) {
    const BLOCK: usize = 128;
    let mut block = [[0.0f32; COLS]; BLOCK];
    let mut first = 0;
    loop {
        let k = BLOCK.min(sum.k - first);
        for (p, row) in block[..k].iter_mut().enumerate() {
            let start = (first + p) * sum.b_row;
            row[..cols].copy_from_slice(&b[start..start + cols]);
        }
        let part = Sum { k, b_row: COLS, accumulate: sum.accumulate || first > 0, ..*sum };
        for i in (0..m).step_by(ROWS) {
            let a_rows: [usize; ROWS] = std::array::from_fn(|r| (i + r) * a_row + first * sum.a_k);
            let c_rows: [usize; ROWS] = std::array::from_fn(|r| (i + r) * c_row);
            // SAFETY: `gemm` checked A and C; `block` holds k rows of 16.
            unsafe {
                tile_narrow(
                    &part,
                    ROWS.min(m - i),
                    cols,
                    a.as_ptr(),
                    &a_rows,
                    block.as_ptr().cast(),
                    c.as_mut_ptr(),
                    &c_rows,
                )
            };
        }
        first += k;
        if first >= sum.k {
            return;
        }
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

    /// Every combination of tails, A plain and transposed, C overwritten and added to, with guard words beside the
    /// rows of C.
    #[test]
    fn agrees_with_three_loops() {
        for (m, n, k) in [
            (1, 1, 1),
            (6, 16, 8),
            (7, 17, 5),
            (13, 33, 129),
            (5, 15, 300),
            (64, 64, 64),
            (3, 40, 1),
            (12, 7, 0),
        ] {
            for transposed in [false, true] {
                for accumulate in [false, true] {
                    let (b_row, c_row, alpha) = (n + 3, n + 1, 0.5);
                    let (a_row, a_k) = if transposed { (1, m + 2) } else { (k + 2, 1) };
                    let a = numbers((m + 2) * (k + 2), 1);
                    let b = numbers(k * b_row + n, 2);
                    let before = numbers(m * c_row, 3);
                    let mut c = before.clone();
                    gemm(m, n, k, alpha, &a, a_row, a_k, &b, b_row, accumulate, &mut c, c_row);
                    for i in 0..m {
                        assert_eq!(c[i * c_row + n], before[i * c_row + n], "guard of row {i}");
                        for j in 0..n {
                            let sum: f64 = (0..k)
                                .map(|p| (a[i * a_row + p * a_k] * b[p * b_row + j]) as f64)
                                .sum();
                            let want = alpha as f64 * sum
                                + if accumulate { before[i * c_row + j] as f64 } else { 0.0 };
                            let got = c[i * c_row + j] as f64;
                            assert!(
                                (got - want).abs() < 1e-4,
                                "{m}x{n}x{k} transposed {transposed} accumulate {accumulate} at {i},{j}: {got} for {want}"
                            );
                        }
                    }
                }
            }
        }
    }

    /// The portable tile gives what the fast one gives, to rounding.
    #[test]
    fn portable_tile_agrees() {
        let (k, rows) = (37, 5);
        let (a, b) = (numbers(rows * k, 4), numbers(k * COLS, 5));
        let offsets = |stride: usize| -> Vec<usize> { (0..rows).map(|i| i * stride).collect() };
        let sum = Sum {
            k,
            a_k: 1,
            segments: 1,
            a_segment: 0,
            b_row: COLS,
            alpha: 2.0,
            accumulate: false,
        };
        let (mut fast, mut any) = (vec![0.0; rows * COLS], vec![0.0; rows * COLS]);
        // SAFETY: the buffers hold exactly the rows that `sum` reaches.
        unsafe {
            tile(
                &sum,
                rows,
                a.as_ptr(),
                &offsets(k),
                b.as_ptr(),
                fast.as_mut_ptr(),
                &offsets(COLS),
            );
            tile_any::<5>(
                &sum,
                a.as_ptr(),
                &offsets(k),
                b.as_ptr(),
                any.as_mut_ptr(),
                &offsets(COLS),
            );
        }
        for (x, y) in fast.iter().zip(&any) {
            assert!((x - y).abs() < 1e-5, "{x} and {y}");
        }
    }
}
