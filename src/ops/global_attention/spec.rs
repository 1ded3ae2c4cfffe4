//! Conformance of global attention: cases, and the formula in f64 by plain loops.

use super::{GlobalAttention, OP, global_attention};
use crate::error::Result;
use crate::ops::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};

/// Conformance of [`global_attention`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[
        Port::new("q", Layout::Plain).stored(),
        Port::new("k", Layout::Plain).stored(),
        Port::new("v", Layout::Plain).stored(),
        Port::new("rel_h", Layout::Plain).optional(),
        Port::new("rel_w", Layout::Plain).optional(),
        Port::new("bias", Layout::Plain).optional(),
    ],
    outputs: &[Port::new("y", Layout::Plain).stored()],
    attrs: &["scale"],
    cases,
    run,
    reference,
};

fn run(attrs: &Attrs, t: &Tensors) -> Result<Tensors> {
    let options = GlobalAttention {
        scale: attrs.opt_f64("scale")?.map(|s| s as f32),
        rel_h: t.get("rel_h"),
        rel_w: t.get("rel_w"),
        bias: t.get("bias"),
    };
    let y = global_attention(need(OP, t, "q")?, need(OP, t, "k")?, need(OP, t, "v")?, options)?;
    Ok(Tensors::from([("y".into(), y)]))
}

/// A case over q, k, v `[n, h, w, g, d]` and the tables named in `tables`. Twice the usual tolerance is for half precision:
/// backward takes rowsum(dy * y) from the stored y, whose rounding counts against every dy.v, and outliers make both large (the
/// f32 kernels of the CPU, given the same rounded y, are as far off in bf16).
fn case(label: &str, [n, h, w, g, d]: [usize; 5], tables: &[&str]) -> Case {
    let mut case = Case::new(label).tolerance(2e-4, 2e-5);
    for name in ["q", "k", "v"] {
        case = case.normal(name, &[n, h, w, g, d]);
    }
    for name in tables {
        let shape = match *name {
            "rel_h" => vec![2 * h - 1, g * d],
            "rel_w" => vec![2 * w - 1, g * d],
            _ => vec![g, 2 * h - 1, 2 * w - 1],
        };
        case = case.uniform(name, &shape, -1.0, 1.0);
    }
    case
}

/// A case too large for finite differences. Its outliers meet in logits of several hundred, whose rounding alone moves a
/// probability by some 1e-5: the tolerance allows for that in both devices that are compared.
fn large(label: &str, sizes: [usize; 5], tables: &[&str]) -> Case {
    case(label, sizes, tables).no_gradcheck().tolerance(5e-4, 5e-5)
}

/// Log-sum-exps of about -120: what a tile has past the last token must not become exp(0 - lse), which is infinite. q and k are nearly
/// the same everywhere, so gradients of q and k are small sums of large numbers; the tolerance allows for that.
fn negative() -> Case {
    let sizes = [1, 1, 3, 2, 16];
    Case::new("log-sum-exps of -120")
        .uniform("q", &sizes, 2.0, 3.0)
        .uniform("k", &sizes, -3.5, -2.5)
        .normal("v", &sizes)
        .attr("scale", 1.0)
        .tolerance(1e-2, 1e-2)
}

/// CUDA has heads of up to 128 channels in half precision, see `MAX_HALF_WIDTH`.
fn any_width(caps: &crate::Caps) -> bool {
    !caps.name.starts_with("cuda")
}

fn cases() -> Vec<Case> {
    let all: &[&str] = &["rel_h", "rel_w", "bias"];
    vec![
        case("one place", [1, 1, 1, 1, 1], &[]),
        case("one place, all tables", [2, 1, 1, 2, 4], all),
        case("3x5, 2 heads", [2, 3, 5, 2, 4], &[]),
        case("d = 7, all tables", [1, 4, 3, 2, 7], all),
        case("all tables, scale 0.3", [2, 3, 4, 2, 4], all).attr("scale", 0.3),
        // Five queries: in bf16 the rounding of dS, times an outlier of q, is 1.1 times the tolerance of `case`.
        case("rel_h only", [1, 5, 2, 2, 4], &["rel_h"]).tolerance(3e-4, 3e-5),
        case("rel_w only, one row", [1, 1, 9, 2, 4], &["rel_w"]),
        case("bias only", [2, 3, 3, 2, 5], &["bias"]),
        case("rel_h and rel_w, one column", [1, 7, 1, 1, 8], &["rel_h", "rel_w"]),
        large("d = 33, all tables", [2, 5, 7, 2, 33], all),
        large("7x7, d = 32, batch 3", [3, 7, 7, 4, 32], &[]),
        large("129 places in a row, d = 64", [1, 1, 129, 1, 64], &[]),
        large("9x13, all tables, d = 20", [2, 9, 13, 2, 20], all),
        large("20x17, d = 68", [1, 20, 17, 1, 68], &["rel_h", "rel_w"]),
        large("14x14, d = 8", [1, 14, 14, 2, 8], &["bias"]),
        large("9x9, d = 64, two tiles", [1, 9, 9, 1, 64], &["rel_h", "rel_w"]),
        // One gradient of k is 1.1 times the tolerance of `large` off in bf16, on the CPU too: see `case`.
        large("12x11, all tables, d = 24", [1, 12, 11, 1, 24], all).tolerance(1e-3, 1e-4),
        large("2x71, columns by tile", [1, 2, 71, 1, 8], all),
        large("59x3, rows by tile", [1, 59, 3, 1, 8], &["rel_h", "rel_w"]),
        large("2x67, columns by tile, d = 12", [1, 2, 67, 1, 12], &["rel_w"]),
        large("9x8, batch 2, d = 24", [2, 9, 8, 2, 24], &["rel_h", "rel_w"]),
        large("5x7, d = 72", [1, 5, 7, 1, 72], &["rel_h", "rel_w"]),
        // Tiles along both axes of a map that is wider than high, in several heads and images.
        large("5x18, all tables, batch 2", [2, 5, 18, 2, 8], all),
        large("18x5, rel_w and bias", [1, 18, 5, 1, 4], &["rel_w", "bias"]),
        // More than one piece of 64 channels, whole and in part.
        large("4x9, d = 128, all tables", [1, 4, 9, 1, 128], all),
        large("33 places in a row, d = 128", [1, 1, 33, 1, 128], &[]),
        negative(),
        large("3x6, d = 132", [1, 3, 6, 2, 132], &["rel_h", "rel_w"]).only_where(any_width),
    ]
}

