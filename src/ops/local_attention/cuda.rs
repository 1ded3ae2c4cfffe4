//! Plans of the CUDA kernels of local attention: the groups of lanes of `kernels/local_attention.cuh`, and in half precision the
//! patches of `kernels/local_attention_mma.cuh`.

use super::LocalAttentionParams;
use crate::kernel::{Cuda, CudaPlan, CudaText, cuda_text, params};

const FORWARD: CudaText = cuda_text!("local_attention");
const BACKWARD: CudaText = cuda_text!("local_attention_bwd");

const FORWARD_MMA: CudaText = cuda_text!("local_attention_mma");
const BACKWARD_MMA: CudaText = cuda_text!("local_attention_bwd_mma");
const TABLES_MMA: CudaText = cuda_text!("local_attention_tables_mma");

/// Threads of a block.
const THREADS: u32 = 128;

/// Numbers of an access of 16 bytes.
const F32_ACCESS: u32 = 4;
const HALF_ACCESS: u32 = 8;

/// Groups of `lanes` that own `places` neighbouring places of a row, with `floats` of shared memory a place and column of the
/// window; `width` numbers an access. `entries` for heads of up to 16, 32, 64 and 512 numbers.
fn groups(bytes: &[u8], width: u32, floats: u32, entries: [&'static str; 4]) -> CudaPlan {
    let p: LocalAttentionParams = params(bytes);
    let (lanes, places, entry) = match p.d {
        0..=16 => (16 / width, 4, entries[0]),
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

/// A pass on tensor cores: what a block of `kernels/local_attention_mma.cuh` holds.
struct Patches {
    text: CudaText,
    /// For heads of 16, 32, 64 and 128 numbers.
    entries: [&'static str; 4],
    /// Threads of a block for each of these: 64 for each patch side by side.
    threads: [u32; 4],
    /// Tensors of which each warp holds its own patch.
    tensors: u32,
    /// 1 where a band has statistics.
    statistics: u32,
}

impl Patches {
    /// The plan where this pass is for tensor cores: windows of more than 5 x 5 (smaller ones would mask most of their
    /// products) and widths that have an entry.
    fn plan(&self, bytes: &[u8]) -> Option<CudaPlan> {
        let p: LocalAttentionParams = params(bytes);
        let width = [16, 32, 64, 128].iter().position(|d| *d == p.d)?;
        if p.kh * p.kw <= 25 {
            return None;
        }
        let threads = if p.w <= 8 { 128 } else { self.threads[width] };
        let (across, warps) = (threads / 64, threads / 32);
        let blocks = p.n * p.h.div_ceil(8) * p.w.div_ceil(4 * across) * p.g;
        let plan = CudaPlan::grid([blocks, 1, 1], threads)
            .text(self.text)
            .entry(self.entries[width])
            .shared(self.shared(&p, across, warps));
        Some(plan)
    }

    /// Bytes of shared memory: `Memory` of the kernels.
    fn shared(&self, p: &LocalAttentionParams, across: u32, warps: u32) -> u32 {
        const BAND_BYTES: u32 = 36864;
        let (row, columns) = (2 * (p.d + 8), p.kw + 4 * across - 1);
        let fits = |rows: &u32| rows * columns * 2 * row <= BAND_BYTES;
        let band = columns * [p.kh + 7, 8, 4].into_iter().find(fits).unwrap_or(2);
        let rel = p.has_rel_h + p.has_rel_w > 0;
        let term_rows = if rel { (p.kh + p.kw).next_multiple_of(16) } else { 0 };
        let rows = 2 * band + 2 * term_rows + 16 * warps * self.tensors;
        let numbers =
            2 * self.statistics * band + rel as u32 * warps * 640 + p.has_bias * p.kh * p.kw;
        rows * row + 4 * numbers
    }
}

const FWD_GROUPS: [&str; 4] = [
    "",
    "local_attention_fwd_d32_f32",
    "local_attention_fwd_d64_f32",
    "local_attention_fwd_wide_f32",
];
static FWD_PATCHES: Patches = Patches {
    text: FORWARD_MMA,
    entries: [
        "local_attention_fwd_mma_d16_f32",
        "local_attention_fwd_mma_d32_f32",
        "local_attention_fwd_mma_d64_f32",
        "local_attention_fwd_mma_d128_f32",
    ],
    threads: [256, 256, 128, 128],
    tensors: 1,
    statistics: 0,
};
pub(super) const FWD: Option<Cuda> = Some(Cuda {
    text: FORWARD,
    plan: |bytes, _| groups(bytes, F32_ACCESS, 1, FWD_GROUPS),
    half: Some(|bytes, _| {
        FWD_PATCHES.plan(bytes).unwrap_or_else(|| groups(bytes, HALF_ACCESS, 1, FWD_GROUPS))
    }),
});

const BWD_GROUPS: [&str; 4] = [
    "",
    "local_attention_bwd_d32_f32",
    "local_attention_bwd_d64_f32",
    "local_attention_bwd_wide_f32",
];
static BWD_PATCHES: Patches = Patches {
    text: BACKWARD_MMA,
    entries: [
        "local_attention_bwd_mma_d16_f32",
        "local_attention_bwd_mma_d32_f32",
        "local_attention_bwd_mma_d64_f32",
        "local_attention_bwd_mma_d128_f32",
    ],
    threads: [128; 4],
    tensors: 2,
    statistics: 1,
};
pub(super) const BWD: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    plan: |bytes, _| groups(bytes, F32_ACCESS, 2, BWD_GROUPS),
    half: Some(|bytes, _| {
        // dq at y = 0, dk and dv at y = 1.
        let patches =
            BWD_PATCHES.plan(bytes).map(|plan| CudaPlan { grid: [plan.grid[0], 2, 1], ..plan });
        patches.unwrap_or_else(|| groups(bytes, HALF_ACCESS, 2, BWD_GROUPS))
    }),
});

const BWD_DQ_GROUPS: [&str; 4] = [
    "",
    "local_attention_bwd_dq_d32_f32",
    "local_attention_bwd_dq_d64_f32",
    "local_attention_bwd_dq_wide_f32",
];
static BWD_DQ_PATCHES: Patches = Patches {
    text: BACKWARD_MMA,
    entries: [
        "local_attention_bwd_dq_mma_d16_f32",
        "local_attention_bwd_dq_mma_d32_f32",
        "local_attention_bwd_dq_mma_d64_f32",
        "local_attention_bwd_dq_mma_d128_f32",
    ],
    threads: [128; 4],
    tensors: 2,
    statistics: 0,
};
pub(super) const BWD_DQ: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    plan: |bytes, _| groups(bytes, F32_ACCESS, 2, BWD_DQ_GROUPS),
    half: Some(|bytes, _| {
        BWD_DQ_PATCHES.plan(bytes).unwrap_or_else(|| groups(bytes, HALF_ACCESS, 2, BWD_DQ_GROUPS))
    }),
});

