//! Plans of the CUDA kernels of local attention: the groups of lanes of `kernels/local_attention.cuh`.

use super::LocalAttentionParams;
use crate::Caps;
use crate::kernel::{Cuda, CudaPlan, CudaText, cuda_text, params};

const FORWARD: CudaText = cuda_text!("local_attention");
const BACKWARD: CudaText = cuda_text!("local_attention_bwd");

/// Threads of a block.
const THREADS: u32 = 128;

/// Groups of `lanes` that own `places` neighbouring places of a row, with `floats` of shared memory a place and column of the
/// window. `entries` for heads of up to 16, 32, 64 and 512 numbers.
fn groups(bytes: &[u8], floats: u32, entries: [&'static str; 4]) -> CudaPlan {
    let p: LocalAttentionParams = params(bytes);
    let (lanes, places, entry) = match p.d {
        0..=16 => (4, 4, entries[0]),
        17..=32 => (4, 4, entries[1]),
        33..=64 => (4, 2, entries[2]),
        65..=512 => (32, 1, entries[3]),
        _ => return CudaPlan::REFUSED,
    };
    let count = (p.n * p.h * p.w.div_ceil(places) * p.g) as usize;
    CudaPlan::items(count * lanes as usize, 1, THREADS)
        .shared(4 * floats * THREADS / lanes * places * p.kw)
        .entry(entry)
}

pub(super) const FWD: Option<Cuda> = Some(Cuda {
    text: FORWARD,
    half: None,
    plan: |bytes, _: &Caps| {
        let entries = [
            "",
            "local_attention_fwd_d32_f32",
            "local_attention_fwd_d64_f32",
            "local_attention_fwd_wide_f32",
        ];
        groups(bytes, 1, entries)
    },
});

pub(super) const BWD: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    half: None,
    plan: |bytes, _| {
        let entries = [
            "",
            "local_attention_bwd_d32_f32",
            "local_attention_bwd_d64_f32",
            "local_attention_bwd_wide_f32",
        ];
        groups(bytes, 2, entries)
    },
});

pub(super) const BWD_DQ: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    half: None,
    plan: |bytes, _| {
        let entries = [
            "",
            "local_attention_bwd_dq_d32_f32",
            "local_attention_bwd_dq_d64_f32",
            "local_attention_bwd_dq_wide_f32",
        ];
        groups(bytes, 2, entries)
    },
});

pub(super) const BWD_DKV: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    half: None,
    plan: |bytes, _| {
        let entries = [
            "",
            "local_attention_bwd_dkv_d32_f32",
            "local_attention_bwd_dkv_d64_f32",
            "local_attention_bwd_dkv_wide_f32",
        ];
        groups(bytes, 0, entries)
    },
});

/// A warp an offset.
pub(super) const BWD_TABLES: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    half: None,
    plan: |bytes, _| {
        let p: LocalAttentionParams = params(bytes);
        CudaPlan::items(32 * p.pieces as usize * p.layout().partial_rows(), 1, 256)
    },
});

pub(super) const BWD_TABLES_SUM: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    half: None,
    plan: |bytes, _| {
        let p: LocalAttentionParams = params(bytes);
        CudaPlan::items(p.layout().offsets()[3], 1, 256)
    },
});
