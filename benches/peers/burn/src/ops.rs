//! Rows of single ops, NCHW as burn has it. Gradients are of all inputs and weights.

use crate::{Call, Calls};
use burn::tensor::activation::{relu, sigmoid, silu, softmax};
use burn::tensor::module::{adaptive_avg_pool2d, attention, batch_norm_train, conv2d, max_pool2d, unfold4d};
use burn::tensor::ops::{AttentionModuleOptions, ConvOptions, MaxPoolOptions, PadMode, UnfoldOptions};
use burn::tensor::{Bool, Device, Distribution, Int, Tensor};
use serde_json::Value;

/// Bytes of one tensor that a row may make (scores, unfolded keys).
const LARGEST: usize = 3 << 30;

/// A differentiable function of four-dimensional tensors; what has fewer dimensions has ones in front.
type Function = Box<dyn Fn(&[Tensor<4>]) -> Tensor<4>>;

pub fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// The calls of a row.
pub fn calls(s: &Value, device: &Device) -> Result<Calls, String> {
    let at = |name: &str| s[name].as_u64().unwrap_or_default() as usize;
    let (n, size, c) = (at("n"), at("size"), at("channels"));
    match s["op"].as_str().unwrap_or_default() {
        "conv2d" => {
            let (kernel, stride, out) = (at("kernel"), at("stride"), at("out"));
            let options = ConvOptions::new([stride, stride], [kernel / 2, kernel / 2], [1, 1], 1);
            let inputs = vec![random([n, c, size, size], device), random([out, c, kernel, kernel], device) * 0.05];
            // Pictures want no gradient.
            Ok(passes(inputs, usize::from(c == 3), Box::new(move |x| conv2d(x[0].clone(), x[1].clone(), None, options.clone()))))
        }
        "depthwise" => {
            let (kernel, stride) = (at("kernel"), at("stride"));
            let options = ConvOptions::new([stride, stride], [kernel / 2, kernel / 2], [1, 1], c);
            let inputs = vec![random([n, c, size, size], device), random([c, 1, kernel, kernel], device)];
            Ok(passes(inputs, 0, Box::new(move |x| conv2d(x[0].clone(), x[1].clone(), None, options.clone()))))
        }
        "squeeze_excite" => {
            let q = at("squeezed");
            let shapes = [[n, c, size, size], [q, c, 1, 1], [1, q, 1, 1], [c, q, 1, 1], [1, c, 1, 1]];
            Ok(passes(shapes.map(|shape| random(shape, device)).into(), 0, Box::new(squeeze_excite)))
        }
        "linear" => {
            let shapes = [[1, 1, at("rows"), at("inputs")], [1, 1, at("inputs"), at("outputs")]];
            let inputs = shapes.map(|shape| random(shape, device)).into();
            Ok(passes(inputs, 0, Box::new(|x| x[0].clone().matmul(x[1].clone()))))
        }
        "batch_norm" => {
            let mut inputs = vec![random([n, c, size, size], device), Tensor::ones([1, c, 1, 1], device), Tensor::zeros([1, c, 1, 1], device)];
            inputs.extend((s["residual"] == true).then(|| random([n, c, size, size], device)));
            Ok(passes(inputs, 0, Box::new(batch_norm_relu)))
        }
        "max_pool2d" => Ok(passes(
            vec![random([n, c, size, size], device)],
            0,
            Box::new(|x| max_pool2d(x[0].clone(), MaxPoolOptions::new([3, 3]).with_stride([2, 2]).with_padding([1, 1]))),
        )),
        "global_attention" => global_row(s, device),
        "local_attention" => local_row(s, device),
        op => Err(format!("no peer was written for {op}")),
    }
}

