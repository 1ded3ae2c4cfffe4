//! Plans of the CUDA kernels of the fused attention block: the same tiles and bytes as `kernels/attention_block.cu` and
//! `kernels/attention_block_mma.cu`.

use super::{AttentionBlockParams, tiles};
use crate::Caps;
use crate::kernel::{Cuda, CudaPlan, CudaText, cuda_text, params};
use crate::ops::global_attention::{one_tile_bytes, tile_bytes};

const SINGLE: CudaText = cuda_text!("attention_block");
const HALF: CudaText = cuda_text!("attention_block_mma");
const THREADS: u32 = 256;
/// Four warps.
const HALF_THREADS: u32 = 128;

const fn both(
    plan: fn(&[u8], &Caps) -> CudaPlan,
    half: fn(&[u8], &Caps) -> CudaPlan,
) -> Option<Cuda> {
    Some(Cuda { text: SINGLE, half: Some(half), plan })
}

/// Blocks along x for a product of rows x columns.
fn product(rows: usize, columns: usize) -> CudaPlan {
    CudaPlan::grid([tiles(rows, columns) as u32, 1, 1], THREADS)
}

/// The same plan for the kernels of the 16-bit types.
fn half(plan: CudaPlan) -> CudaPlan {
    CudaPlan { block: HALF_THREADS, ..plan }.text(HALF)
}

/// A block for a head of `images` images.
fn heads(p: &AttentionBlockParams) -> [u32; 3] {
    [p.attention.n.div_ceil(p.images) * p.attention.g, 1, 1]
}

fn proj(bytes: &[u8], _: &Caps) -> CudaPlan {
    let p: AttentionBlockParams = params(bytes);
    product(p.rows(), p.o as usize)
}

fn dgrad(bytes: &[u8], _: &Caps) -> CudaPlan {
    let p: AttentionBlockParams = params(bytes);
    product(p.rows(), p.c as usize)
}

fn wgrad(bytes: &[u8], _: &Caps) -> CudaPlan {
    let p: AttentionBlockParams = params(bytes);
    let plan = product(p.padded_depth(), p.c as usize);
    CudaPlan { grid: [plan.grid[0], 3, p.parts], ..plan }
}

/// Forward on tensor cores, heads of up to 16, 32, 64 and 128 numbers: three stages of 64 rows and of so many columns of (q, k, v),
/// or what the attention wants.
fn fwd_mma(bytes: &[u8], _: &Caps) -> CudaPlan {
    let p: AttentionBlockParams = params(bytes);
    let (columns, entry) = match p.attention.d {
        0..=16 => (64, ""),
        17..=32 => (96, "attention_block_fwd_d32_f32"),
        33..=64 => (192, "attention_block_fwd_d64_f32"),
        65..=128 => (192, "attention_block_fwd_d128_f32"),
        _ => return CudaPlan::REFUSED,
    };
    // A step of 32 numbers of 2 bytes.
    let stages = 3 * (64 + columns) * 32 * 2;
    CudaPlan::grid(heads(&p), HALF_THREADS)
        .shared(stages.max(one_tile_bytes(&p.attention)))
        .entry(entry)
        .text(HALF)
}

pub(super) const FWD: Option<Cuda> = both(
    |bytes, _| {
        let p: AttentionBlockParams = params(bytes);
        let entry = if p.attention.d <= 32 { "" } else { "attention_block_fwd_d64_f32" };
        CudaPlan::grid(heads(&p), THREADS).shared(tile_bytes(&p.attention)).entry(entry)
    },
    fwd_mma,
);

pub(super) const PROJ: Option<Cuda> = both(proj, |bytes, caps| half(proj(bytes, caps)));

pub(super) const DGRAD: Option<Cuda> = both(dgrad, |bytes, caps| half(dgrad(bytes, caps)));

pub(super) const WGRAD: Option<Cuda> = both(wgrad, |bytes, caps| half(wgrad(bytes, caps)));
