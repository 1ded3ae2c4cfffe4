//! Conformance of the fused attention block: cases, and the formula in f64 by plain loops.

use super::{AttentionBlock, OP, attention_block};
use crate::error::Result;
use crate::ops::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use crate::ops::global_attention;

/// Conformance of [`attention_block`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[
        Port::new("x", Layout::Image).stored(),
        Port::new("q_weight", Layout::Weight).stored(),
        Port::new("k_weight", Layout::Weight).stored(),
        Port::new("v_weight", Layout::Weight).stored(),
        Port::new("proj_weight", Layout::Weight).stored().optional(),
        Port::new("rel_h", Layout::Plain).optional(),
        Port::new("rel_w", Layout::Plain).optional(),
    ],
    outputs: &[Port::new("y", Layout::Image).stored()],
    attrs: &["heads", "scale", "residual"],
    cases,
    run,
    reference,
};

const WEIGHTS: [&str; 3] = ["q_weight", "k_weight", "v_weight"];

fn run(attrs: &Attrs, t: &Tensors) -> Result<Tensors> {
    let [q, k, v] = WEIGHTS.map(|name| need(OP, t, name));
    let block = AttentionBlock {
        heads: attrs.usize("heads", 1)?,
        scale: attrs.opt_f64("scale")?.map(|s| s as f32),
        qkv: [q?, k?, v?],
        proj: t.get("proj_weight"),
        rel_h: t.get("rel_h"),
        rel_w: t.get("rel_w"),
        residual: attrs.bool("residual", false)?,
    };
    Ok(Tensors::from([("y".into(), attention_block(need(OP, t, "x")?, block)?)]))
}

/// What a case has beside x and the weights of q, k and v.
struct With {
    heads: usize,
    d: usize,
    /// Channels of the projection, where there is one.
    proj: Option<usize>,
    tables: bool,
    residual: bool,
}

/// A case over x `[n, h, w, c]`. Weights are small, so that an outlier of x does not make the softmax a choice of one key, where
/// the rounding of its logit would be the whole error. Three times the usual tolerance is for half precision: q, k and v, the
/// attention's output and (in backward) its gradient are rounded on the way.
fn case(label: &str, [n, h, w, c]: [usize; 4], with: With) -> Case {
    let depth = with.heads * with.d;
    let bound = |inputs: usize| 1.0 / (inputs as f32).sqrt();
    let mut case = Case::new(label)
        .attr("heads", with.heads)
        .attr("residual", with.residual)
        .normal("x", &[n, h, w, c])
        .tolerance(3e-4, 3e-5);
    for name in WEIGHTS {
        case = case.uniform(name, &[depth, 1, 1, c], -bound(c), bound(c));
    }
    if let Some(o) = with.proj {
        case = case.uniform("proj_weight", &[o, 1, 1, depth], -bound(depth), bound(depth));
    }
    if with.tables {
        case = case.uniform("rel_h", &[2 * h - 1, depth], -0.5, 0.5);
        case = case.uniform("rel_w", &[2 * w - 1, depth], -0.5, 0.5);
    }
    case
}

fn cases() -> Vec<Case> {
    let with = |heads, d, proj| With { heads, d, proj, tables: false, residual: false };
    let whole = |heads, d, o| With { tables: true, residual: true, ..with(heads, d, Some(o)) };
    vec![
        case("one place, one channel", [2, 1, 1, 1], whole(1, 1, 1)),
        case("3x5, 3 heads, no projection", [2, 3, 5, 6], with(3, 4, None)),
        case("d = 5, odd channels", [2, 3, 5, 7], whole(3, 5, 7)),
        case("scale 0.3, no residual", [2, 2, 3, 8], with(1, 16, Some(5))).attr("scale", 0.3),
        case(
            "residual without projection",
            [3, 2, 2, 8],
            With { residual: true, ..with(2, 4, None) },
        ),
        case("9x8 places: op by op", [1, 9, 8, 3], whole(1, 4, 3)).no_gradcheck(),
        case("7x7, d = 32", [2, 7, 7, 40], whole(3, 32, 40)).no_gradcheck(),
        case("4x4, several images at once", [6, 4, 4, 33], whole(2, 16, 33)).no_gradcheck(),
        case("8x8, d = 72", [1, 8, 8, 72], whole(1, 72, 72)).no_gradcheck(),
        case("2x3, padded heads", [13, 2, 3, 16], whole(2, 12, 16)).no_gradcheck(),
        case("3x7, d = 40, residual", [4, 3, 7, 24], whole(1, 40, 24)).no_gradcheck(),
    ]
}