/// The forward, and with the backward to all inputs but the first `fixed`.
fn passes(inputs: Vec<Tensor<4>>, fixed: usize, function: Function) -> Calls {
    let function = std::rc::Rc::new(function);
    let tracked = |(i, x): (usize, &Tensor<4>)| {
        let x = x.clone().autodiff();
        if i < fixed { x } else { x.require_grad() }
    };
    let leaves: Vec<Tensor<4>> = inputs.iter().enumerate().map(tracked).collect();
    let y = function(&inputs);
    let upstream: Tensor<4> = random(y.dims(), &y.device()).autodiff();
    let (again, seen) = (function.clone(), leaves.clone());
    let forward: Call = Box::new(move || first(again(&seen)));
    let whole: Call = Box::new(move || {
        let y = function(&leaves);
        let gradients = (y * upstream.clone()).sum().backward();
        let all: Vec<_> = leaves[fixed..].iter().map(|x| x.grad(&gradients)).collect();
        all.into_iter().flatten().next().map_or_else(|| panic!("no gradient came"), first)
    });
    Calls { forward: Some(forward), whole }
}

/// The first number of a result, to look at.
fn first(y: Tensor<4>) -> Tensor<1> {
    let count = y.dims().iter().product::<usize>();
    y.reshape([count]).slice([0..1])
}

fn squeeze_excite(x: &[Tensor<4>]) -> Tensor<4> {
    let one = || ConvOptions::new([1, 1], [0, 0], [1, 1], 1);
    let squeezed = conv2d(adaptive_avg_pool2d(x[0].clone(), [1, 1]), x[1].clone(), None, one()) + x[2].clone();
    let gate = conv2d(silu(squeezed), x[3].clone(), None, one()) + x[4].clone();
    x[0].clone() * sigmoid(gate)
}

fn batch_norm_relu(x: &[Tensor<4>]) -> Tensor<4> {
    let channels = x[0].dims()[1];
    let (weight, bias) = (x[1].clone().reshape([channels]), x[2].clone().reshape([channels]));
    let y = batch_norm_train(x[0].clone(), weight, bias, 1e-5).output;
    relu(match x.get(3) {
        Some(residual) => y + residual.clone(),
        None => y,
    })
}

fn limit(what: &str, sizes: &[usize]) -> Result<(), String> {
    let bytes = 4 * sizes.iter().product::<usize>();
    match bytes > LARGEST {
        true => Err(format!("{what} would be {:.1} GiB", bytes as f64 / f64::from(1 << 30))),
        false => Ok(()),
    }
}

fn global_row(s: &Value, device: &Device) -> Result<Calls, String> {
    let at = |name: &str| s[name].as_u64().unwrap_or_default() as usize;
    let (n, size, heads, d) = (at("n"), at("size"), at("heads"), at("d"));
    // burn's backward is that of matmul-softmax-matmul.
    limit("scores of all pairs", &[n, heads, size * size, size * size])?;
    let mut inputs: Vec<Tensor<4>> = (0..3).map(|_| random([n, heads, size * size, d], device)).collect();
    match s["position"].as_str() {
        Some("none") => Ok(passes(
            inputs,
            0,
            Box::new(|x| attention(x[0].clone(), x[1].clone(), x[2].clone(), None, None, AttentionModuleOptions::default())),
        )),
        Some("rel") => {
            inputs.extend((0..2).map(|_| random([1, heads, 2 * size - 1, d], device)));
            Ok(passes(
                inputs,
                0,
                Box::new(move |x| {
                    let bias = relative_bias(x[0].clone(), &x[3], &x[4], size);
                    attention(x[0].clone(), x[1].clone(), x[2].clone(), None, Some(bias), AttentionModuleOptions::default())
                }),
            ))
        }
        _ => Err("no peer was written for a bias of each offset".into()),
    }
}

