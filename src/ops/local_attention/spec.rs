//! Conformance of local attention: cases, and the formula in f64 by plain loops.

use super::{Border, LocalAttention, OP, local_attention};
use crate::error::{Error, Result};
use crate::ops::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};

/// Conformance of [`local_attention`].
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
    attrs: &["scale", "kernel", "border"],
    cases,
    run,
    reference,
};

fn border(attrs: &Attrs) -> Result<Border> {
    match attrs.str("border", "mask")?.as_str() {
        "mask" => Ok(Border::Mask),
        "zero" => Ok(Border::Zero),
        other => {
            Err(Error::usage(format!("attribute 'border' is '{other}', expected 'mask' or 'zero'")))
        }
    }
}

fn run(attrs: &Attrs, t: &Tensors) -> Result<Tensors> {
    let options = LocalAttention {
        window: attrs.pair("kernel", [7, 7])?,
        border: border(attrs)?,
        scale: attrs.opt_f64("scale")?.map(|s| s as f32),
        rel_h: t.get("rel_h"),
        rel_w: t.get("rel_w"),
        bias: t.get("bias"),
    };
    let y = local_attention(need(OP, t, "q")?, need(OP, t, "k")?, need(OP, t, "v")?, options)?;
    Ok(Tensors::from([("y".into(), y)]))
}

/// A case over q, k, v `[n, h, w, g, d]` and the tables named in `tables`.
fn case(
    label: &str,
    [n, h, w, g, d]: [usize; 5],
    (kh, kw): (usize, usize),
    border: &str,
    tables: &[&str],
) -> Case {
    let label = format!("{label}, {kh}x{kw} {border}");
    let mut case =
        Case::new(&label).attr("kernel", serde_json::json!([kh, kw])).attr("border", border);
    for name in ["q", "k", "v"] {
        case = case.normal(name, &[n, h, w, g, d]);
    }
    for name in tables {
        let shape = match *name {
            "rel_h" => vec![kh, g * d],
            "rel_w" => vec![kw, g * d],
            _ => vec![g, kh, kw],
        };
        case = case.uniform(name, &shape, -1.0, 1.0);
    }
    case
}

/// A case too large for finite differences. Its outliers meet in logits of several hundred, whose rounding alone moves a
/// probability by some 1e-5: the tolerance allows for that in both devices that are compared.
fn large(
    label: &str,
    sizes: [usize; 5],
    window: (usize, usize),
    border: &str,
    tables: &[&str],
) -> Case {
    case(label, sizes, window, border, tables).no_gradcheck().tolerance(5e-4, 5e-5)
}

fn cases() -> Vec<Case> {
    let all: &[&str] = &["rel_h", "rel_w", "bias"];
    let mut cases = Vec::new();
    for border in ["mask", "zero"] {
        cases.extend([
            case("one place", [1, 1, 1, 1, 1], (3, 3), border, all),
            case("3x5, 2 heads", [2, 3, 5, 2, 4], (3, 3), border, &[]),
            case("all tables, d = 7", [1, 4, 5, 2, 7], (3, 5), border, all),
            case("window beyond the map", [1, 3, 2, 1, 5], (7, 7), border, all),
            // In half precision an outlier's dP and its rowsum(dy * y), made of the rounded y, nearly cancel.
            case("rel_h and rel_w, 9 heads", [1, 3, 4, 9, 3], (3, 3), border, &["rel_h", "rel_w"])
                .tolerance(4e-4, 4e-5),
            case("one column", [2, 6, 1, 2, 4], (5, 3), border, &["rel_h"]),
            large("7x9, all tables, d = 20", [2, 7, 9, 2, 20], (7, 7), border, all),
            large("33x5, d = 33", [1, 33, 5, 3, 33], (5, 5), border, &["rel_w"]),
        ]);
    }
    cases.extend([
        case("window 1x1", [1, 3, 3, 1, 4], (1, 1), "mask", all),
        case("bias only", [2, 3, 4, 2, 5], (3, 3), "mask", &["bias"]),
        case("rel_w only, one row", [1, 1, 9, 2, 4], (1, 5), "mask", &["rel_w"]),
        case("scale 0.3", [2, 3, 4, 2, 4], (3, 3), "zero", all).attr("scale", 0.3),
        large("129 in a row, d = 64", [1, 1, 129, 1, 64], (3, 13), "mask", &[]),
        large("14x14, 8 heads of 16", [1, 14, 14, 8, 16], (7, 7), "mask", &["rel_h", "rel_w"]),
        large("14x13, 13x13", [1, 14, 13, 2, 8], (13, 13), "mask", &["bias"]),
        large("d = 68", [1, 6, 5, 1, 68], (3, 3), "zero", &["rel_h", "rel_w"]),
    ]);
    cases.extend(patches());
    cases
}

