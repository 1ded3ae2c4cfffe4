//! Conformance of the halves of LESA: cases and the references in f64.

use super::{CONTEXT_OP, LOGITS_OP, lesa_context, lesa_logits};
use crate::error::Result;
use crate::ops::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};

/// Conformance of [`lesa_logits`].
pub(crate) static LOGITS: OpSpec = OpSpec {
    name: LOGITS_OP,
    inputs: &[Port::new("qkv", Layout::Plain), Port::new("table", Layout::Plain)],
    outputs: &[Port::new("y", Layout::Plain)],
    attrs: &[],
    cases: || shapes().map(|(label, shape)| case(label, shape)).into(),
    run: |_, t: &Tensors| {
        let y = lesa_logits(need(LOGITS_OP, t, "qkv")?, need(LOGITS_OP, t, "table")?)?;
        Ok(Tensors::from([("y".into(), y)]))
    },
    reference: logits,
};

/// Conformance of [`lesa_context`].
pub(crate) static CONTEXT: OpSpec = OpSpec {
    name: CONTEXT_OP,
    inputs: &[
        Port::new("logits", Layout::Plain),
        Port::new("qkv", Layout::Plain),
        Port::new("table", Layout::Plain),
    ],
    outputs: &[Port::new("y", Layout::Plain)],
    attrs: &[],
    cases: || {
        let with_logits = |(label, shape): (&str, [usize; 4])| {
            let [n, l, g, _] = shape;
            case(label, shape).uniform("logits", &[n, l, l, 3 * g], -1.5, 1.5)
        };
        shapes().map(with_logits).into()
    },
    run: |_, t: &Tensors| {
        let port = |name| need(CONTEXT_OP, t, name);
        let y = lesa_context(port("logits")?, port("qkv")?, port("table")?)?;
        Ok(Tensors::from([("y".into(), y)]))
    },
    reference: context,
};

/// `[N, L, G, e]`
fn shapes() -> [(&'static str, [usize; 4]); 5] {
    [
        ("one pixel", [2, 1, 1, 1]),
        ("odd", [2, 5, 3, 3]),
        ("packs", [1, 7, 2, 4]),
        ("past a warp", [1, 35, 2, 9]),
        ("past a workgroup", [2, 69, 1, 2]),
    ]
}

fn case(label: &str, [n, l, g, e]: [usize; 4]) -> Case {
    let case = Case::new(label).uniform("qkv", &[n, l, g, 4 * e], -1.0, 1.0);
    let case = case.uniform("table", &[2 * l - 1, 4 * e], -1.0, 1.0);
    if l > 7 { case.no_gradcheck() } else { case }
}

/// `[N, L, G, e]` and the element of an offset's row.
fn sizes(qkv: &Array, table: &Array) -> ([usize; 4], impl Fn(usize, usize, usize) -> f64) {
    let [n, l, g, width] = [0, 1, 2, 3].map(|i| qkv.shape[i]);
    let table = table.clone();
    ([n, l, g, width / 4], move |from, to, c| table.get(&[from + l - 1 - to, c]))
}

fn logits(_: &Attrs, a: &Arrays) -> Result<Arrays> {
    let (qkv, table) = (need(LOGITS_OP, a, "qkv")?, need(LOGITS_OP, a, "table")?);
    let ([n, l, g, e], row) = sizes(qkv, table);
    let mut y = Array::zeros(&[n, l, l, 3 * g]);
    for (at, y) in y.data.iter_mut().enumerate() {
        let (head, kind) = (at % g, at / g % 3);
        let (j, i, image) = (at / (3 * g) % l, at / (3 * g * l) % l, at / (3 * g * l * l));
        let q = |c| qkv.get(&[image, i, head, c]);
        let k = |c| qkv.get(&[image, j, head, e + c]);
        let term = |c| match kind {
            0 => q(c) * k(c),
            1 => q(c) * row(i, j, c),
            _ => k(c) * row(j, i, e + c),
        };
        *y = (0..e).map(term).sum();
    }
    Ok(Arrays::from([("y".into(), y)]))
}

fn context(_: &Attrs, a: &Arrays) -> Result<Arrays> {
    let (qkv, table) = (need(CONTEXT_OP, a, "qkv")?, need(CONTEXT_OP, a, "table")?);
    let logits = need(CONTEXT_OP, a, "logits")?;
    let ([n, l, g, e], row) = sizes(qkv, table);
    let mut y = Array::zeros(&[n, l, 2, 2 * e * g]);
    for (image, i, head) in (0..n * l * g).map(|at| (at / (l * g), at / g % l, at % g)) {
        let sum = |j: usize| -> f64 {
            (0..3).map(|kind| logits.get(&[image, i, j, kind * g + head])).sum()
        };
        let powers: Vec<f64> = (0..l).map(|j| sum(j).exp()).collect();
        let total: f64 = powers.iter().sum();
        for c in 0..2 * e {
            let value = |j: usize| qkv.get(&[image, j, head, 2 * e + c]);
            let place = |j: usize| row(i, j, 2 * e + c);
            let of_values: f64 = (0..l).map(|j| powers[j] / total * value(j)).sum();
            let of_places: f64 = (0..l).map(|j| powers[j] / total * place(j)).sum();
            y.set(&[image, i, 0, head * 2 * e + c], of_values);
            y.set(&[image, i, 1, head * 2 * e + c], of_places);
        }
    }
    Ok(Arrays::from([("y".into(), y)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Device, Tensor};

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let zeros = |shape: &[usize]| Tensor::zeros(&Device::cpu(), shape).unwrap();
        let refused = |qkv: &Tensor, table: &[usize]| {
            lesa_logits(qkv, &zeros(table)).expect_err("refused").to_string()
        };
        assert!(refused(&zeros(&[1, 4, 1, 8]), &[8, 8]).contains("must be [7, 8]"));
        assert!(refused(&zeros(&[1, 4, 1, 6]), &[7, 6]).contains("multiple of 4"));
        assert!(refused(&zeros(&[1, 1025, 1, 4]), &[2049, 4]).contains("a map of 1025 pixels"));
        let half = Tensor::uninit(&Device::cpu(), &[1, 4, 1, 8], DType::F16).unwrap();
        assert!(refused(&half, &[7, 8]).contains("qkv must be f32"));
        let (qkv, table) = (zeros(&[1, 4, 2, 8]), zeros(&[7, 8]));
        let message = lesa_context(&zeros(&[1, 4, 4, 3]), &qkv, &table).unwrap_err().to_string();
        assert!(message.contains("logits must be [1, 4, 4, 6]"), "{message}");
    }
}
