//! Fused attention on any device, forward and backward, against the textbook's.
//!
//!     cargo run --release --example 01_fused_attention                  the best device there is
//!     cargo run --release --example 01_fused_attention -- cpu 28        another device, a map of 28x28
//!     cargo run --release --example 01_fused_attention -- cpu 28 7      a 7x7 window in place of the whole map
//!
//! Every place of a feature map attends to every place, or to those in a window round it, with learned relative positions:
//! softmax(q.k / sqrt(d) + q.(rel_h + rel_w)) v. The fused kernels never store the scores; `plain` below computes each of them, in f64, and is the judge.

use attn2d::ops::{GlobalAttention, LocalAttention, global_attention, local_attention};
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

/// Device, side of the map and side of the window from the command line.
fn arguments() -> Result<(Device, usize, Option<usize>)> {
    let mut words = std::env::args().skip(1);
    let device = Device::new(&words.next().unwrap_or_else(|| "auto".into()))?;
    let number = |word: String| match word.parse::<usize>() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(Error::usage(format!("'{word}' is no side of a map or window: give 1 or more"))),
    };
    let side = words.next().map_or(Ok(14), number)?;
    Ok((device, side, words.next().map(number).transpose()?))
}

/// The fused op: over the whole map, or in a window.
fn attention(window: Option<usize>, inputs: [&Tensor; 5]) -> Result<Tensor> {
    let [q, k, v, rel_h, rel_w] = inputs;
    let (rel_h, rel_w) = (Some(rel_h), Some(rel_w));
    match window {
        None => {
            let options = GlobalAttention { rel_h, rel_w, ..Default::default() };
            global_attention(q, k, v, options)
        }
        Some(window) => {
            let window = (window, window);
            let options = LocalAttention { window, rel_h, rel_w, ..Default::default() };
            local_attention(q, k, v, options)
        }
    }
}

fn main() -> Result<()> {
    let (device, side, window) = arguments()?;
    // How far a query sees.
    let reach = window.map_or(side - 1, |window| window / 2);

    // Tokens are [N, H, W, heads, d]; tables have a row for each offset between two places, from the smallest on.
    let tokens = [IMAGES, side, side, HEADS, D];
    let table = [2 * reach + 1, HEADS * D];
    let random = |op, shape: &[usize]| {
        let stream = Philox { seed: 1, step: 0, op };
        Ok::<_, Error>(Tensor::randn(&device, shape, stream)?.requires_grad())
    };
    let (q, k, v) = (random(0, &tokens)?, random(1, &tokens)?, random(2, &tokens)?);
    let (rel_h, rel_w) = (random(3, &table)?, random(4, &table)?);
    let dy = random(5, &tokens)?.detach();

    let fused = || {
        let y = attention(window, [&q, &k, &v, &rel_h, &rel_w])?;
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
    let expected = plain(side, reach, &inputs);
    let plain_time = start.elapsed();

    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    let scores = mib(4 * IMAGES * HEADS * side.pow(2) * side.min(2 * reach + 1).pow(2));
    println!("device   {} ({})", device.name(), device.caps().adapter);
    println!("map      {IMAGES} images of {side}x{side}, {HEADS} heads of {D} channels");
    match window {
        None => println!("window   the whole map"),
        Some(window) => {
            println!("window   {window}x{window}, what it sees outside the map is masked")
        }
    }
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

/// Output and gradients by the formula, one score after the other: a query sees the places of the map that are at most
/// `reach` rows and columns away. `x` is q, k, v, rel_h, rel_w and the output's gradient.
fn plain(side: usize, reach: usize, x: &[Vec<f32>]) -> Vec<Vec<f64>> {
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
            let near = |a: usize, b: usize| a.abs_diff(b) <= reach;
            let seen =
                |&key: &usize| near(key / side, query / side) && near(key % side, query % side);
            let keys: Vec<usize> = (0..places).filter(seen).collect();
            // Where the key's row of each table begins: offset 0 is row `reach`.
            let rows = |key: usize| {
                let a = key / side + reach - query / side;
                let b = key % side + reach - query % side;
                ((a * HEADS + head) * D, (b * HEADS + head) * D)
            };
            let logit = |&key: &usize| {
                let (j, (a, b)) = (token(key), rows(key));
                let term = |c| q[i + c] * (scale * k[j + c] + rel_h[a + c] + rel_w[b + c]);
                (0..D).map(term).sum::<f64>()
            };
            let logits: Vec<f64> = keys.iter().map(logit).collect();
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|l| (l - top).exp()).sum();
            let p: Vec<f64> = logits.iter().map(|l| (l - top).exp() / sum).collect();
            // The gradient of p, and of the logits behind the softmax.
            let dot = |&key: &usize| (0..D).map(|c| dy[i + c] * v[token(key) + c]).sum::<f64>();
            let dp: Vec<f64> = keys.iter().map(dot).collect();
            let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for ((&key, p), dp) in keys.iter().zip(&p).zip(&dp) {
                let (j, (a, b)) = (token(key), rows(key));
                let ds = p * (dp - delta);
                for c in 0..D {
                    out[0][i + c] += p * v[j + c];
                    out[1][i + c] += ds * (scale * k[j + c] + rel_h[a + c] + rel_w[b + c]);
                    out[2][j + c] += ds * scale * q[i + c];
                    out[3][j + c] += p * dy[i + c];
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