/// The formula as it stands, a softmax for each query.
fn reference(attrs: &Attrs, a: &Arrays) -> Result<Arrays> {
    let (q, k, v) = (need(OP, a, "q")?, need(OP, a, "k")?, need(OP, a, "v")?);
    let [n, h, w, g, d] = [0, 1, 2, 3, 4].map(|i| q.shape[i]);
    let scale = attrs.opt_f64("scale")?.unwrap_or(1.0 / (d as f64).sqrt());
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let mut y = Array::zeros(&q.shape);
    for (n, head, qy, qx) in indices([n, g, h, w]) {
        let at = q.at(&[n, qy, qx, head, 0]);
        let query = &q.data[at..at + d];
        let logit = |ky: usize, kx: usize| {
            let (oy, ox) = (ky + h - 1 - qy, kx + w - 1 - qx);
            let key = k.at(&[n, ky, kx, head, 0]);
            let mut logit = scale * dot(query, &k.data[key..key + d]);
            for (name, row) in [("rel_h", oy), ("rel_w", ox)] {
                if let Some(table) = a.get(name) {
                    let row = table.at(&[row, head * d]);
                    logit += dot(query, &table.data[row..row + d]);
                }
            }
            logit + a.get("bias").map_or(0.0, |bias| bias.get(&[head, oy, ox]))
        };
        let logits: Vec<f64> = (0..h * w).map(|t| logit(t / w, t % w)).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
        for (t, logit) in logits.iter().enumerate() {
            let p = (logit - max).exp() / sum;
            let value = v.at(&[n, t / w, t % w, head, 0]);
            for c in 0..d {
                y.data[at + c] += p * v.data[value + c];
            }
        }
    }
    Ok(Arrays::from([("y".into(), y)]))
}

