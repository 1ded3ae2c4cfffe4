//! Two small passes over the rows of attention's tensors: other widths, and rowsum(dy * y) beside the log-sum-exp.

use crate::cpu::attention_rows as cpu;
use crate::error::Result;
use crate::kernel::{Access, Cuda, CudaPlan, F32, Kernel, Plan, Stored, cuda_text, params};
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

/// The parameter block of both kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct RowParams {
    /// Rows.
    pub rows: u32,
    /// Numbers in a row of the input.
    pub from: u32,
    /// Numbers in a row of the output.
    pub to: u32,
}

const WGSL: &str = include_str!("../../shaders/attention_rows.wgsl");

static PAD: Kernel = Kernel {
    name: "attention_rows_pad_f32",
    bindings: &[("x", Access::Read, Stored), ("padded", Access::Write, Stored)],
    cpu: cpu::pad,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("attention_rows"),
        half: None,
        plan: |bytes, _| {
            let p: RowParams = params(bytes);
            CudaPlan::items(p.rows as usize * p.to as usize, 1, 256)
        },
    }),
    plan: |bytes, _| {
        let p: RowParams = params(bytes);
        Plan::items(p.rows as usize * p.to as usize, 64)
    },
};

static DELTA: Kernel = Kernel {
    name: "attention_rows_delta_f32",
    bindings: &[
        ("y", Access::Read, Stored),
        ("dy", Access::Read, Stored),
        ("lse", Access::Read, F32),
        ("stats", Access::Write, F32),
    ],
    cpu: cpu::delta,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("attention_rows"),
        half: None,
        // Eight threads a row.
        plan: |bytes, _| CudaPlan::items(8 * params::<RowParams>(bytes).rows as usize, 1, 256),
    }),
    plan: |bytes, _| Plan::items(params::<RowParams>(bytes).rows as usize, 64),
};

/// `[.., from]` as `[.., to]`: rows cut, or filled with zeros.
pub(crate) fn repad(x: &Tensor, from: usize, to: usize) -> Result<Tensor> {
    if from == to {
        return Ok(x.detach());
    }
    let rows = x.numel() / from;
    let mut shape = x.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = *last / from * to;
    }
    let out = Tensor::uninit(x.device(), &shape, x.dtype())?;
    PAD.launch(&RowParams { rows: rows as u32, from: from as u32, to: to as u32 }, &[x, &out])?;
    Ok(out)
}

/// `[N, H, W, G, 2]` = (lse, rowsum(dy * y)) of y, dy `[N, H, W, G, d]` and lse `[N, H, W, G]`.
pub(crate) fn delta(y: &Tensor, dy: &Tensor, lse: &Tensor) -> Result<Tensor> {
    let mut shape = lse.shape().to_vec();
    shape.push(2);
    let stats = Tensor::empty(y.device(), &shape)?;
    let d = (y.numel() / lse.numel()) as u32;
    DELTA.launch(&RowParams { rows: lse.numel() as u32, from: d, to: 2 }, &[y, dy, lse, &stats])?;
    Ok(stats)
}
