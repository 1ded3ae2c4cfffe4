//! Sums over rows: what the backward of everything that is broadcast along rows needs (biases, norms).

use crate::cpu::reduce as cpu;
use crate::error::Result;
use crate::kernel::{Access, Cuda, CudaPlan, F32, Kernel, Plan, Stored, cuda_text, params};
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

/// How `[rows, C]` is cut into blocks of rows that are summed one by one, then together: two launches, a fixed order of
/// additions whatever the device, and enough blocks to fill a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub(crate) rows: u32,
    pub(crate) channels: u32,
    pub(crate) rows_per_block: u32,
    pub(crate) blocks: u32,
}

/// Bytes of a block: small enough for a CPU's first cache, large enough to be worth a hand-over.
const BLOCK_BYTES: usize = 32 * 1024;

/// The second stage sums this many blocks at most.
const MAX_BLOCKS: usize = 256;

impl Blocks {
    pub(crate) fn new(rows: usize, channels: usize) -> Self {
        let wanted = (rows * channels * 4).div_ceil(BLOCK_BYTES).clamp(1, MAX_BLOCKS);
        // A multiple of 8 rows, which kernels take together.
        let rows_per_block = rows.div_ceil(wanted).next_multiple_of(8);
        Self {
            rows: rows as u32,
            channels: channels as u32,
            rows_per_block: rows_per_block as u32,
            blocks: rows.div_ceil(rows_per_block) as u32,
        }
    }
}

/// Invocations of a workgroup, along the channels.
pub(crate) const GROUP: u32 = 64;

/// A grid of channels x blocks.
pub(crate) fn block_plan(channels: u32, blocks: u32) -> Plan {
    Plan { entry: "", grid: [channels.div_ceil(GROUP), blocks, 1] }
}

/// In CUDA, `chunks` of channels along x and `rows` along y, as `kernels/columns.cuh` cuts them.
pub(crate) fn column_plan(channels: u32, rows: u32) -> CudaPlan {
    CudaPlan::grid([column_chunks(channels), rows, 1], 256)
}

/// Blocks along the channels: each has a power of two of threads, at most 32, with 4 channels each where 4 divides them.
pub(crate) fn column_chunks(channels: u32) -> u32 {
    let packs = if channels.is_multiple_of(4) { channels / 4 } else { channels };
    packs.div_ceil(packs.next_power_of_two().min(32))
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct SumRowsParams {
    pub(crate) rows: u32,
    pub(crate) channels: u32,
    pub(crate) rows_per_block: u32,
    pub(crate) blocks: u32,
}

static SUM_ROWS: Kernel = Kernel {
    name: "sum_rows_fwd_f32",
    bindings: &[("x", Access::Read, Stored), ("sum", Access::Write, F32)],
    cpu: cpu::sum_rows_fwd,
    wgsl: include_str!("../../shaders/reduce.wgsl"),
    cuda: Some(Cuda {
        text: cuda_text!("reduce"),
        half: None,
        plan: |bytes, _| {
            let p: SumRowsParams = params(bytes);
            column_plan(p.channels, p.blocks)
        },
    }),
    plan: |bytes, _| {
        let p: SumRowsParams = params(bytes);
        block_plan(p.channels, p.blocks)
    },
};

/// The sum over all axes but the last: `[.., C] -> [C]`, in f32 however x is stored, off the tape.
pub(crate) fn sum_rows(x: &Tensor) -> Result<Tensor> {
    let channels = x.shape().last().copied().unwrap_or(1);
    let b = Blocks::new(x.numel() / channels, channels);
    let launch = |x: &Tensor, rows, rows_per_block, blocks| -> Result<Tensor> {
        let p = SumRowsParams { rows, channels: b.channels, rows_per_block, blocks };
        let sum = Tensor::empty(x.device(), &[blocks as usize, channels])?;
        SUM_ROWS.launch(&p, &[x, &sum])?;
        Ok(sum)
    };
    let mut sum = launch(x, b.rows, b.rows_per_block, b.blocks)?;
    if b.blocks > 1 {
        sum = launch(&sum, b.blocks, b.blocks, 1)?;
    }
    sum.reshape(&[channels])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn sums_the_rows_of_any_shape() {
        for shape in [&[1usize][..], &[7, 3], &[2, 33, 9, 5], &[3000, 17]] {
            let n: usize = shape.iter().product();
            let data: Vec<f32> = (0..n).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
            let x = Tensor::from_f32(&Device::cpu(), shape, &data).unwrap();
            let c = shape[shape.len() - 1];
            let want: Vec<f32> = (0..c).map(|i| data.iter().skip(i).step_by(c).sum()).collect();
            assert_eq!(sum_rows(&x).unwrap().to_f32().unwrap(), want, "{shape:?}");
        }
    }
}
