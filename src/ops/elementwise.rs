//! Elementwise ops: one read of each input, one write, so memory-bound everywhere.

use super::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use super::reduce::sum_rows;
use crate::cpu::elementwise as cpu;
use crate::error::{Error, Result};
use crate::kernel::{
    Access, CpuArgs, Cuda, CudaPlan, F32, Kernel, Plan, Stored, cuda_text, params, require_f32,
    require_float, require_same,
};
use crate::tape::{self, AddParams as Params};
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

const WGSL: &str = include_str!("../../shaders/elementwise.wgsl");
const CUDA: Cuda = Cuda {
    text: cuda_text!("elementwise"),
    // Every parameter block here begins with the number of elements.
    plan: |bytes, _| CudaPlan::items(params::<Params>(&bytes[..4]).len as usize, 4, 256),
    half: Some(|bytes, _| CudaPlan::items(params::<Params>(&bytes[..4]).len as usize, 8, 256)),
};

type Bindings = &'static [crate::kernel::Binding];

const UNARY: Bindings = &[("x", Access::Read, Stored), ("y", Access::Write, Stored)];
const BINARY: Bindings =
    &[("a", Access::Read, Stored), ("b", Access::Read, Stored), ("y", Access::Write, Stored)];
/// The backward of a function of one tensor: `saved` is its output where the slope follows from that, else its input.
const SLOPE: Bindings =
    &[("saved", Access::Read, Stored), ("dy", Access::Read, Stored), ("dx", Access::Write, Stored)];

const fn kernel(name: &'static str, bindings: Bindings, cpu: fn(&CpuArgs<'_>)) -> Kernel {
    let plan =
        |bytes: &[u8], _: &crate::Caps| Plan::items(params::<Params>(bytes).len as usize, 256);
    Kernel { name, bindings, cpu, wgsl: WGSL, cuda: Some(CUDA), plan }
}

static MUL_FWD: Kernel = kernel("mul_fwd_f32", BINARY, cpu::mul_fwd);
static RELU_FWD: Kernel = kernel("relu_fwd_f32", UNARY, cpu::relu_fwd);
static RELU_BWD: Kernel = kernel("relu_bwd_f32", SLOPE, cpu::relu_bwd);
static SIGMOID_FWD: Kernel = kernel("sigmoid_fwd_f32", UNARY, cpu::sigmoid_fwd);
static SIGMOID_BWD: Kernel = kernel("sigmoid_bwd_f32", SLOPE, cpu::sigmoid_bwd);
static SILU_FWD: Kernel = kernel("silu_fwd_f32", UNARY, cpu::silu_fwd);
static SILU_BWD: Kernel = kernel("silu_bwd_f32", SLOPE, cpu::silu_bwd);
static GELU_FWD: Kernel = kernel("gelu_fwd_f32", UNARY, cpu::gelu_fwd);
static GELU_BWD: Kernel = kernel("gelu_bwd_f32", SLOPE, cpu::gelu_bwd);

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct AddBiasParams {
    pub(crate) len: u32,
    pub(crate) channels: u32,
}

static ADD_BIAS_FWD: Kernel = Kernel {
    name: "add_bias_fwd_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("bias", Access::Read, F32),
        ("y", Access::Write, Stored),
    ],
    cpu: cpu::add_bias_fwd,
    wgsl: WGSL,
    cuda: Some(CUDA),
    plan: |bytes, _| Plan::items(params::<AddBiasParams>(bytes).len as usize, 256),
};

/// `a + b`, of equal shapes.
///
/// # Errors
/// [`Error::Shape`] where shapes or dtypes differ or a tensor is u32.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    check_equal("add", a, b)?;
    let y = tape::add(a, b)?;
    Ok(tape::record("add", &[a, b], y, |dy, _| Ok(vec![Some(dy.clone()), Some(dy.clone())])))
}

/// `a * b`, element by element, of equal shapes.
///
/// # Errors
/// [`Error::Shape`] where shapes or dtypes differ or a tensor is u32.
pub fn mul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    check_equal("mul", a, b)?;
    let y = product(a, b)?;
    let (saved_a, saved_b) = (a.detach(), b.detach());
    Ok(tape::record("mul", &[a, b], y, move |dy, needs| {
        let da = needs[0].then(|| product(dy, &saved_b)).transpose()?;
        let db = needs[1].then(|| product(dy, &saved_a)).transpose()?;
        Ok(vec![da, db])
    }))
}

fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let y = a.empty_like()?;
    MUL_FWD.launch(&Params { len: a.numel() as u32 }, &[a, b, &y])?;
    Ok(y)
}

fn check_equal(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    require_float(op, "a", a)?;
    require_same(op, ("a", a), "b", b)?;
    if a.shape() == b.shape() {
        return Ok(());
    }
    let message = format!("shapes must be equal: a is {:?}, b is {:?}", a.shape(), b.shape());
    Err(Error::shape(op, message))
}

/// `x + bias`, with `bias [C]` along the last axis of `x [.., C]`.
///
/// # Errors
/// [`Error::Shape`] where the bias does not have the length of the last axis, x is u32 or the bias is not f32.
pub fn add_bias(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    require_float("add_bias", "x", x)?;
    require_f32("add_bias", "bias", bias)?;
    let channels = x.shape().last().copied().unwrap_or(0);
    if bias.shape() != [channels] {
        let message = format!(
            "bias must be as long as the last axis of x, [{channels}], but it is {:?} (x is {:?})",
            bias.shape(),
            x.shape()
        );
        return Err(Error::shape("add_bias", message));
    }
    let p = AddBiasParams { len: x.numel() as u32, channels: channels as u32 };
    let y = x.empty_like()?;
    ADD_BIAS_FWD.launch(&p, &[x, bias, &y])?;
    Ok(tape::record("add_bias", &[x, bias], y, |dy, needs| {
        Ok(vec![Some(dy.clone()), needs[1].then(|| sum_rows(dy)).transpose()?])
    }))
}

/// What the backward of a function of one tensor reads.
#[derive(Clone, Copy, PartialEq)]
enum Saves {
    Input,
    Output,
}

fn unary(
    op: &'static str,
    (fwd, bwd): (&'static Kernel, &'static Kernel),
    saves: Saves,
    x: &Tensor,
) -> Result<Tensor> {
    require_float(op, "x", x)?;
    let p = Params { len: x.numel() as u32 };
    let y = x.empty_like()?;
    fwd.launch(&p, &[x, &y])?;
    let saved = if saves == Saves::Input { x.detach() } else { y.clone() };
    Ok(tape::record(op, &[x], y, move |dy, _| {
        let dx = dy.empty_like()?;
        bwd.launch(&p, &[&saved, dy, &dx])?;
        Ok(vec![Some(dx)])
    }))
}

/// `max(x, 0)`, any shape; NaN stays NaN.
///
/// # Errors
/// [`Error::Shape`] for a tensor of u32.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    unary("relu", (&RELU_FWD, &RELU_BWD), Saves::Output, x)
}

/// `1 / (1 + e^-x)`, any shape.
///
/// # Errors
/// [`Error::Shape`] for a tensor of u32.
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    unary("sigmoid", (&SIGMOID_FWD, &SIGMOID_BWD), Saves::Output, x)
}

/// `x * sigmoid(x)` (also called swish), any shape.
///
/// # Errors
/// [`Error::Shape`] for a tensor of u32.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    unary("silu", (&SILU_FWD, &SILU_BWD), Saves::Input, x)
}

/// `x * cdf(x)` with the standard normal distribution function: the exact GELU (Hendrycks and Gimpel 2016), not its tanh
/// approximation. Any shape.
///
/// # Errors
/// [`Error::Shape`] for a tensor of u32.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    unary("gelu", (&GELU_FWD, &GELU_BWD), Saves::Input, x)
}

fn unary_cases() -> Vec<Case> {
    vec![
        Case::new("one element").normal("x", &[1]),
        Case::new("odd").normal("x", &[2, 7, 1, 9]),
        Case::new("129").uniform("x", &[129], -9.0, 9.0),
        Case::new("past a workgroup").normal("x", &[3, 33, 5, 7]).no_gradcheck(),
    ]
}

const X: &[Port] = &[Port::new("x", Layout::Image).stored()];
const A_B: &[Port] =
    &[Port::new("a", Layout::Image).stored(), Port::new("b", Layout::Image).stored()];
const Y: &[Port] = &[Port::new("y", Layout::Image).stored()];

