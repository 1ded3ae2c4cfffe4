//! Elementwise ops.

use super::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use crate::cpu::elementwise as cpu;
use crate::error::{Error, Result};
use crate::kernel::{Access, Kernel, Plan, params, require_f32};
use crate::tape::{self, AddParams};
use crate::tensor::Tensor;

const WGSL: &str = include_str!("../../shaders/elementwise.wgsl");

fn plan(bytes: &[u8], _: &crate::Caps) -> Plan {
    Plan::items(params::<AddParams>(bytes).len as usize, 256)
}

static RELU_FWD: Kernel = Kernel {
    name: "relu_fwd_f32",
    bindings: &[("x", Access::Read), ("y", Access::Write)],
    cpu: cpu::relu_fwd,
    wgsl: WGSL,
    cuda: None,
    plan,
};

static RELU_BWD: Kernel = Kernel {
    name: "relu_bwd_f32",
    bindings: &[("y", Access::Read), ("dy", Access::Read), ("dx", Access::Write)],
    cpu: cpu::relu_bwd,
    wgsl: WGSL,
    cuda: None,
    plan,
};

/// `a + b`, of equal shapes.
///
/// # Errors
/// [`Error::Shape`] where the shapes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    require_f32("add", "a", a)?;
    require_f32("add", "b", b)?;
    if a.shape() != b.shape() {
        return Err(Error::shape(
            "add",
            format!("shapes must be equal: a is {:?}, b is {:?}", a.shape(), b.shape()),
        ));
    }
    let y = tape::add(a, b)?;
    Ok(tape::record("add", &[a, b], y, |dy, _| Ok(vec![Some(dy.clone()), Some(dy.clone())])))
}

/// `max(x, 0)`, any shape; NaN stays NaN.
///
/// # Errors
/// [`Error::Shape`] for a tensor that is not f32.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    require_f32("relu", "x", x)?;
    let p = AddParams { len: x.numel() as u32 };
    let y = Tensor::empty(x.device(), x.shape())?;
    RELU_FWD.launch(&p, &[x, &y])?;
    let saved = y.clone();
    Ok(tape::record("relu", &[x], y, move |dy, _| {
        let dx = Tensor::empty(dy.device(), dy.shape())?;
        RELU_BWD.launch(&p, &[&saved, dy, &dx])?;
        Ok(vec![Some(dx)])
    }))
}

/// Conformance of [`relu`].
pub(crate) static RELU: OpSpec = OpSpec {
    name: "relu",
    inputs: &[Port::new("x", Layout::Image)],
    outputs: &[Port::new("y", Layout::Image)],
    attrs: &[],
    cases: || {
        vec![
            Case::new("one element").normal("x", &[1]),
            Case::new("odd").normal("x", &[2, 7, 1, 9]),
            Case::new("past a workgroup").normal("x", &[3, 33, 5, 7]).no_gradcheck(),
        ]
    },
    run: |_: &Attrs, t: &Tensors| Ok(Tensors::from([("y".into(), relu(need("relu", t, "x")?)?)])),
    reference: |_: &Attrs, a: &Arrays| {
        let x = need("relu", a, "x")?;
        let data = x.data.iter().map(|v| v.max(0.0)).collect();
        Ok(Arrays::from([("y".into(), Array { shape: x.shape.clone(), data })]))
    },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    fn check(device: &Device) {
        let x =
            Tensor::from_f32(device, &[5], &[-1.0, 0.0, 2.0, -3.0, 4.0]).unwrap().requires_grad();
        let y = relu(&x).unwrap();
        let z = add(&y, &x).unwrap();
        assert_eq!(z.to_f32().unwrap(), [-1.0, 0.0, 4.0, -3.0, 8.0]);
        let dy = Tensor::full(device, &[5], 3.0).unwrap();
        let grads = z.backward_with(&dy).unwrap();
        assert_eq!(grads.get(&x).unwrap().to_f32().unwrap(), [3.0, 3.0, 6.0, 3.0, 6.0]);
        assert!(z.backward_with(&dy).is_err_and(|e| e.to_string().contains("earlier backward")));
    }

    #[test]
    fn on_the_cpu() {
        check(&Device::cpu());
    }

    #[test]
    #[cfg(feature = "wgpu")]
    fn on_a_gpu() {
        match Device::new("wgpu") {
            Ok(device) => check(&device),
            Err(e) => println!("skipped: {e}"),
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
