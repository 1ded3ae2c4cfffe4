//! Linear layers: a 1x1 convolution over one pixel an image, so its kernels are [`super::conv2d`]'s.

use super::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use super::conv2d::{self, Conv2dParams};
use crate::error::{Error, Result};
use crate::kernel::{require_f32, require_float, require_same};
use crate::tensor::Tensor;

/// `y[.., o] = bias[o] + sum over i of x[.., i] * w[o, i]`.
///
/// x `[.., I]` with any leading axes, w `[O, I]`, bias `[O]`, y `[.., O]`. Gradients for x, w and bias. Storage as in
/// [`super::conv2d()`].
///
/// # Errors
/// [`Error::Shape`] where shapes or storage do not fit.
pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "linear";
    require_float(OP, "x", x)?;
    require_same(OP, ("x", x), "weight", w)?;
    let [o, i] = w.dims(OP, "weight")?;
    let Some((&features, leading)) = x.shape().split_last().filter(|&(&last, _)| last == i) else {
        let message = format!(
            "x {:?} must end in {i} features, as weight {:?} says (its last axis)",
            x.shape(),
            w.shape()
        );
        return Err(Error::shape(OP, message));
    };
    if let Some(bias) = bias {
        require_f32(OP, "bias", bias)?;
        if bias.shape() != [o] {
            let message = format!("bias must be [{o}], got {:?}", bias.shape());
            return Err(Error::shape(OP, message));
        }
    }
    let shape = [leading, &[o]].concat();
    let p = Conv2dParams::pointwise(leading.iter().product(), features, o, bias.is_some())?;
    conv2d::forward(OP, p, &shape, x, w, bias)
}

/// Conformance of [`linear`].
pub(crate) static LINEAR: OpSpec = OpSpec {
    name: "linear",
    inputs: &[
        Port::new("x", Layout::Plain).stored(),
        Port::new("weight", Layout::Plain).stored(),
        Port::new("bias", Layout::Plain).optional(),
    ],
    outputs: &[Port::new("y", Layout::Plain).stored()],
    attrs: &[],
    cases: || {
        let case = |label: &str, x: &[usize], o: usize| {
            Case::new(label).normal("x", x).normal("weight", &[o, x[x.len() - 1]])
        };
        vec![
            case("one element", &[1, 1], 1),
            case("odd", &[7, 33], 5).normal("bias", &[5]),
            case("leading axes", &[2, 3, 5, 8], 12).normal("bias", &[12]),
            case("one vector", &[9], 4),
            case("past a tile", &[129, 36], 65).normal("bias", &[65]).no_gradcheck(),
            case("past a tile, whole vectors", &[260, 68], 132).no_gradcheck(),
            case("past a tile, vectors of eight", &[260, 72], 136).no_gradcheck(),
        ]
    },
    run: |_: &Attrs, t: &Tensors| {
        let (x, w) = (need("linear", t, "x")?, need("linear", t, "weight")?);
        Ok(Tensors::from([("y".into(), linear(x, w, t.get("bias"))?)]))
    },
    reference,
};

fn reference(_: &Attrs, a: &Arrays) -> Result<Arrays> {
    let (x, w) = (need("linear", a, "x")?, need("linear", a, "weight")?);
    let (out, features) = (w.shape[0], w.shape[1]);
    let mut shape = x.shape.clone();
    shape.pop();
    shape.push(out);
    let mut y = Array::zeros(&shape);
    for (i, y) in y.data.iter_mut().enumerate() {
        let (row, o) = (i / out, i % out);
        let bias = a.get("bias").map_or(0.0, |b| b.get(&[o]));
        let product = |k: usize| x.data[row * features + k] * w.get(&[o, k]);
        *y = bias + (0..features).map(product).sum::<f64>();
    }
    Ok(Arrays::from([("y".into(), y)]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let device = Device::cpu();
        let ones = |shape: &[usize]| Tensor::full(&device, shape, 1.0).unwrap();
        let refused = |x: &Tensor, w: &Tensor, b: Option<&Tensor>| {
            linear(x, w, b).expect_err("refused").to_string()
        };
        let (x, w) = (ones(&[2, 3]), ones(&[4, 3]));
        assert!(refused(&ones(&[2, 5]), &w, None).contains("must end in 3"));
        assert!(refused(&x, &w, Some(&ones(&[3]))).contains("bias must be [4]"));
        assert!(refused(&x, &ones(&[3]), None).contains("2 axes"));
    }
}