/// Widths and windows that CUDA takes on tensor cores in half precision, 16 places of a map at a time: maps that no patch
/// divides, blocks of one patch and of many, bands of all rows and of few.
fn patches() -> Vec<Case> {
    let all: &[&str] = &["rel_h", "rel_w", "bias"];
    let mut cases = Vec::new();
    for border in ["mask", "zero"] {
        cases.extend([
            large("d = 16, 9x11, 2 heads", [1, 9, 11, 2, 16], (7, 7), border, all),
            large("d = 16, window beyond the map", [2, 3, 2, 1, 16], (7, 9), border, all),
            large("d = 32, 5x14", [1, 5, 14, 1, 32], (9, 9), border, &["rel_w"]),
            large("d = 64, 9x8", [1, 9, 8, 1, 64], (7, 7), border, &["rel_h", "bias"]),
            large("d = 128, 4x5", [1, 4, 5, 1, 128], (13, 13), border, all),
        ]);
    }
    cases.extend([
        large("d = 32, 12x17", [1, 12, 17, 1, 32], (7, 7), "zero", all),
        large("d = 32, 13x7", [1, 13, 7, 1, 32], (13, 13), "mask", all),
        large("d = 32, 2 heads, a wide window", [1, 3, 10, 2, 32], (3, 11), "mask", all),
        large("d = 64, 15x6", [1, 15, 6, 1, 64], (13, 9), "zero", &["rel_h", "rel_w"]),
        large("d = 128, 9x9", [1, 9, 9, 1, 128], (7, 7), "mask", &["rel_h", "rel_w"]),
        large("d = 128, 3x10", [1, 3, 10, 1, 128], (11, 9), "zero", &[]),
    ]);
    cases
}

/// The formula as it stands, a softmax for each query.
fn reference(attrs: &Attrs, a: &Arrays) -> Result<Arrays> {
    let (q, k, v) = (need(OP, a, "q")?, need(OP, a, "k")?, need(OP, a, "v")?);
    let [n, h, w, g, d] = [0, 1, 2, 3, 4].map(|i| q.shape[i]);
    let (kh, kw) = attrs.pair("kernel", [7, 7])?;
    let border = border(attrs)?;
    let scale = attrs.opt_f64("scale")?.unwrap_or(1.0 / (d as f64).sqrt());
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let mut y = Array::zeros(&q.shape);
    for place in 0..n * h * w * g {
        let (n, qy, qx, head) = (place / g / w / h, place / g / w % h, place / g % w, place % g);
        let at = q.at(&[n, qy, qx, head, 0]);
        let query = &q.data[at..at + d];
        // The logit of each offset and the place of its key, if that lies in the map.
        let mut logits: Vec<(f64, Option<usize>)> = Vec::new();
        for (i, j) in (0..kh * kw).map(|o| (o / kw, o % kw)) {
            let (ky, kx) = ((qy + i).checked_sub(kh / 2), (qx + j).checked_sub(kw / 2));
            let inside = ky.zip(kx).filter(|(ky, kx)| *ky < h && *kx < w);
            if inside.is_none() && border == Border::Mask {
                continue;
            }
            let key = inside.map(|(ky, kx)| k.at(&[n, ky, kx, head, 0]));
            let mut logit = key.map_or(0.0, |key| scale * dot(query, &k.data[key..key + d]));
            for (name, row) in [("rel_h", i), ("rel_w", j)] {
                if let Some(table) = a.get(name) {
                    let row = table.at(&[row, head * d]);
                    logit += dot(query, &table.data[row..row + d]);
                }
            }
            logit += a.get("bias").map_or(0.0, |bias| bias.get(&[head, i, j]));
            logits.push((logit, key));
        }
        let max = logits.iter().map(|l| l.0).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|(l, _)| (l - max).exp()).sum();
        for (logit, key) in logits {
            let (p, Some(key)) = ((logit - max).exp() / sum, key) else { continue };
            for c in 0..d {
                y.data[at + c] += p * v.data[key + c];
            }
        }
    }
    Ok(Arrays::from([("y".into(), y)]))
}
