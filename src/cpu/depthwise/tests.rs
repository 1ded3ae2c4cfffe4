//! Every pass against plain loops, with kernels and steps that have tiles and such that have none.

use super::*;

fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}

/// n, h, w, c; kernel, stride and padding along height and width.
fn dims(
    [n, h, w, c]: [usize; 4],
    k: (usize, usize),
    stride: (usize, usize),
    pad: (usize, usize),
) -> Dims {
    let (p, q) = ((h + 2 * pad.0 - k.0) / stride.0 + 1, (w + 2 * pad.1 - k.1) / stride.1 + 1);
    Dims { n, h, w, c, o: c, kh: k.0, kw: k.1, p, q, stride, pad }
}

/// Calls `f(output index, input index, weight index)` for every product of the convolution.
fn every_product(d: &Dims, mut f: impl FnMut(usize, usize, usize)) {
    for (n, p, q) in (0..d.n * d.p * d.q).map(|i| (i / (d.p * d.q), i / d.q % d.p, i % d.q)) {
        for (r, s) in (0..d.kh * d.kw).map(|i| (i / d.kw, i % d.kw)) {
            let h = (p * d.stride.0 + r).wrapping_sub(d.pad.0);
            let w = (q * d.stride.1 + s).wrapping_sub(d.pad.1);
            if h >= d.h || w >= d.w {
                continue;
            }
            for c in 0..d.c {
                let (y, x) = (((n * d.p + p) * d.q + q) * d.c, ((n * d.h + h) * d.w + w) * d.c);
                f(y + c, x + c, (c * d.kh + r) * d.kw + s);
            }
        }
    }
}

fn close(got: &[f32], want: &[f64], what: &str, d: &Dims) {
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let shape = ([d.n, d.h, d.w, d.c], (d.kh, d.kw), d.stride, d.pad);
        assert!(
            (f64::from(*g) - w).abs() < 1e-4 * (1.0 + w.abs()),
            "{what} of {shape:?} at {i}: {g} for {w}"
        );
    }
}

fn agrees(d: &Dims) {
    let x = numbers(d.n * d.h * d.w * d.c, 1);
    let w = numbers(d.c * d.kh * d.kw, 2);
    let dy = numbers(d.n * d.p * d.q * d.c, 3);
    let bias = numbers(d.c, 4);
    let mut y: Vec<f64> = (0..dy.len()).map(|i| f64::from(bias[i % d.c])).collect();
    let (mut dx, mut dw) = (vec![0.0f64; x.len()], vec![0.0f64; w.len()]);
    every_product(d, |iy, ix, iw| {
        y[iy] += f64::from(x[ix]) * f64::from(w[iw]);
        dx[ix] += f64::from(dy[iy]) * f64::from(w[iw]);
        dw[iw] += f64::from(dy[iy]) * f64::from(x[ix]);
    });
    let mut got = vec![f32::NAN; y.len()];
    forward(d, &x, &w, Some(&bias), &mut got);
    close(&got, &y, "y", d);
    let mut got = vec![f32::NAN; x.len()];
    input_gradient(d, &dy, &w, &mut got);
    close(&got, &dx, "dx", d);
    let mut got = vec![f32::NAN; w.len()];
    weight_gradient(d, &x, &dy, &mut got);
    close(&got, &dw, "dw", d);
}

#[test]
fn all_passes_agree_with_plain_loops() {
    for k in [1, 2, 3, 5, 7] {
        for (stride, pad) in (1..4).flat_map(|s| (0..4).map(move |pad| (s, pad))) {
            // Every length of a tile, tiles without an edge, a map smaller than the kernel, and no, some and only vectors.
            for (h, w, c) in [(1, 1, 33), (2, 3, 8), (5, 4, 1), (7, 7, 7), (6, 21, 16), (9, 33, 9)]
            {
                if k <= h + 2 * pad && k <= w + 2 * pad {
                    agrees(&dims([2, h, w, c], (k, k), (stride, stride), (pad, pad)));
                }
            }
        }
    }
    agrees(&dims([2, 9, 11, 12], (2, 5), (3, 1), (0, 2)));
    agrees(&dims([2, 9, 11, 12], (4, 3), (1, 2), (2, 0)));
    // More channels than are done at a time, and as many tasks.
    agrees(&dims([1, 3, 4, 1000], (5, 5), (1, 1), (2, 2)));
    agrees(&dims([1, 6, 5, 333], (3, 3), (2, 2), (1, 1)));
}

#[test]
fn bits_do_not_depend_on_the_thread_count() {
    for (k, c) in [(5, 40), (3, 700), (4, 24)] {
        let d = dims([3, 20, 21, c], (k, k), (1, 1), (1, 1));
        let x = numbers(d.n * d.h * d.w * d.c, 1);
        let w = numbers(d.c * d.kh * d.kw, 2);
        let dy = numbers(d.n * d.p * d.q * d.c, 3);
        let all = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let (mut y, mut dx, mut dw) =
                    (vec![0.0; dy.len()], vec![0.0; x.len()], vec![0.0; w.len()]);
                forward(&d, &x, &w, None, &mut y);
                input_gradient(&d, &dy, &w, &mut dx);
                weight_gradient(&d, &x, &dy, &mut dw);
                (y, dx, dw)
            })
        };
        assert!(all(1) == all(3), "{k}x{k}, {c} channels");
    }
}