/// Projections, the attention of its own reference, projection, residual.
fn reference(attrs: &Attrs, a: &Arrays) -> Result<Arrays> {
    let x = need(OP, a, "x")?;
    let [n, h, w, c] = [0, 1, 2, 3].map(|i| x.shape[i]);
    let heads = attrs.usize("heads", 1)?;
    let mut inner = Arrays::new();
    for (name, weight) in ["q", "k", "v"].into_iter().zip(WEIGHTS) {
        let mut tokens = project(x, c, need(OP, a, weight)?);
        let depth = tokens.shape[3];
        tokens.shape = vec![n, h, w, heads, depth / heads];
        inner.insert(name.into(), tokens);
    }
    for name in ["rel_h", "rel_w"] {
        if let Some(table) = a.get(name) {
            inner.insert(name.into(), table.clone());
        }
    }
    let mut y = need(OP, &(global_attention::SPEC.reference)(attrs, &inner)?, "y")?.clone();
    y.shape = vec![n, h, w, y.shape[3] * y.shape[4]];
    if let Some(weight) = a.get("proj_weight") {
        let depth = y.shape[3];
        y = project(&y, depth, weight);
    }
    if attrs.bool("residual", false)? {
        y.data.iter_mut().zip(&x.data).for_each(|(y, x)| *y += x);
    }
    Ok(Arrays::from([("y".into(), y)]))
}

/// `[.., c]` times the transposed weight.
fn project(x: &Array, c: usize, weight: &Array) -> Array {
    let outputs = weight.data.len() / c;
    let mut shape = x.shape.clone();
    shape[3] = outputs;
    let mut y = Array::zeros(&shape);
    for (i, y) in y.data.iter_mut().enumerate() {
        let (row, o) = (i / outputs, i % outputs);
        *y = (0..c).map(|k| x.data[row * c + k] * weight.data[o * c + k]).sum();
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::philox::Philox;
    use crate::{Device, Tensor};

    fn ones(shape: &[usize]) -> Tensor {
        Tensor::full(&Device::cpu(), shape, 1.0).unwrap()
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let (x, w, odd) = (ones(&[1, 2, 3, 4]), ones(&[6, 4]), ones(&[6, 3]));
        let block = AttentionBlock {
            heads: 2,
            scale: None,
            qkv: [&w, &w, &w],
            proj: None,
            rel_h: None,
            rel_w: None,
            residual: false,
        };
        let message = |block: AttentionBlock<'_>| {
            attention_block(&x, block).expect_err("refused").to_string()
        };
        assert!(message(AttentionBlock { heads: 4, ..block }).contains("4 heads do not divide"));
        assert!(message(AttentionBlock { qkv: [&w, &odd, &w], ..block }).contains("k_weight"));
        assert!(message(AttentionBlock { residual: true, ..block }).contains("residual"));
        assert!(message(AttentionBlock { proj: Some(&w), ..block }).contains("6 columns"));
        let table = ones(&[3, 4]);
        assert!(message(AttentionBlock { rel_h: Some(&table), ..block }).contains("rel_h must be"));
        let cubic = ones(&[6, 2, 2, 1]);
        assert!(message(AttentionBlock { qkv: [&cubic; 3], ..block }).contains("[rows, columns]"));
    }

    /// One after another, the parts of the block give what the block gives, and its launches are as few as it says.
    #[test]
    fn fewer_launches_than_op_by_op() {
        let device = Device::cpu();
        let normal = |shape: &[usize], op| {
            let random = Philox { seed: 9, step: 0, op };
            Tensor::randn(&device, shape, random).unwrap().requires_grad()
        };
        let x = normal(&[2, 3, 5, 8], 0);
        let [q, k, v, proj] = [1, 2, 3, 4].map(|op| normal(&[8, 8], op));
        let block = AttentionBlock {
            heads: 2,
            scale: None,
            qkv: [&q, &k, &v],
            proj: Some(&proj),
            rel_h: None,
            rel_w: None,
            residual: true,
        };
        let dy = normal(x.shape(), 5).detach();
        let count = |f: &dyn Fn() -> Result<Tensor>| {
            let start = device.launches();
            let y = f().unwrap();
            let middle = device.launches();
            let grads = y.backward_with(&dy).unwrap();
            let launches = [middle - start, device.launches() - middle];
            let gradient = |leaf: &Tensor| grads.get(leaf).unwrap().to_f32().unwrap();
            let all = [&x, &q, &k, &v, &proj].map(gradient);
            (launches, y.to_f32().unwrap(), all)
        };
        let (few, y, grads) = count(&|| attention_block(&x, block));
        let (sizes, outputs) = block.check(&x).unwrap();
        let (many, want, expected) = count(&|| block.composed(&x, sizes, outputs));
        assert_eq!((few, many), ([2, 6], [6, 13]));
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(close(&y, &want));
        assert!(grads.iter().zip(&expected).all(|(a, b)| close(a, b)));
    }
}
