//! Fused attention on any device, forward and backward, against the textbook's.
//!
//!     cargo run --release --example 01_fused_attention                  the best device there is
//!     cargo run --release --example 01_fused_attention -- wgpu 28       another device, a map of 28x28
//!
//! Every place of a feature map attends to every place, with learned relative positions: softmax(q.k / sqrt(d) + q.(rel_h +
//! rel_w)) v. The fused kernels never store the scores; `plain` below computes each of them, in f64, and is the judge.

use attn2d::ops::{GlobalAttention, global_attention};
use attn2d::tensor::philox::Philox;
use attn2d::{Device, Error, Result, Tensor};
use std::time::{Duration, Instant};

const IMAGES: usize = 2;
const HEADS: usize = 4;
/// Channels of a head.
const D: usize = 32;
/// What is compared: the output, and the gradient of each input.
const NAMES: [&str; 6] = ["y", "dq", "dk", "dv", "drel_h", "drel_w"];
/// Allowed error, as a share of the largest magnitude.
const TOLERANCE: f64 = 1e-4;

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let device = Device::new(&words.next().unwrap_or_else(|| "auto".into()))?;
    let side = words.next().map_or(Ok(14), |word| word.parse::<usize>());
    let side = side.map_err(|e| Error::usage(format!("the map's side: {e}")))?;

    // Tokens are [N, H, W, heads, d]; tables have a row for each offset between two places, from the smallest on.
    let tokens = [IMAGES, side, side, HEADS, D];
    let table = [2 * side - 1, HEADS * D];
    let random = |op, shape: &[usize]| {
        let stream = Philox { seed: 1, step: 0, op };
        Ok::<_, Error>(Tensor::randn(&device, shape, stream)?.requires_grad())
    };
    let (q, k, v) = (random(0, &tokens)?, random(1, &tokens)?, random(2, &tokens)?);
    let (rel_h, rel_w) = (random(3, &table)?, random(4, &table)?);
    let dy = random(5, &tokens)?.detach();

    let fused = || {
        let options =
            GlobalAttention { rel_h: Some(&rel_h), rel_w: Some(&rel_w), ..Default::default() };
        let y = global_attention(&q, &k, &v, options)?;
        let gradients = y.backward_with(&dy)?;
        device.sync()?;
        Ok::<_, Error>((y, gradients))
    };
    fused()?; // compiles the kernels
    let before = device.memory().live;
    device.reset_peak();
    let (y, gradients) = fused()?;
    let peak = device.memory().peak - before;
    let time = median(5, || fused().map(drop))?;

    let mut results = vec![y.to_f32()?];
    for input in [&q, &k, &v, &rel_h, &rel_w] {
        let gradient = gradients.get(input).expect("every input asked for a gradient");
        results.push(gradient.to_f32()?);
    }
    let inputs = [&q, &k, &v, &rel_h, &rel_w, &dy].map(Tensor::to_f32);
    let inputs = inputs.into_iter().collect::<Result<Vec<_>>>()?;
    let start = Instant::now();
    let expected = plain(side, &inputs);
    let plain_time = start.elapsed();

    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    let scores = mib(4 * IMAGES * HEADS * side.pow(4));
    println!("device   {} ({})", device.name(), device.caps().adapter);
    println!("map      {IMAGES} images of {side}x{side}, {HEADS} heads of {D} channels");
    println!("fused    {time:.1?} forward and backward, {:.1} MiB beside the inputs", mib(peak));
    println!("plain    {plain_time:.1?} on one CPU thread; all scores would take {scores:.1} MiB");
    if !agree(&results, &expected) {
        return Err(Error::device(device.name(), "fused and plain attention differ"));
    }
    println!("fused and plain attention agree");
    Ok(())
}

/// Prints how far output and gradients are from the textbook's; whether that is near enough.
fn agree(got: &[Vec<f32>], want: &[Vec<f64>]) -> bool {
    let mut agree = true;
    for ((name, got), want) in NAMES.iter().zip(got).zip(want) {
        let largest = want.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        let gaps = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).abs());
        let error = gaps.fold(0.0, f64::max) / largest;
        println!("error    {name:7} {error:.1e} of its largest element");
        agree &= error < TOLERANCE;
    }
    agree
}

/// Output and gradients by the formula, one score after the other. `x` is q, k, v, rel_h, rel_w and the output's gradient.
fn plain(side: usize, x: &[Vec<f32>]) -> Vec<Vec<f64>> {
    let x: Vec<Vec<f64>> = x.iter().map(|v| v.iter().copied().map(f64::from).collect()).collect();
    let [q, k, v, rel_h, rel_w, dy] = &x[..] else { unreachable!("six inputs") };
    let scale = 1.0 / (D as f64).sqrt();
    let places = side * side;
    // y and dq, dk, dv, drel_h, drel_w
    let mut out: Vec<Vec<f64>> = [q, q, k, v, rel_h, rel_w].map(|x| vec![0.0; x.len()]).into();
    for image_head in 0..IMAGES * HEADS {
        let (image, head) = (image_head / HEADS, image_head % HEADS);
        let token = |place: usize| ((image * places + place) * HEADS + head) * D;
        for query in 0..places {
            let i = token(query);
            // Where the key's row of each table begins: offset 0 is row side - 1.
            let rows = |key: usize| {
                let a = key / side + side - 1 - query / side;
                let b = key % side + side - 1 - query % side;
                ((a * HEADS + head) * D, (b * HEADS + head) * D)
            };
            let logit = |key: usize| {
                let (j, (a, b)) = (token(key), rows(key));
                let term = |c| q[i + c] * (scale * k[j + c] + rel_h[a + c] + rel_w[b + c]);
                (0..D).map(term).sum::<f64>()
            };
            let logits: Vec<f64> = (0..places).map(logit).collect();
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|l| (l - top).exp()).sum();
            let p: Vec<f64> = logits.iter().map(|l| (l - top).exp() / sum).collect();
            // The gradient of p, and of the logits behind the softmax.
            let dot = |key: usize| (0..D).map(|c| dy[i + c] * v[token(key) + c]).sum::<f64>();
            let dp: Vec<f64> = (0..places).map(dot).collect();
            let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for key in 0..places {
                let (j, (a, b)) = (token(key), rows(key));
                let ds = p[key] * (dp[key] - delta);
                for c in 0..D {
                    out[0][i + c] += p[key] * v[j + c];
                    out[1][i + c] += ds * (scale * k[j + c] + rel_h[a + c] + rel_w[b + c]);
                    out[2][j + c] += ds * scale * q[i + c];
                    out[3][j + c] += p[key] * dy[i + c];
                    out[4][a + c] += ds * q[i + c];
                    out[5][b + c] += ds * q[i + c];
                }
            }
        }
    }
    out
}

/// The median time of some runs.
fn median(count: usize, run: impl Fn() -> Result<()>) -> Result<Duration> {
    let mut times = Vec::new();
    for _ in 0..count {
        let start = Instant::now();
        run()?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[count / 2])
}
