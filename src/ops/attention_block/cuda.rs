//! Plans of the CUDA kernels of the fused attention block: the same tiles and bytes as `kernels/attention_block.cu`.

use super::{AttentionBlockParams, tiles};
use crate::Caps;
use crate::kernel::{Cuda, CudaPlan, CudaText, cuda_text, params};
use crate::ops::global_attention::tile_bytes;

const TEXT: CudaText = cuda_text!("attention_block");
const THREADS: u32 = 256;

const fn single(plan: fn(&[u8], &Caps) -> CudaPlan) -> Option<Cuda> {
    Some(Cuda { text: TEXT, half: None, plan })
}

/// Blocks along x for a product of rows x columns.
fn product(rows: usize, columns: usize) -> CudaPlan {
    CudaPlan::grid([tiles(rows, columns) as u32, 1, 1], THREADS)
}

pub(super) const FWD: Option<Cuda> = single(|bytes, _| {
    let p: AttentionBlockParams = params(bytes);
    let blocks = p.attention.n.div_ceil(p.images) * p.attention.g;
    let entry = if p.attention.d <= 32 { "" } else { "attention_block_fwd_d64_f32" };
    CudaPlan::grid([blocks, 1, 1], THREADS).shared(tile_bytes(&p.attention)).entry(entry)
});

pub(super) const PROJ: Option<Cuda> = single(|bytes, _| {
    let p: AttentionBlockParams = params(bytes);
    product(p.rows(), p.o as usize)
});

pub(super) const DGRAD: Option<Cuda> = single(|bytes, _| {
    let p: AttentionBlockParams = params(bytes);
    product(p.rows(), p.c as usize)
});

pub(super) const WGRAD: Option<Cuda> = single(|bytes, _| {
    let p: AttentionBlockParams = params(bytes);
    let plan = product(p.padded_depth(), p.c as usize);
    CudaPlan { grid: [plan.grid[0], 3, p.parts], ..plan }
});