/// All indices below the sizes, the last running fastest.
fn indices(sizes: [usize; 4]) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    let [_, b, c, d] = sizes;
    (0..sizes.iter().product()).map(move |i| (i / d / c / b, i / d / c % b, i / d % c, i % d))
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use crate::Device;
    use crate::ops::attention::{packed_gradients, separate_gradients};
    use crate::ops::attention_rows::delta;
    use crate::tensor::philox::Philox;

    fn randn(device: &Device, shape: &[usize], op: u32) -> Tensor {
        Tensor::randn(device, shape, Philox { seed: 3, step: 1, op }).unwrap()
    }

    /// The largest difference, in units of the largest magnitude.
    fn difference(a: &Tensor, b: &Tensor) -> f32 {
        let (a, b) = (a.to_f32().unwrap(), b.to_f32().unwrap());
        assert_eq!(a.len(), b.len());
        let largest = a.iter().fold(1e-30f32, |m, x| m.max(x.abs()));
        a.iter().zip(&b).fold(0.0f32, |m, (x, y)| m.max((x - y).abs())) / largest
    }

    /// The passes of backward one by one give what the single walk gives.
    #[test]
    fn passes_agree_with_the_single_walk() {
        let device = Device::cpu();
        let (shape, g, d) = ([3, 5, 4, 2, 8], 2, 8);
        let [q, k, v, dy] = [0, 1, 2, 3].map(|i| randn(&device, &shape, i));
        let (rel_h, rel_w) = (randn(&device, &[9, g * d], 4), randn(&device, &[7, g * d], 5));
        let bias = randn(&device, &[g, 9, 7], 6);
        for tables in 0..8 {
            let there = |bit: usize, t| if tables & bit != 0 { Some(t) } else { None };
            let options = GlobalAttention {
                scale: Some(0.4),
                rel_h: there(1, &rel_h),
                rel_w: there(2, &rel_w),
                bias: there(4, &bias),
            };
            let mut problem = options.problem(&q, &k, &v).unwrap();
            (problem.pieces, problem.params.pieces) = (2, 2);
            let any = problem.layout.any();
            let tables = problem.layout.pack(d, &q, [options.rel_h, options.rel_w, options.bias]);
            let tables = tables.unwrap();
            let y = Tensor::empty(&device, &shape).unwrap();
            let lse = Tensor::empty(&device, &shape[..4]).unwrap();
            FWD.launch(&problem.params, &[&q, &k, &v, &tables, &y, &lse]).unwrap();
            let stats = delta(&y, &dy, &lse).unwrap();
            let inputs = [&q, &k, &v, &tables, &dy, &stats];
            let (one, one_tables) = packed_gradients(&PASSES, &problem, inputs, any).unwrap();
            let (each, each_tables) = separate_gradients(&PASSES, &problem, inputs, any).unwrap();
            for (a, b) in one.iter().zip(&each).chain(one_tables.iter().zip(&each_tables)) {
                assert!(difference(a, b) < 1e-5, "{options:?}: {}", difference(a, b));
            }
            assert_eq!(one_tables.is_some(), any);
        }
    }

    #[test]
    fn wrong_shapes_are_named() {
        let device = Device::cpu();
        let q = randn(&device, &[1, 3, 4, 2, 8], 0);
        let error =
            |k: &Tensor, options| global_attention(&q, k, &q, options).unwrap_err().to_string();
        let k = randn(&device, &[1, 4, 3, 2, 8], 1);
        let message = error(&k, GlobalAttention::default());
        assert!(message.contains("k must have q's shape [1, 3, 4, 2, 8]"), "{message}");
        let table = randn(&device, &[7, 16], 2);
        let message = error(&q, GlobalAttention { rel_h: Some(&table), ..Default::default() });
        assert!(message.contains("rel_h") && message.contains("[5, 16]"), "{message}");
        let half = crate::ops::cast(&q, crate::DType::F16).unwrap();
        let message = error(&half, GlobalAttention::default());
        assert!(message.contains("k must be f32 as q is, but it is f16"), "{message}");
        let flat = randn(&device, &[12, 16], 3);
        let message =
            global_attention(&flat, &flat, &flat, GlobalAttention::default()).unwrap_err();
        assert!(message.to_string().contains("5 axes"), "{message}");
    }

    /// The tensor-core kernels have heads of up to 128 channels.
    #[cfg(feature = "cuda-emu")]
    #[test]
    fn a_head_too_wide_for_half_precision_is_refused() {
        let device = Device::new("cuda-emu").unwrap();
        let q = randn(&device, &[1, 2, 2, 1, 136], 0);
        let q = crate::ops::cast(&q, crate::DType::BF16).unwrap();
        let message = global_attention(&q, &q, &q, GlobalAttention::default()).unwrap_err();
        assert!(message.to_string().contains("up to 128 channels in bf16"), "{message}");
    }

    /// Nobody asks for the tables' gradients: none are made, and the others are right.
    #[test]
    fn tables_without_gradient() {
        let device = Device::cpu();
        let shape = [2, 3, 3, 1, 4];
        let [q, k, v, dy] = [0, 1, 2, 3].map(|i| randn(&device, &shape, i));
        let bias = randn(&device, &[1, 5, 5], 4);
        let gradient = |bias: &Tensor| {
            let q = q.requires_grad();
            let options = GlobalAttention { bias: Some(bias), ..Default::default() };
            let grads = global_attention(&q, &k, &v, options).unwrap().backward_with(&dy).unwrap();
            (grads.get(&q).unwrap().to_f32().unwrap(), grads.get(bias).is_some())
        };
        let (with, had) = gradient(&bias.requires_grad());
        let (without, has) = gradient(&bias);
        assert_eq!((had, has), (true, false));
        assert_eq!(with, without);
    }

    /// Peak memory of forward and backward, q, k, v and upstream gradient apart, grows with the map and not with its square.
    #[test]
    fn memory_grows_with_the_map() {
        let device = Device::cpu();
        let extra = |side: usize| {
            let shape = [1, side, side, 2, 8];
            let [q, k, v] = [0, 1, 2].map(|i| randn(&device, &shape, i).requires_grad());
            let dy = randn(&device, &shape, 3);
            device.reset_peak();
            let before = device.memory().live;
            let y = global_attention(&q, &k, &v, GlobalAttention::default()).unwrap();
            let grads = y.backward_with(&dy).unwrap();
            assert!(grads.get(&q).is_some());
            (device.memory().peak - before) as f64
        };
        let ratio = extra(32) / extra(16);
        assert!((3.9..4.1).contains(&ratio), "four times the places took {ratio} times the memory");
    }
}
