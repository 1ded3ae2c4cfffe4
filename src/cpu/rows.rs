//! Ways to share out the rows of a `[rows, C]` array among the threads. The parts are fixed by the shape alone, so no
//! result depends on how many threads there are.

use rayon::prelude::*;

/// Below this many elements a second thread costs more than it brings.
const SMALL: usize = 16 * 1024;

/// Elements of a slab in passes that only map: 64 KiB, a good bite for one thread's second-level cache.
const SLAB: usize = 16 * 1024;

/// A slab length that is a whole number of rows of `row` elements.
pub(crate) fn slab_len(row: usize) -> usize {
    (SLAB / row.max(1)).max(1) * row.max(1)
}

/// `each!(y, len, size, |i, slab| ..)` runs the body for the slabs of `len` elements of `y`, compiled for this CPU's vector
/// unit. `size` is the number of elements the whole job reads: it decides whether the threads are worth waking.
///
/// A macro for the same reason as `simd::vectorise!`, which it contains: the body has to be written out once for each
/// version. With a function that calls a closure instead, batch norm took 1.8 times as long and max
/// pooling 2.5 times.
macro_rules! each {
    ($y:expr, $len:expr, $size:expr, |$i:pat_param, $slab:pat_param| $body:expr) => {
        $crate::cpu::rows::share($y, $len, $size, &|i, slab| {
            $crate::cpu::simd::vectorise!(|| {
                let ($i, $slab) = (i, slab);
                $body
            })
        })
    };
}
pub(crate) use each;

/// As [`each!`], over the slabs of two arrays side by side: `each2!((a, len_a), (b, len_b), size, |i, a, b| ..)`.
macro_rules! each2 {
    ($a:expr, $b:expr, $size:expr, |$i:pat_param, $slab_a:pat_param, $slab_b:pat_param| $body:expr) => {
        $crate::cpu::rows::share2($a, $b, $size, &|i, a, b| {
            $crate::cpu::simd::vectorise!(|| {
                let ($i, $slab_a, $slab_b) = (i, a, b);
                $body
            })
        })
    };
}
pub(crate) use each2;

/// What [`each!`] expands to: `work(i, slab i)` for every slab, on all threads where that pays.
pub(crate) fn share<T: Send>(
    y: &mut [T],
    len: usize,
    size: usize,
    work: &(dyn Fn(usize, &mut [T]) + Sync),
) {
    let len = len.max(1);
    if size <= SMALL {
        y.chunks_mut(len).enumerate().for_each(|(i, y)| work(i, y));
    } else {
        y.par_chunks_mut(len).enumerate().for_each(|(i, y)| work(i, y));
    }
}

/// What is done with slab i of two slices.
type Work2<'w, A, B> = dyn Fn(usize, &mut [A], &mut [B]) + Sync + 'w;

/// What [`each2!`] expands to.
pub(crate) fn share2<A: Send, B: Send>(
    (a, len_a): (&mut [A], usize),
    (b, len_b): (&mut [B], usize),
    size: usize,
    work: &Work2<'_, A, B>,
) {
    let (len_a, len_b) = (len_a.max(1), len_b.max(1));
    if size <= SMALL {
        let slabs = a.chunks_mut(len_a).zip(b.chunks_mut(len_b)).enumerate();
        slabs.for_each(|(i, (a, b))| work(i, a, b));
    } else {
        let slabs = a.par_chunks_mut(len_a).zip(b.par_chunks_mut(len_b)).enumerate();
        slabs.for_each(|(i, (a, b))| work(i, a, b));
    }
}

/// `add(&mut sum[c], x[r, c], c)` for every element of `x [rows, C]`: four rows at a time, so that `sum` passes through
/// the cache a quarter as often. Rows are taken in order.
#[inline(always)]
pub(crate) fn fold(x: &[f32], sum: &mut [f32], add: impl Fn(&mut f32, f32, usize)) {
    let c = sum.len();
    let mut fours = x.chunks_exact(4 * c);
    for four in &mut fours {
        let rows: [&[f32]; 4] = std::array::from_fn(|r| &four[r * c..][..c]);
        for i in 0..c {
            let mut s = sum[i];
            for row in rows {
                add(&mut s, row[i], i);
            }
            sum[i] = s;
        }
    }
    for row in fours.remainder().chunks_exact(c) {
        for i in 0..c {
            add(&mut sum[i], row[i], i);
        }
    }
}

/// The sums of each column over blocks of `block` rows: `x [rows, C] -> part [blocks, C]`.
pub(crate) fn sum_blocks(x: &[f32], c: usize, block: usize, part: &mut [f32]) {
    each!(part, c, x.len(), |i, part| {
        let x = &x[i * block * c..];
        part.fill(0.0);
        fold(&x[..(block * c).min(x.len())], part, |sum, x, _| *sum += x);
    });
}

/// The sum of `f(i)` over `0..n` in sixteen lanes: the second level is f64, so long rows keep their accuracy.
#[inline(always)]
pub(crate) fn sum_by(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    const LANES: usize = 16;
    const BLOCK: usize = 4096;
    let mut total = 0.0f64;
    let mut start = 0;
    while start < n {
        let end = (start + BLOCK).min(n);
        let mut lanes = [0.0f32; LANES];
        let mut i = start;
        while i + LANES <= end {
            for (l, lane) in lanes.iter_mut().enumerate() {
                *lane += f(i + l);
            }
            i += LANES;
        }
        while i < end {
            lanes[i % LANES] += f(i);
            i += 1;
        }
        total += lanes.iter().map(|&v| f64::from(v)).sum::<f64>();
        start = end;
    }
    total as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_columns_and_of_rows() {
        for (rows, c, block) in [(1usize, 1, 1), (7, 3, 4), (33, 17, 8), (1000, 64, 129)] {
            let x: Vec<f32> = (0..rows * c).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
            let mut part = vec![f32::NAN; rows.div_ceil(block) * c];
            sum_blocks(&x, c, block, &mut part);
            for i in 0..c {
                let want: f32 = (0..rows).map(|r| x[r * c + i]).sum();
                let got: f32 = part.iter().skip(i).step_by(c).sum();
                assert_eq!(got, want, "column {i} of [{rows}, {c}]");
            }
            assert_eq!(sum_by(x.len(), |i| x[i]), x.iter().sum::<f32>());
        }
    }
}