const BWD_DKV_GROUPS: [&str; 4] = [
    "",
    "local_attention_bwd_dkv_d32_f32",
    "local_attention_bwd_dkv_d64_f32",
    "local_attention_bwd_dkv_wide_f32",
];
static BWD_DKV_PATCHES: Patches = Patches {
    text: BACKWARD_MMA,
    entries: [
        "local_attention_bwd_dkv_mma_d16_f32",
        "local_attention_bwd_dkv_mma_d32_f32",
        "local_attention_bwd_dkv_mma_d64_f32",
        "local_attention_bwd_dkv_mma_d128_f32",
    ],
    threads: [128; 4],
    tensors: 2,
    statistics: 1,
};
pub(super) const BWD_DKV: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    plan: |bytes, _| groups(bytes, F32_ACCESS, 0, BWD_DKV_GROUPS),
    half: Some(|bytes, _| {
        BWD_DKV_PATCHES.plan(bytes).unwrap_or_else(|| groups(bytes, HALF_ACCESS, 0, BWD_DKV_GROUPS))
    }),
});

static BWD_TABLES_PATCHES: Patches = Patches {
    text: TABLES_MMA,
    entries: [
        "local_attention_bwd_tables_mma_d16_f32",
        "local_attention_bwd_tables_mma_d32_f32",
        "local_attention_bwd_tables_mma_d64_f32",
        "local_attention_bwd_tables_mma_d128_f32",
    ],
    threads: [128; 4],
    tensors: 2,
    statistics: 0,
};