/// q . (rel_h[row offset] + rel_w[column offset]) for all pairs; tables `[1, heads, 2 size - 1, d]`.
fn relative_bias(q: Tensor<4>, rel_h: &Tensor<4>, rel_w: &Tensor<4>, size: usize) -> Tensor<4> {
    let [n, heads, count, d] = q.dims();
    let by_place = |table: &Tensor<4>| -> Tensor<5> {
        let place = |i: usize| (i % size) as i32 - (i / size) as i32 + size as i32 - 1;
        let offsets: Vec<i32> = (0..size * size).map(place).collect();
        let offsets: Tensor<1, Int> = Tensor::from_ints(offsets.as_slice(), &q.device());
        // [1, heads, own place, d, other place]
        table.clone().select(2, offsets).reshape([1, heads, size, size, d]).swap_dims(3, 4)
    };
    let map: Tensor<5> = q.clone().reshape([n, heads, size, size, d]);
    let by_row: Tensor<5> = map.clone().matmul(by_place(rel_h));
    let by_column: Tensor<5> = map.swap_dims(2, 3).matmul(by_place(rel_w)).swap_dims(2, 3);
    // Each row's number for every column, then each column's for every row.
    let rows: Vec<i32> = (0..count).map(|j| (j / size) as i32).collect();
    let rows: Tensor<1, Int> = Tensor::from_ints(rows.as_slice(), &by_row.device());
    let by_row: Tensor<4> = by_row.reshape([n, heads, count, size]).select(3, rows);
    let by_column: Tensor<4> = by_column.reshape([n, heads, count, size]).repeat_dim(3, size);
    by_row + by_column
}

/// Local attention the way it is usually written: keys and values copied by `unfold`.
fn local_row(s: &Value, device: &Device) -> Result<Calls, String> {
    let at = |name: &str| s[name].as_u64().unwrap_or_default() as usize;
    let (n, size, heads, d, window) = (at("n"), at("size"), at("heads"), at("d"), at("window"));
    limit("unfolded keys", &[n, heads * d, window * window, size * size])?;
    let mut inputs: Vec<Tensor<4>> = (0..3).map(|_| random([n, heads * d, size, size], device)).collect();
    match s["position"].as_str() {
        Some("none") => {}
        Some("rel") => {
            inputs.push(random([heads, d, window, 1], device) * 0.02);
            inputs.push(random([heads, d, 1, window], device) * 0.02);
        }
        _ => return Err("no peer was written for a bias of each offset".into()),
    }
    let mask = (s["border"] == "mask").then(|| outside(size, window, device));
    Ok(passes(inputs, 0, Box::new(move |x| local(x, heads, window, mask.as_ref()))))
}

fn unfold(x: Tensor<4>, window: usize) -> Tensor<3> {
    let reach = window / 2;
    let padded = x.pad((reach, reach, reach, reach), PadMode::Constant(0.0));
    unfold4d(padded, [window, window], UnfoldOptions::new([1, 1], [0, 0], [1, 1]))
}

/// Where a window's place lies outside the map: `[1, 1, window^2, size^2]`.
fn outside(size: usize, window: usize, device: &Device) -> Tensor<4, Bool> {
    let inside = unfold(Tensor::ones([1, 1, size, size], device), window);
    inside.reshape([1, 1, window * window, size * size]).equal_elem(0.0)
}

pub fn local(x: &[Tensor<4>], heads: usize, window: usize, mask: Option<&Tensor<4, Bool>>) -> Tensor<4> {
    let [n, c, h, w] = x[0].dims();
    let (d, count) = (c / heads, window * window);
    let spread = |x: Tensor<4>| -> Tensor<5> { unfold(x, window).reshape([n, heads, d, count, h * w]) };
    let mut keys = spread(x[1].clone());
    if let [_, _, _, rel_h, rel_w] = x {
        let shape = [heads, d, window, window];
        let tables = rel_h.clone().expand(shape) + rel_w.clone().expand(shape);
        let tables: Tensor<5> = tables.reshape([1, heads, d, count, 1]);
        keys = keys + tables;
    }
    let q: Tensor<5> = x[0].clone().reshape([n, heads, d, 1, h * w]);
    let logits: Tensor<4> = (q * keys).sum_dim(2).reshape([n, heads, count, h * w]) * (d as f64).powf(-0.5);
    let logits = match mask {
        Some(mask) => logits.mask_fill(mask.clone().expand([n, heads, count, h * w]), f32::NEG_INFINITY),
        None => logits,
    };
    let shares: Tensor<5> = softmax(logits, 2).reshape([n, heads, 1, count, h * w]);
    (shares * spread(x[2].clone())).sum_dim(3).reshape([n, c, h, w])
}