fn run_unary(op: &'static str, f: fn(&Tensor) -> Result<Tensor>, t: &Tensors) -> Result<Tensors> {
    Ok(Tensors::from([("y".into(), f(need(op, t, "x")?)?)]))
}

fn map_array(op: &'static str, f: impl Fn(f64) -> f64, a: &Arrays) -> Result<Arrays> {
    let x = need(op, a, "x")?;
    let data = x.data.iter().map(|&v| f(v)).collect();
    Ok(Arrays::from([("y".into(), Array { shape: x.shape.clone(), data })]))
}

fn zip_arrays(op: &'static str, f: impl Fn(f64, f64) -> f64, t: &Arrays) -> Result<Arrays> {
    let (a, b) = (need(op, t, "a")?, need(op, t, "b")?);
    let data = a.data.iter().zip(&b.data).map(|(&a, &b)| f(a, b)).collect();
    Ok(Arrays::from([("y".into(), Array { shape: a.shape.clone(), data })]))
}

/// Conformance of [`relu`].
pub(crate) static RELU: OpSpec = OpSpec {
    name: "relu",
    inputs: X,
    outputs: Y,
    attrs: &[],
    cases: unary_cases,
    run: |_, t| run_unary("relu", relu, t),
    reference: |_, a| map_array("relu", |x| x.max(0.0), a),
};

/// Conformance of [`sigmoid`].
pub(crate) static SIGMOID: OpSpec = OpSpec {
    name: "sigmoid",
    inputs: X,
    outputs: Y,
    attrs: &[],
    cases: unary_cases,
    run: |_, t| run_unary("sigmoid", sigmoid, t),
    reference: |_, a| map_array("sigmoid", |x| 1.0 / (1.0 + (-x).exp()), a),
};

/// Conformance of [`silu`].
pub(crate) static SILU: OpSpec = OpSpec {
    name: "silu",
    inputs: X,
    outputs: Y,
    attrs: &[],
    cases: unary_cases,
    run: |_, t| run_unary("silu", silu, t),
    reference: |_, a| map_array("silu", |x| x / (1.0 + (-x).exp()), a),
};

/// Conformance of [`gelu`].
pub(crate) static GELU: OpSpec = OpSpec {
    name: "gelu",
    inputs: X,
    outputs: Y,
    attrs: &[],
    cases: unary_cases,
    run: |_, t| run_unary("gelu", gelu, t),
    reference: |_, a| map_array("gelu", |x| x * normal_cdf(x), a),
};

