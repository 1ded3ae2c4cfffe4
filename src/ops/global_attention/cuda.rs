//! Plans of the CUDA kernels of global attention: the same tiles and bytes as `kernels/attention_tiles.cuh`.

use super::GlobalAttentionParams;
use crate::Caps;
use crate::kernel::{Cuda, CudaPlan, CudaText, cuda_text, params};

const FORWARD: CudaText = cuda_text!("global_attention");
const BACKWARD: CudaText = cuda_text!("global_attention_bwd");
const FORWARD_MMA: CudaText = cuda_text!("global_attention_mma");
const BACKWARD_MMA: CudaText = cuda_text!("global_attention_bwd_mma");
const TABLES_MMA: CudaText = cuda_text!("global_attention_tables_mma");
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

/// Bytes of shared memory of the forward.
pub(in crate::ops) fn tile_bytes(p: &GlobalAttentionParams) -> u32 {
    shared(p, 1)
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

/// Sides up to which `kernels/global_attention_mma.cuh` keeps the terms of a whole map.
const WHOLE: u32 = 56;

/// Bytes of the position terms of `rows` queries, a line for each map row and column that has some.
fn terms(p: &GlobalAttentionParams, rows: u32) -> u32 {
    let by_tile = (p.has_rel_h != 0 && p.h > WHOLE) || (p.has_rel_w != 0 && p.w > WHOLE);
    let lines_h = if by_tile { p.h.min((TILE - 1) / p.w + 2) } else { p.h };
    let lines_w = if p.w > WHOLE { TILE } else { p.w };
    4 * (rows + 4) * (p.has_rel_h * lines_h + p.has_rel_w * lines_w)
}

/// Bytes of what describes two tiles of keys.
const KEYS: u32 = 8 * 2 * TILE;

/// The width that a head is computed with on tensor cores.
fn width(p: &GlobalAttentionParams) -> u32 {
    p.d.next_power_of_two().max(16)
}

/// Bytes of shared memory of the forward on tensor cores, in a map of one tile.
pub(in crate::ops) fn one_tile_bytes(p: &GlobalAttentionParams) -> u32 {
    KEYS + terms(p, TILE) + 4 * TILE * width(p)
}

/// Forward on tensor cores: tiles of 128 queries where there are that many and their terms leave room for two blocks.
fn forward_mma(bytes: &[u8], _: &Caps) -> CudaPlan {
    let (p, threads): (GlobalAttentionParams, u32) = (params(bytes), 128);
    let (d, tokens) = (width(&p), p.tokens() as u32);
    if d > 128 {
        return CudaPlan::REFUSED;
    }
    // k and v, twice where there is a next tile.
    let stages = 4 * TILE * d * if tokens > TILE { 2 } else { 1 };
    let shared = |rows: u32| KEYS + terms(&p, rows) + stages;
    let wide = tokens > 2 * TILE && (d == 32 || d == 64) && shared(2 * TILE) <= 80 * 1024;
    let rows = if wide { 2 * TILE } else { TILE };
    let entry = match (d, wide) {
        (16, _) => "",
        (32, false) => "global_attention_fwd_d32_f32",
        (32, true) => "global_attention_fwd_d32_m2_f32",
        (64, false) => "global_attention_fwd_d64_f32",
        (64, true) => "global_attention_fwd_d64_m2_f32",
        _ => "global_attention_fwd_d128_f32",
    };
    CudaPlan::grid([tokens.div_ceil(rows) * p.n * p.g, 1, 1], threads)
        .shared(shared(rows))
        .entry(entry)
        .text(FORWARD_MMA)
}

/// Bytes of tiles of two tensors in the backward, twice where there is a next tile and room for it.
fn stages(p: &GlobalAttentionParams) -> u32 {
    let (d, one) = (width(p), 4 * TILE * width(p));
    if p.tokens() as u32 > TILE && d < 128 { 2 * one } else { one }
}

/// Backward on tensor cores: blocks of a tile of queries, of keys, or (in maps of one tile) of either. Entries are for heads of up
/// to 16, 32, 64 and 128 numbers.
fn backward_mma(
    bytes: &[u8],
    (queries, keys): (bool, bool),
    entries: [&'static str; 4],
) -> CudaPlan {
    let p: GlobalAttentionParams = params(bytes);
    let (d, tokens) = (width(&p), p.tokens() as u32);
    let Some(&entry) = entries.get((d / 16).ilog2() as usize) else { return CudaPlan::REFUSED };
    let stages = stages(&p);
    let for_queries = 2 * terms(&p, TILE) + stages;
    // Statistics of two tiles of queries; heads of 128 have their keys there too.
    let for_keys = terms(&p, TILE) + 12 * 2 * TILE + stages + if d == 128 { stages } else { 0 };
    let shared = KEYS + (for_queries * queries as u32).max(for_keys * keys as u32);
    let blocks = tokens.div_ceil(TILE) * p.n * p.g;
    CudaPlan::grid([blocks, queries as u32 + keys as u32, 1], 128)
        .shared(shared)
        .entry(entry)
        .text(BACKWARD_MMA)
}

pub(super) const FWD: Option<Cuda> = Some(Cuda {
    text: FORWARD,
    half: Some(forward_mma),
    plan: |bytes, _: &Caps| {
        let entries = ["", "global_attention_fwd_d64_f32", "global_attention_fwd_d128_f32"];
        tiles(&params(bytes), 1, entries)
    },
});

/// Maps of one tile.
pub(super) const BWD: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    half: Some(|bytes, _| {
        let entries = [
            "",
            "global_attention_bwd_d32_f32",
            "global_attention_bwd_d64_f32",
            "global_attention_bwd_d128_f32",
        ];
        backward_mma(bytes, (true, true), entries)
    }),
    plan: |bytes, _| {
        let entries = ["", "global_attention_bwd_d64_f32", "global_attention_bwd_d128_f32"];
        tiles(&params(bytes), 2, entries)
    },
});

