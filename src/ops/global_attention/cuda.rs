//! Plans of the CUDA kernels of global attention: the same tiles and bytes as `kernels/attention_tiles.cuh`.

use super::GlobalAttentionParams;
use crate::Caps;
use crate::kernel::{Cuda, CudaPlan, CudaText, cuda_text, params};

const FORWARD: CudaText = cuda_text!("global_attention");
const BACKWARD: CudaText = cuda_text!("global_attention_bwd");
const TABLES: CudaText = cuda_text!("global_attention_tables");

/// Tokens of a tile's side, and threads of a block.
const TILE: u32 = 64;
const THREADS: u32 = 256;

/// Bytes of shared memory: two slices and the scores, then `copies` of the position terms of a tile's queries.
fn shared(p: &GlobalAttentionParams, copies: u32) -> u32 {
    const SLICE: u32 = 32;
    const LINE: u32 = TILE + 4;
    let rows = p.has_rel_h * p.h.min((TILE - 1) / p.w + 2);
    let columns = p.has_rel_w * p.w.min(TILE);
    4 * (2 * SLICE * LINE + TILE * LINE + copies * TILE * (rows + columns))
}

/// Blocks of one tile of one head, `entries` for heads of up to 32 numbers, up to 64, and wider ones in pieces of 128.
fn tiles(p: &GlobalAttentionParams, copies: u32, entries: [&'static str; 3]) -> CudaPlan {
    let (width, entry) = match p.d {
        0..=32 => (32, entries[0]),
        33..=64 => (64, entries[1]),
        _ => (128, entries[2]),
    };
    let blocks = (p.tokens() as u32).div_ceil(TILE) * p.n * p.g;
    CudaPlan::grid([blocks, p.d.div_ceil(width), 1], THREADS).shared(shared(p, copies)).entry(entry)
}

pub(super) const FWD: Option<Cuda> = Some(Cuda {
    text: FORWARD,
    half: None,
    plan: |bytes, _: &Caps| {
        let entries = ["", "global_attention_fwd_d64_f32", "global_attention_fwd_d128_f32"];
        tiles(&params(bytes), 1, entries)
    },
});

/// Maps of one tile.
pub(super) const BWD: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    half: None,
    plan: |bytes, _| {
        let entries = ["", "global_attention_bwd_d64_f32", "global_attention_bwd_d128_f32"];
        tiles(&params(bytes), 2, entries)
    },
});

pub(super) const BWD_DQ: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    half: None,
    plan: |bytes, _| {
        let entries = ["", "global_attention_bwd_dq_d64_f32", "global_attention_bwd_dq_d128_f32"];
        tiles(&params(bytes), 2, entries)
    },
});

pub(super) const BWD_DKV: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    half: None,
    plan: |bytes, _| {
        let entries = ["", "global_attention_bwd_dkv_d64_f32", "global_attention_bwd_dkv_d128_f32"];
        tiles(&params(bytes), 1, entries)
    },
});

/// A warp an offset.
pub(super) const BWD_TABLES: Option<Cuda> = Some(Cuda {
    text: TABLES,
    half: None,
    plan: |bytes, _| {
        let p: GlobalAttentionParams = params(bytes);
        CudaPlan::items(32 * p.pieces as usize * p.layout().partial_rows(), 1, THREADS)
    },
});

pub(super) const BWD_TABLES_SUM: Option<Cuda> = Some(Cuda {
    text: TABLES,
    half: None,
    plan: |bytes, _| {
        let p: GlobalAttentionParams = params(bytes);
        CudaPlan::items(p.layout().offsets()[3], 1, THREADS)
    },
});