/// The standard normal distribution function: `1/2 + density(x) * (x + x^3/3 + x^5/(3*5) + ..)` (Abramowitz and Stegun,
/// 26.2.11).
fn normal_cdf(x: f64) -> f64 {
    if x.abs() > 8.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let (mut term, mut sum) = (x, x);
    for k in 1..200 {
        term *= x * x / f64::from(2 * k + 1);
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
}

fn binary_cases() -> Vec<Case> {
    let case = |label, shape: &[usize]| Case::new(label).normal("a", shape).normal("b", shape);
    vec![
        case("one element", &[1]),
        case("odd", &[2, 7, 3, 5]),
        case("past a workgroup", &[2, 9, 5, 33]).no_gradcheck(),
    ]
}

/// Conformance of [`add`].
pub(crate) static ADD: OpSpec = OpSpec {
    name: "add",
    inputs: A_B,
    outputs: Y,
    attrs: &[],
    cases: binary_cases,
    run: |_, t| Ok(Tensors::from([("y".into(), add(need("add", t, "a")?, need("add", t, "b")?)?)])),
    reference: |_, t| zip_arrays("add", |a, b| a + b, t),
};

/// Conformance of [`mul`].
pub(crate) static MUL: OpSpec = OpSpec {
    name: "mul",
    inputs: A_B,
    outputs: Y,
    attrs: &[],
    cases: binary_cases,
    run: |_, t| Ok(Tensors::from([("y".into(), mul(need("mul", t, "a")?, need("mul", t, "b")?)?)])),
    reference: |_, t| zip_arrays("mul", |a, b| a * b, t),
};

/// Conformance of [`add_bias`].
pub(crate) static ADD_BIAS: OpSpec = OpSpec {
    name: "add_bias",
    inputs: &[Port::new("x", Layout::Image).stored(), Port::new("bias", Layout::Plain)],
    outputs: Y,
    attrs: &[],
    cases: || {
        let case = |label, shape: &[usize]| {
            Case::new(label).normal("x", shape).normal("bias", &shape[shape.len() - 1..])
        };
        vec![
            case("one element", &[1, 1]),
            case("odd", &[2, 3, 5, 7]),
            case("many rows", &[1, 129, 65, 3]).no_gradcheck(),
            case("129 channels", &[33, 129]).no_gradcheck(),
        ]
    },
    run: |_: &Attrs, t: &Tensors| {
        let y = add_bias(need("add_bias", t, "x")?, need("add_bias", t, "bias")?)?;
        Ok(Tensors::from([("y".into(), y)]))
    },
    reference: |_: &Attrs, a: &Arrays| {
        let (x, bias) = (need("add_bias", a, "x")?, need("add_bias", a, "bias")?);
        let data = x.data.iter().zip(bias.data.iter().cycle()).map(|(x, b)| x + b).collect();
        Ok(Arrays::from([("y".into(), Array { shape: x.shape.clone(), data })]))
    },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn add_relu_and_their_gradients() {
        let device = Device::cpu();
        let data = [-1.0, 0.0, 2.0, -3.0, 4.0];
        let x = Tensor::from_f32(&device, &[5], &data).unwrap().requires_grad();
        let z = add(&relu(&x).unwrap(), &x).unwrap();
        assert_eq!(z.to_f32().unwrap(), [-1.0, 0.0, 4.0, -3.0, 8.0]);
        let dy = Tensor::full(&device, &[5], 3.0).unwrap();
        let grads = z.backward_with(&dy).unwrap();
        assert_eq!(grads.get(&x).unwrap().to_f32().unwrap(), [3.0, 3.0, 6.0, 3.0, 6.0]);
    }

    #[test]
    fn nan_is_not_hidden() {
        let x = Tensor::from_f32(&Device::cpu(), &[2], &[f32::NAN, 1.0]).unwrap();
        for f in [relu, sigmoid, silu, gelu] {
            let y = f(&x).unwrap().to_f32().unwrap();
            assert!(y[0].is_nan() && y[1].is_finite());
        }
    }

    #[test]
    fn shapes_that_differ_are_refused_by_name() {
        let device = Device::cpu();
        let a = Tensor::zeros(&device, &[2, 3]).unwrap();
        let b = Tensor::zeros(&device, &[3, 2]).unwrap();
        for result in [add(&a, &b), mul(&a, &b)] {
            let message = result.unwrap_err().to_string();
            assert!(message.contains("[2, 3]") && message.contains("[3, 2]"), "{message}");
        }
        let bias = Tensor::zeros(&device, &[2]).unwrap();
        let message = add_bias(&a, &bias).unwrap_err().to_string();
        assert!(message.contains("bias") && message.contains("[3]"), "{message}");
    }

    #[test]
    fn the_reference_distribution_function() {
        for (x, want) in
            [(0.0, 0.5), (1.0, 0.841_344_746_068_542_9), (-2.0, 0.022_750_131_948_179_2)]
        {
            assert!((normal_cdf(x) - want).abs() < 1e-15);
        }
    }

    #[test]
    fn guards_see_a_kernel_that_leaves_its_tensor() {
        let device = Device::cpu();
        device.set_guarded(true);
        let x = Tensor::from_f32(&device, &[3], &[1.0, 2.0, 3.0]).unwrap();
        let y = relu(&x).unwrap();
        device.check_guards().unwrap();
        assert_eq!(y.to_f32().unwrap(), [1.0, 2.0, 3.0]);
        device.backend().write(y.buffer(), y.offset() + 12, &[0; 4]).unwrap();
        assert!(device.check_guards().is_err());
        drop(y);
        assert!(device.check_guards().is_err());
        // A tensor that is gone by the time of the check: its overrun was seen when it was dropped.
        let z = relu(&x).unwrap();
        device.backend().write(z.buffer(), z.offset() - 4, &[0; 4]).unwrap();
        drop(z);
        let message = device.check_guards().unwrap_err().to_string();
        assert!(message.contains("word -1 of a tensor of 3 words"), "{message}");
        device.check_guards().unwrap();
    }
}
