//! Conformance of global attention: cases, and the formula in f64 by plain loops.

use super::{GlobalAttention, OP, global_attention};
use crate::error::Result;
use crate::ops::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};

/// Conformance of [`global_attention`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[
        Port::new("q", Layout::Plain),
        Port::new("k", Layout::Plain),
        Port::new("v", Layout::Plain),
        Port::new("rel_h", Layout::Plain).optional(),
        Port::new("rel_w", Layout::Plain).optional(),
        Port::new("bias", Layout::Plain).optional(),
    ],
    outputs: &[Port::new("y", Layout::Plain)],
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

/// A case over q, k, v `[n, h, w, g, d]` and the tables named in `tables`.
fn case(label: &str, [n, h, w, g, d]: [usize; 5], tables: &[&str]) -> Case {
    let mut case = Case::new(label);
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

fn cases() -> Vec<Case> {
    let all: &[&str] = &["rel_h", "rel_w", "bias"];
    vec![
        case("one place", [1, 1, 1, 1, 1], &[]),
        case("one place, all tables", [2, 1, 1, 2, 4], all),
        case("3x5, 2 heads", [2, 3, 5, 2, 4], &[]),
        case("d = 7, all tables", [1, 4, 3, 2, 7], all),
        case("all tables, scale 0.3", [2, 3, 4, 2, 4], all).attr("scale", 0.3),
        case("rel_h only", [1, 5, 2, 2, 4], &["rel_h"]),
        case("rel_w only, one row", [1, 1, 9, 2, 4], &["rel_w"]),
        case("bias only", [2, 3, 3, 2, 5], &["bias"]),
        case("rel_h and rel_w, one column", [1, 7, 1, 1, 8], &["rel_h", "rel_w"]),
        large("d = 33, all tables", [2, 5, 7, 2, 33], all),
        large("7x7, d = 32, batch 3", [3, 7, 7, 4, 32], &[]),
        large("129 places in a row, d = 64", [1, 1, 129, 1, 64], &[]),
        large("9x13, all tables, d = 20", [2, 9, 13, 2, 20], all),
        large("20x17, d = 68", [1, 20, 17, 1, 68], &["rel_h", "rel_w"]),
        large("14x14, d = 8", [1, 14, 14, 2, 8], &["bias"]),
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
