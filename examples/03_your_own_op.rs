//! An op of your own, outside the crate: kernels, gradient, and the same checks that the crate's own ops go through.
//!
//!     cargo run --release --example 03_your_own_op
//!
//! The op is soft capping, y = cap * tanh(x / cap): nearly x where |x| is small against the cap, and never beyond it (used on
//! attention logits, "Gemma 2", 2024). An op consists of a parameter block, one kernel a pass for each kind of device, a
//! function that checks, launches and records the backward, and a description of how to try it.

use attn2d::kernel::{Access, CpuArgs, F32, Kernel, Plan, params};
use attn2d::ops::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use attn2d::{Caps, Device, Error, Result, Tensor, tape, verify};
use bytemuck::{Pod, Zeroable};

/// What the kernels are told beside their tensors: the same bytes on every device.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SoftCapParams {
    len: u32,
    cap: f32,
}

/// The GPU's text, for any vendor. `shaders/common.wgsl` of the crate, with `flat_id`, stands before it. Binding 0 is the
/// parameter block; the tensors follow in the kernel's order.
const WGSL: &str = "
struct SoftCapParams { len: u32, cap: f32 }

@group(0) @binding(0) var<uniform> p: SoftCapParams;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;

@compute @workgroup_size(256)
fn soft_cap_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.len { return; }
    // Some drivers give NaN for the tanh of a large number.
    y[i] = p.cap * tanh(clamp(a[i] / p.cap, -20.0, 20.0));
}

// a = y, b = dy
@compute @workgroup_size(256)
fn soft_cap_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.len { return; }
    let t = a[i] / p.cap;
    dx[i] = b[i] * (1.0 - t * t);
}
";

/// The CPU's kernels: plain functions over slices, in the order of the bindings.
fn cpu_fwd(args: &CpuArgs<'_>) {
    let p: SoftCapParams = args.params();
    for (y, x) in args.f32_mut(1).iter_mut().zip(args.f32(0)) {
        *y = p.cap * (x / p.cap).tanh();
    }
}

fn cpu_bwd(args: &CpuArgs<'_>) {
    let p: SoftCapParams = args.params();
    let inputs = args.f32(0).iter().zip(args.f32(1));
    for (dx, (y, dy)) in args.f32_mut(2).iter_mut().zip(inputs) {
        let t = y / p.cap;
        *dx = dy * (1.0 - t * t);
    }
}

/// How many workgroups: one invocation an element, 256 a workgroup.
fn plan(bytes: &[u8], _: &Caps) -> Plan {
    Plan::items(params::<SoftCapParams>(bytes).len as usize, 256)
}

static FWD: Kernel = Kernel {
    name: "soft_cap_fwd_f32",
    bindings: &[("x", Access::Read, F32), ("y", Access::Write, F32)],
    cpu: cpu_fwd,
    wgsl: WGSL,
    cuda: None,
    plan,
};

static BWD: Kernel = Kernel {
    name: "soft_cap_bwd_f32",
    bindings: &[("y", Access::Read, F32), ("dy", Access::Read, F32), ("dx", Access::Write, F32)],
    cpu: cpu_bwd,
    wgsl: WGSL,
    cuda: None,
    plan,
};

/// `cap * tanh(x / cap)`, any shape. Backward: `dx = dy * (1 - (y / cap)^2)`.
///
/// # Errors
/// [`Error::Shape`] for a cap that is not positive.
fn soft_cap(x: &Tensor, cap: f32) -> Result<Tensor> {
    if cap.is_nan() || cap <= 0.0 {
        return Err(Error::shape("soft_cap", format!("cap must be above 0, but it is {cap}")));
    }
    let p = SoftCapParams { len: x.numel() as u32, cap };
    let y = Tensor::empty(x.device(), x.shape())?;
    FWD.launch(&p, &[x, &y])?;
    // The backward needs the output; off the tape, or the tape would hold itself.
    let saved = y.detach();
    Ok(tape::record("soft_cap", &[x], y, move |dy, _| {
        let dx = Tensor::empty(dy.device(), dy.shape())?;
        BWD.launch(&p, &[&saved, dy, &dx])?;
        Ok(vec![Some(dx)])
    }))
}

/// How to try the op: its cases, and the truth in f64. Gradients are checked against finite differences of the truth.
static SOFT_CAP: OpSpec = OpSpec {
    name: "soft_cap",
    inputs: &[Port::new("x", Layout::Plain)],
    outputs: &[Port::new("y", Layout::Plain)],
    attrs: &["cap"],
    cases: || {
        vec![
            Case::new("one element").attr("cap", 2.0).normal("x", &[1]),
            Case::new("odd").attr("cap", 2.0).normal("x", &[3, 7, 5]),
            Case::new("far beyond the cap").attr("cap", 0.5).uniform("x", &[129], -90.0, 90.0),
            Case::new("past a workgroup").attr("cap", 30.0).normal("x", &[33, 129]).no_gradcheck(),
        ]
    },
    run: |attrs: &Attrs, t: &Tensors| {
        let y = soft_cap(need("soft_cap", t, "x")?, attrs.f64("cap", 1.0)? as f32)?;
        Ok(Tensors::from([("y".into(), y)]))
    },
    reference: |attrs: &Attrs, t: &Arrays| {
        let (x, cap) = (need("soft_cap", t, "x")?, attrs.f64("cap", 1.0)?);
        let data = x.data.iter().map(|x| cap * (x / cap).tanh()).collect();
        Ok(Arrays::from([("y".into(), Array { shape: x.shape.clone(), data })]))
    },
};

fn main() -> Result<()> {
    let x = Tensor::from_f32(&Device::cpu(), &[4], &[-100.0, -1.0, 0.5, 3.0])?.requires_grad();
    let y = soft_cap(&x, 2.0)?;
    let gradients = y.backward_with(&Tensor::full(x.device(), &[4], 1.0)?)?;
    let dx = gradients.get(&x).expect("x asked for a gradient");
    println!("y  = {:.4?}\ndx = {:.4?}\n", y.to_f32()?, dx.to_f32()?);

    // On the CPU and, where there is one, a GPU: with poisoned memory, guard words round each tensor, and two runs that must
    // be equal to the bit.
    let options = verify::Options { devices: "cpu,wgpu".into(), ..Default::default() };
    let outcome = verify::run_ops(&[&SOFT_CAP], &options, &mut |_| {})?;
    println!("{outcome}");
    if outcome.passed() { Ok(()) } else { Err(Error::device("cpu,wgpu", "soft_cap is not right")) }
}