pub(super) const BWD_DQ: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    half: Some(|bytes, _| {
        let entries = [
            "",
            "global_attention_bwd_dq_d32_f32",
            "global_attention_bwd_dq_d64_f32",
            "global_attention_bwd_dq_d128_f32",
        ];
        backward_mma(bytes, (true, false), entries)
    }),
    plan: |bytes, _| {
        let entries = ["", "global_attention_bwd_dq_d64_f32", "global_attention_bwd_dq_d128_f32"];
        tiles(&params(bytes), 2, entries)
    },
});

pub(super) const BWD_DKV: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    half: Some(|bytes, _| {
        let entries = [
            "",
            "global_attention_bwd_dkv_d32_f32",
            "global_attention_bwd_dkv_d64_f32",
            "global_attention_bwd_dkv_d128_f32",
        ];
        backward_mma(bytes, (false, true), entries)
    }),
    plan: |bytes, _| {
        let entries = ["", "global_attention_bwd_dkv_d64_f32", "global_attention_bwd_dkv_d128_f32"];
        tiles(&params(bytes), 1, entries)
    },
});

/// A warp an offset.
fn tables(bytes: &[u8], _: &Caps) -> CudaPlan {
    let p: GlobalAttentionParams = params(bytes);
    CudaPlan::items(32 * p.pieces as usize * p.layout().partial_rows(), 1, THREADS)
}

/// Sums by axis on tensor cores: a block for each piece and head.
fn tables_mma(p: &GlobalAttentionParams) -> CudaPlan {
    let entries = [
        "global_attention_bwd_tables_d16_f32",
        "global_attention_bwd_tables_d32_f32",
        "global_attention_bwd_tables_d64_f32",
        "global_attention_bwd_tables_d128_f32",
    ];
    let d = width(p);
    let Some(&entry) = entries.get((d / 16).ilog2() as usize) else { return CudaPlan::REFUSED };
    // Terms and their sums, the queries' coordinates, k and v.
    let shared = KEYS + 2 * terms(p, TILE) + 8 * TILE + stages(p);
    CudaPlan::grid([p.pieces * p.g, 1, 1], 128).shared(shared).entry(entry).text(TABLES_MMA)
}

pub(super) const BWD_TABLES: Option<Cuda> = Some(Cuda {
    text: TABLES,
    half: Some(|bytes, caps| {
        let p: GlobalAttentionParams = params(bytes);
        if p.by_axis == 0 { tables(bytes, caps) } else { tables_mma(&p) }
    }),
    plan: tables,
});

pub(super) const BWD_TABLES_SUM: Option<Cuda> = Some(Cuda {
    text: TABLES,
    half: None,
    plan: |bytes, _| {
        let p: GlobalAttentionParams = params(bytes);
        CudaPlan::items(p.layout().offsets()[3], 1, THREADS)
    },
});