/// The table pass on tensor cores: a block for each piece and head, and where there is a bias also its sums and a patch's dS for
/// each of 4 warps. None where shared memory is too small for that.
fn tables(bytes: &[u8]) -> Option<CudaPlan> {
    let p: LocalAttentionParams = params(bytes);
    let halo = ((p.kh + 3) * (p.kw + 3)).next_multiple_of(16) + 8;
    let plan = BWD_TABLES_PATCHES.plan(bytes)?;
    let shared = plan.shared + p.has_bias * 4 * (4 * p.kh * p.kw + 2 * 16 * halo);
    let plan = CudaPlan { grid: [p.pieces * p.g, 1, 1], ..plan.shared(shared) };
    // What every GPU with 16-bit kernels has.
    (shared <= 99 * 1024).then_some(plan)
}

/// Lets the table pass of tensors in half precision sum by row where it is for tensor cores, with pieces of the map's tiles for
/// four blocks on each of 132 multiprocessors; of two tiles at least, as a block writes about as much as it reads for a tile.
pub(super) fn sum_by_row(p: &mut LocalAttentionParams) {
    if tables(bytemuck::bytes_of(p)).is_some() {
        let tiles = p.n * p.h.div_ceil(8) * p.w.div_ceil(8);
        p.by_row = 1;
        p.pieces = tiles.div_ceil(2).min(528u32.div_ceil(p.g));
    }
}

/// A warp an offset.
fn offsets(bytes: &[u8]) -> CudaPlan {
    let p: LocalAttentionParams = params(bytes);
    CudaPlan::items(32 * p.pieces as usize * p.layout().partial_rows(), 1, 256)
}

pub(super) const BWD_TABLES: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    plan: |bytes, _| offsets(bytes),
    half: Some(|bytes, _| {
        let by_row = params::<LocalAttentionParams>(bytes).by_row != 0;
        tables(bytes).filter(|_| by_row).unwrap_or_else(|| offsets(bytes))
    }),
});

pub(super) const BWD_TABLES_SUM: Option<Cuda> = Some(Cuda {
    text: BACKWARD,
    half: None,
    plan: |bytes, _| {
        let p: LocalAttentionParams = params(bytes);
        CudaPlan::items(p.layout().offsets()[3], 1, 256)
    },
});

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::CudaPlan;
    use bytemuck::Zeroable;

    fn window(d: u32, kh: u32, kw: u32, tables: u32) -> LocalAttentionParams {
        let zeros = LocalAttentionParams::zeroed();
        let (has_rel_h, has_rel_w, has_bias) = (tables & 1, tables >> 1 & 1, tables >> 2);
        let sizes =
            LocalAttentionParams { n: 2, h: 30, w: 31, g: 3, d, kh, kw, pieces: 5, ..zeros };
        LocalAttentionParams { has_rel_h, has_rel_w, has_bias, ..sizes }
    }

    /// The plans in half precision of all windows and tables that tensor cores take.
    fn plans(d: u32) -> Vec<(LocalAttentionParams, [CudaPlan; 4])> {
        let sides = || (3..=13u32).step_by(2);
        let windows = sides().flat_map(|kh| sides().map(move |kw| (kh, kw)));
        let wide = windows.filter(|(kh, kw)| kh * kw > 25);
        let all = wide.flat_map(|(kh, kw)| (0..8).map(move |t| window(d, kh, kw, t)));
        all.map(|p| {
            let bytes = bytemuck::bytes_of(&p);
            let passes = [&FWD_PATCHES, &BWD_PATCHES, &BWD_DQ_PATCHES, &BWD_DKV_PATCHES];
            (p, passes.map(|pass| pass.plan(bytes).unwrap()))
        })
        .collect()
    }

    #[test]
    fn every_pass_on_tensor_cores_fits_the_shared_memory_of_a_small_gpu() {
        for d in [16, 32, 64, 128] {
            for (p, passes) in plans(d) {
                for plan in passes {
                    let of = plan.entry;
                    assert!(plan.shared <= 99 * 1024, "{of}, {}x{}: {}", p.kh, p.kw, plan.shared);
                    assert_eq!(plan.shared % 4, 0);
                }
            }
        }
    }

    #[test]
    fn the_table_pass_leaves_tensor_cores_where_shared_memory_ends() {
        let by_row = |d, k, tables| {
            let mut p = window(d, k, k, tables);
            sum_by_row(&mut p);
            p.by_row == 1
        };
        assert!(by_row(32, 7, 7) && by_row(64, 13, 7) && by_row(128, 7, 7) && by_row(128, 13, 3));
        assert!(!by_row(128, 13, 7) && !by_row(32, 5, 7) && !by_row(24, 7, 7));
    }
}
