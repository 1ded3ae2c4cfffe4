//! Softmax along the last axis.

use super::case::{Array, Arrays, Case, Layout, OpSpec, Port, Tensors, need};
use crate::Caps;
use crate::cpu::softmax as cpu;
use crate::error::Result;
use crate::kernel::{
    Access, Cuda, CudaPlan, Kernel, Plan, Stored, cuda_text, params, require_float,
};
use crate::tape;
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

const OP: &str = "softmax";
const WGSL: &str =
    concat!(include_str!("../../shaders/group.wgsl"), include_str!("../../shaders/softmax.wgsl"));

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct SoftmaxParams {
    pub(crate) rows: u32,
    pub(crate) columns: u32,
}

/// One workgroup a row.
fn plan(bytes: &[u8], _: &Caps) -> Plan {
    Plan::items(params::<SoftmaxParams>(bytes).rows as usize, 1)
}

const CUDA: Option<Cuda> = Some(Cuda {
    text: cuda_text!("softmax"),
    half: None,
    // One warp a row, eight a block.
    plan: |bytes, _| CudaPlan::items(params::<SoftmaxParams>(bytes).rows as usize * 32, 1, 256),
});

static FWD: Kernel = Kernel {
    name: "softmax_fwd_f32",
    bindings: &[("x", Access::Read, Stored), ("y", Access::Write, Stored)],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: CUDA,
    plan,
};

static BWD: Kernel = Kernel {
    name: "softmax_bwd_f32",
    bindings: &[
        ("y", Access::Read, Stored),
        ("dy", Access::Read, Stored),
        ("dx", Access::Write, Stored),
    ],
    cpu: cpu::bwd,
    wgsl: WGSL,
    cuda: CUDA,
    plan,
};

/// `y[.., c] = e^x[.., c] / sum over k of e^x[.., k]`, taken from each row's maximum so that nothing overflows. Backward:
/// `dx = y * (dy - sum(y * dy))`.
///
/// x may be f32, f16 or bf16; powers and sums are f32, y and dx are stored as x is.
///
/// # Errors
/// [`crate::Error::Shape`] for a tensor of u32.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    require_float(OP, "x", x)?;
    let columns = x.shape().last().copied().unwrap_or(1);
    let p = SoftmaxParams { rows: (x.numel() / columns) as u32, columns: columns as u32 };
    let y = x.empty_like()?;
    FWD.launch(&p, &[x, &y])?;
    let saved = y.detach();
    Ok(tape::record(OP, &[x], y, move |dy, _| {
        let dx = dy.empty_like()?;
        BWD.launch(&p, &[&saved, dy, &dx])?;
        Ok(vec![Some(dx)])
    }))
}

/// Conformance of [`softmax`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[Port::new("x", Layout::Plain).stored()],
    outputs: &[Port::new("y", Layout::Plain).stored()],
    attrs: &[],
    cases: || {
        let case = |label, shape: &[usize]| Case::new(label).normal("x", shape);
        vec![
            case("one column", &[3, 1]),
            case("odd", &[2, 3, 7]),
            // Columns of whole accesses, the last lanes of a warp without any.
            Case::new("72 columns").uniform("x", &[5, 72], -3.0, 3.0),
            // No outliers: in a row that one element has all to itself, the gradients are what rounding leaves.
            Case::new("129 columns").uniform("x", &[2, 129], -3.0, 3.0),
            case("many rows", &[131, 33]).no_gradcheck(),
        ]
    },
    run: |_, t: &Tensors| Ok(Tensors::from([("y".into(), softmax(need(OP, t, "x")?)?)])),
    reference: |_, a: &Arrays| {
        let x = need(OP, a, "x")?;
        let mut data = Vec::new();
        for row in x.data.chunks(x.shape[x.shape.len() - 1]) {
            let max = row.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(v));
            let sum: f64 = row.iter().map(|v| (v - max).exp()).sum();
            data.extend(row.iter().map(|v| (v - max).exp() / sum));
        }
        Ok(Arrays::from([("y".into(), Array { shape: x.shape.clone(), data })]))
    },
};
