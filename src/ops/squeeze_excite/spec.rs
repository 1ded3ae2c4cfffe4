//! Conformance of squeeze and excitation: cases and the reference in f64.

use super::{OP, squeeze_excite};
use crate::error::Result;
use crate::ops::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};

/// Conformance of [`squeeze_excite`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[
        Port::new("x", Layout::Image).stored(),
        Port::new("w1", Layout::Plain).stored(),
        Port::new("b1", Layout::Plain),
        Port::new("w2", Layout::Plain).stored(),
        Port::new("b2", Layout::Plain),
    ],
    outputs: &[Port::new("y", Layout::Image).stored()],
    attrs: &[],
    cases,
    run: |_, t: &Tensors| {
        let port = |name| need(OP, t, name);
        let y = squeeze_excite(port("x")?, port("w1")?, port("b1")?, port("w2")?, port("b2")?)?;
        Ok(Tensors::from([("y".into(), y)]))
    },
    reference,
};

fn cases() -> Vec<Case> {
    let case = |label, [n, h, w, c]: [usize; 4], s: usize| {
        let case = Case::new(label).normal("x", &[n, h, w, c]);
        let case = case.uniform("w1", &[s, c], -0.7, 0.7).normal("b1", &[s]);
        case.uniform("w2", &[c, s], -0.7, 0.7).normal("b2", &[c])
    };
    vec![
        case("one value", [1, 1, 1, 1], 1),
        case("odd", [2, 5, 3, 7], 3),
        case("one pixel", [3, 1, 1, 12], 5),
        case("packs", [2, 3, 5, 8], 4),
        case("33 channels, more between", [2, 7, 1, 33], 40).no_gradcheck(),
        case("264 channels", [3, 3, 5, 264], 10).no_gradcheck(),
        case("several blocks of pixels", [2, 41, 33, 20], 6).no_gradcheck(),
    ]
}

fn reference(_: &Attrs, a: &Arrays) -> Result<Arrays> {
    let x = need(OP, a, "x")?;
    let [w1, b1, w2, b2] =
        [need(OP, a, "w1")?, need(OP, a, "b1")?, need(OP, a, "w2")?, need(OP, a, "b2")?];
    let (c, s) = (b2.data.len(), b1.data.len());
    let image = x.data.len() / x.shape[0];
    let sigmoid = |v: f64| 1.0 / (1.0 + (-v).exp());
    let mut y = Array { shape: x.shape.clone(), data: Vec::new() };
    for x in x.data.chunks(image) {
        let mean = |k: usize| x.iter().skip(k).step_by(c).sum::<f64>() * c as f64 / image as f64;
        let m: Vec<f64> = (0..c).map(mean).collect();
        let z = |j: usize| b1.data[j] + (0..c).map(|k| w1.get(&[j, k]) * m[k]).sum::<f64>();
        let hidden: Vec<f64> = (0..s).map(z).map(|z| z * sigmoid(z)).collect();
        let gate = |k: usize| {
            sigmoid(b2.data[k] + (0..s).map(|j| w2.get(&[k, j]) * hidden[j]).sum::<f64>())
        };
        let gates: Vec<f64> = (0..c).map(gate).collect();
        y.data.extend(x.iter().enumerate().map(|(i, x)| x * gates[i % c]));
    }
    Ok(Arrays::from([("y".into(), y)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Device, Tensor};

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let ones = |shape: &[usize]| Tensor::full(&Device::cpu(), shape, 1.0).unwrap();
        let x = ones(&[2, 3, 3, 4]);
        let refused = |w1: &[usize], b1: &[usize], w2: &[usize], b2: &[usize]| {
            let y = squeeze_excite(&x, &ones(w1), &ones(b1), &ones(w2), &ones(b2));
            y.expect_err("refused").to_string()
        };
        assert!(refused(&[2, 5], &[2], &[4, 2], &[4]).contains("w1 must be [2, 4]"));
        assert!(refused(&[2, 4], &[4], &[4, 2], &[4]).contains("b1 must be [2]"));
        assert!(refused(&[2, 4], &[2], &[2, 4], &[4]).contains("w2 must be [4, 2]"));
        assert!(refused(&[2, 4], &[2], &[4, 2], &[2]).contains("b2 must be [4]"));
    }

    /// An image in half precision takes weights in f32 too: no cast is needed.
    #[test]
    fn weights_may_be_f32_beside_a_half_image() {
        let mut devices = vec![Device::cpu()];
        if cfg!(feature = "cuda-emu") {
            devices.push(Device::new("cuda-emu").unwrap());
        }
        for device in &devices {
            let numbers = |shape: &[usize], dtype| {
                let data: Vec<f32> = (0..shape.iter().product())
                    .map(|i: usize| (i % 5) as f32 / 4.0 - 0.5)
                    .collect();
                Tensor::from_f32_as(device, shape, dtype, &data).unwrap().requires_grad()
            };
            let plain = |shape: &[usize]| numbers(shape, DType::F32);
            let (x, w1, w2) = (numbers(&[1, 2, 2, 8], DType::BF16), plain(&[3, 8]), plain(&[8, 3]));
            let y = squeeze_excite(&x, &w1, &plain(&[3]), &w2, &plain(&[8])).unwrap();
            assert_eq!(y.dtype(), DType::BF16);
            let grads = y.backward_with(&y.full_like(1.0).unwrap()).unwrap();
            assert_eq!(grads.get(&x).unwrap().dtype(), DType::BF16);
            assert_eq!(grads.get(&w1).unwrap().dtype(), DType::F32);
        }
    }
}
