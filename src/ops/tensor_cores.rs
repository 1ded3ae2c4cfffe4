//! The instructions of `kernels/tensor_cores.cuh`, each alone: no op of a model, but conformance cases for `attn2d verify`,
//! which compare the hardware's and the emulated device's idea of them with plain loops.

use super::case::{Array, Arrays, Case, Layout, OpSpec, Port, Tensors, need};
use crate::cpu::tensor_cores as cpu;
use crate::kernel::{Access, Cuda, CudaPlan, F32, Kernel, Plan, Stored, cuda_text};
use crate::tensor::{DType, Tensor};

const OP: &str = "tensor_cores";

static KERNEL: Kernel = Kernel {
    name: "tensor_cores_f32",
    bindings: &[
        ("a", Access::Read, Stored),
        ("b", Access::Read, Stored),
        ("product", Access::Write, F32),
        ("shifted", Access::Write, Stored),
        ("powers", Access::Write, F32),
    ],
    cpu: cpu::each,
    wgsl: "",
    cuda: Some(Cuda {
        text: cuda_text!("tensor_cores_mma"),
        half: None,
        plan: |_, _| CudaPlan::grid([1, 1, 1], 32),
    }),
    plan: |_, _| Plan::items(1, 1),
};

/// product = a b, shifted = a, a row down, and powers = 2^b, with a `[16, 16]` and b `[16, 8]`.
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[
        Port::new("a", Layout::Plain).half_only().no_grad(),
        Port::new("b", Layout::Plain).half_only().no_grad(),
    ],
    outputs: &[
        Port::new("product", Layout::Plain).no_grad(),
        Port::new("shifted", Layout::Plain).half_only().no_grad(),
        Port::new("powers", Layout::Plain).no_grad(),
    ],
    attrs: &[],
    cases: || {
        vec![
            Case::new("each alone")
                .normal("a", &[16, 16])
                .uniform("b", &[16, 8], -9.0, 2.0)
                // The instructions are CUDA's; the CPU is the reference.
                .only_where(|caps| caps.half.contains(&DType::BF16)),
        ]
    },
    run: |_, t: &Tensors| {
        let (a, b) = (need(OP, t, "a")?, need(OP, t, "b")?);
        let product = Tensor::empty(a.device(), &[16, 8])?;
        let shifted = a.empty_like()?;
        let powers = Tensor::empty(a.device(), &[16, 8])?;
        KERNEL.launch(&0u32, &[a, b, &product, &shifted, &powers])?;
        let outputs = [("product", product), ("shifted", shifted), ("powers", powers)];
        Ok(outputs.map(|(name, t)| (name.into(), t)).into())
    },
    reference: |_, arrays: &Arrays| {
        let (a, b) = (need(OP, arrays, "a")?, need(OP, arrays, "b")?);
        let (mut product, mut shifted) = (Array::zeros(&[16, 8]), Array::zeros(&[16, 16]));
        for (i, j) in (0..16 * 8).map(|at| (at / 8, at % 8)) {
            product.set(&[i, j], (0..16).map(|k| a.get(&[i, k]) * b.get(&[k, j])).sum());
        }
        shifted.data[16..].copy_from_slice(&a.data[..15 * 16]);
        let powers = Array { shape: vec![16, 8], data: b.data.iter().map(|v| v.exp2()).collect() };
        let outputs = [("product", product), ("shifted", shifted), ("powers", powers)];
        Ok(outputs.map(|(name, array)| (name.into(), array)).into())
    },
};
