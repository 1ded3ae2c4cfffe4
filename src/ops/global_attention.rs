//! Global attention over a feature map: every place attends to every place, with optional 2D position tables.
//!
//! With query (y, x), key (y', x') and offset (a, b) = (y' - y, x' - x), for each image and head g:
//!
//!   logit = scale * q.k + q.(rel_h[a] + rel_w[b]) + bias[g, a, b],   y = sum over keys of softmax(logit) * v.
//!
//! The tables' rows start at the smallest offset: row a + H-1 of `rel_h`, row b + W-1 of `rel_w`. Flash style (Dao et al.
//! 2022, "FlashAttention"): scores live in tiles, forward keeps the output and the log-sum-exp, backward makes the scores
//! again. Memory beside inputs and outputs grows with H W C, never with (H W)^2.

use super::attention::{
    Passes, Problem, TableLayout, attend, check, on_tensor_cores, padded, part,
};
use crate::cpu::global_attention as cpu;
use crate::error::{Error, Result};
use crate::kernel::{Access, F32, Kernel, Plan, Stored, params};
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

mod cuda;
mod spec;
mod tiles;
pub(super) use cuda::{one_tile_bytes, tile_bytes};
pub(crate) use spec::SPEC;
use tiles::Entries;

const OP: &str = "global_attention";

/// Channels of a head up to which the tensor-core kernels keep its rows in registers.
pub(super) const MAX_HALF_WIDTH: usize = 128;

/// Options of [`global_attention`].
#[derive(Clone, Copy, Debug, Default)]
pub struct GlobalAttention<'a> {
    /// Factor of q.k; 1 / sqrt(d) by default. The position terms are not scaled.
    pub scale: Option<f32>,
    /// Learned row offsets `[2H-1, G*d]`: row i belongs to the offset i - (H-1), key row minus query row.
    pub rel_h: Option<&'a Tensor>,
    /// Learned column offsets `[2W-1, G*d]`.
    pub rel_w: Option<&'a Tensor>,
    /// A bias for each head and offset, `[G, 2H-1, 2W-1]`.
    pub bias: Option<&'a Tensor>,
}

/// The parameter block of every kernel here.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct GlobalAttentionParams {
    /// Images.
    pub n: u32,
    /// Height of the map.
    pub h: u32,
    /// Width of the map.
    pub w: u32,
    /// Heads.
    pub g: u32,
    /// Channels of a head (on a GPU a multiple of 4).
    pub d: u32,
    /// 1 where there is a table of row offsets.
    pub has_rel_h: u32,
    /// 1 where there is a table of column offsets.
    pub has_rel_w: u32,
    /// 1 where there is a bias table.
    pub has_bias: u32,
    /// Factor of q.k.
    pub scale: f32,
    /// Pieces of the batch (or of the tiles of queries) whose table gradients a GPU sums apart.
    pub pieces: u32,
    /// Elements from dq to dk, to dv, to the tables in the packed gradients.
    pub part: u32,
    /// 1 where the tables' gradients are summed by axis (see `Passes::by_axis`).
    pub by_axis: u32,
}

impl GlobalAttentionParams {
    /// Places of the map.
    pub(crate) fn tokens(&self) -> usize {
        self.h as usize * self.w as usize
    }

    /// Elements of q.
    pub(crate) fn len(&self) -> usize {
        self.n as usize * self.tokens() * (self.g * self.d) as usize
    }

    /// Rows of `rel_h`.
    pub(crate) fn offsets_h(&self) -> usize {
        2 * self.h as usize - 1
    }

    /// Rows of `rel_w`.
    pub(crate) fn offsets_w(&self) -> usize {
        2 * self.w as usize - 1
    }

    /// How the tables lie in their buffer.
    pub(crate) fn layout(&self) -> TableLayout {
        TableLayout {
            rows: self.offsets_h(),
            columns: self.offsets_w(),
            heads: self.g as usize,
            d: self.d as usize,
            has: [self.has_rel_h != 0, self.has_rel_w != 0, self.has_bias != 0],
        }
    }
}

const FORWARD: &str = concat!(
    include_str!("../../shaders/attention_common.wgsl"),
    include_str!("../../shaders/global_attention.wgsl"),
    include_str!("../../shaders/global_attention_tiled.wgsl"),
    include_str!("../../shaders/global_attention_tiled_fwd.wgsl"),
    include_str!("../../shaders/global_attention_wide.wgsl")
);
const BACKWARD: &str = concat!(
    include_str!("../../shaders/attention_common.wgsl"),
    include_str!("../../shaders/global_attention.wgsl"),
    include_str!("../../shaders/global_attention_bwd.wgsl"),
    include_str!("../../shaders/global_attention_tiled.wgsl"),
    include_str!("../../shaders/global_attention_tiled_bwd.wgsl"),
    include_str!("../../shaders/global_attention_wide.wgsl")
);
const READ: Access = Access::Read;
const WRITE: Access = Access::Write;

/// The first six bindings of every backward kernel, then what it writes.
macro_rules! backward_bindings {
    ($($output:expr),+) => {
        &[("q", READ, Stored), ("k", READ, Stored), ("v", READ, Stored), ("tables", READ, F32), ("dy", READ, Stored), ("stats", READ, F32), $($output),+]
    };
}

static FWD: Kernel = Kernel {
    name: "global_attention_fwd_f32",
    bindings: &[
        ("q", READ, Stored),
        ("k", READ, Stored),
        ("v", READ, Stored),
        ("tables", READ, F32),
        ("y", WRITE, Stored),
        ("lse", WRITE, F32),
    ],
    cpu: cpu::fwd,
    wgsl: FORWARD,
    cuda: cuda::FWD,
    plan: |bytes, caps| {
        let entries = Entries {
            tiled: "global_attention_fwd_tiled_f32",
            wide: Some("global_attention_fwd_wide_f32"),
        };
        tiles::plan(bytes, caps, &entries)
    },
};

/// dq, dk and dv in one launch; the CPU also fills in the tables' gradients.
static BWD: Kernel = Kernel {
    name: "global_attention_bwd_f32",
    bindings: backward_bindings!(("grads", WRITE, Stored)),
    cpu: cpu::bwd,
    wgsl: BACKWARD,
    cuda: cuda::BWD,
    plan: |bytes, caps| {
        let entries = Entries { tiled: "global_attention_bwd_tiled_f32", wide: None };
        tiles::plan(bytes, caps, &entries)
    },
};

static BWD_DQ: Kernel = Kernel {
    name: "global_attention_bwd_dq_f32",
    bindings: backward_bindings!(("dq", WRITE, Stored)),
    cpu: cpu::dq,
    wgsl: BACKWARD,
    cuda: cuda::BWD_DQ,
    plan: |bytes, caps| {
        let entries = Entries {
            tiled: "global_attention_bwd_dq_tiled_f32",
            wide: Some("global_attention_bwd_dq_wide_f32"),
        };
        tiles::plan(bytes, caps, &entries)
    },
};

static BWD_DKV: Kernel = Kernel {
    name: "global_attention_bwd_dkv_f32",
    bindings: backward_bindings!(("dk", WRITE, Stored), ("dv", WRITE, Stored)),
    cpu: cpu::dkv,
    wgsl: BACKWARD,
    cuda: cuda::BWD_DKV,
    plan: |bytes, caps| {
        let entries = Entries {
            tiled: "global_attention_bwd_dkv_tiled_f32",
            wide: Some("global_attention_bwd_dkv_wide_f32"),
        };
        tiles::plan(bytes, caps, &entries)
    },
};

static BWD_TABLES: Kernel = Kernel {
    name: "global_attention_bwd_tables_f32",
    bindings: backward_bindings!(("partial", WRITE, F32)),
    cpu: cpu::tables,
    wgsl: BACKWARD,
    cuda: cuda::BWD_TABLES,
    plan: |bytes, _| {
        let p: GlobalAttentionParams = params(bytes);
        Plan::items(p.pieces as usize * p.layout().partial_rows(), 64)
    },
};

static BWD_TABLES_SUM: Kernel = Kernel {
    name: "global_attention_bwd_tables_sum_f32",
    bindings: &[("partial", READ, F32), ("dtables", WRITE, F32)],
    cpu: cpu::tables_sum,
    wgsl: BACKWARD,
    cuda: cuda::BWD_TABLES_SUM,
    plan: |bytes, _| Plan::items(params::<GlobalAttentionParams>(bytes).layout().offsets()[3], 64),
};

pub(super) static PASSES: Passes = Passes {
    op: OP,
    fwd: &FWD,
    bwd: &BWD,
    dq: &BWD_DQ,
    dkv: &BWD_DKV,
    tables: &BWD_TABLES,
    tables_sum: &BWD_TABLES_SUM,
    by_axis: true,
};

/// Attention of every place to every place of its map: `q`, `k`, `v` `[N, H, W, G, d]` with G heads -> `[N, H, W, G, d]`.
///
/// The formula stands at the top of this module. Gradients flow to q, k, v and to every table, deterministically.
///
/// # Errors
/// [`crate::Error::Shape`] where q, k and v differ, a table does not fit the map or is not f32, or a head in half precision is wider
/// than 128 in CUDA; [`crate::Error::Device`] when
/// memory runs out.
pub fn global_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: GlobalAttention<'_>,
) -> Result<Tensor> {
    let problem = options.problem(q, k, v)?;
    attend(&PASSES, [q, k, v], [options.rel_h, options.rel_w, options.bias], problem)
}

/// Pieces that a head's `units` (tiles of 64 queries of an image) are cut into for sums by axis: blocks enough for any GPU.
fn axis_pieces(units: usize, heads: usize) -> usize {
    const BLOCKS: usize = 512;
    units.div_ceil(units.div_ceil(BLOCKS.div_ceil(heads)))
}

impl GlobalAttention<'_> {
    /// The one place where shapes are checked.
    fn problem(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Problem<GlobalAttentionParams>> {
        let sizes = q.dims(OP, "q [N, H, W, heads, d]")?;
        let [_, h, w, _, d] = sizes;
        let tables = [self.rel_h, self.rel_w, self.bias];
        check(OP, [q, k, v], tables, &self.layout(sizes), &format!("a {h}x{w} map"))?;
        if d > MAX_HALF_WIDTH && on_tensor_cores(q) {
            let message = format!(
                "a head may have up to {MAX_HALF_WIDTH} channels in {} in CUDA, but q has {d}; take more heads, or f32",
                q.dtype().suffix()
            );
            return Err(Error::shape(OP, message));
        }
        Ok(self.problem_of(q, sizes))
    }

    /// The tables of q, k, v `[N, H, W, G, d]`.
    pub(super) fn layout(&self, [_, h, w, g, d]: [usize; 5]) -> TableLayout {
        let (rows, columns) = (2 * h - 1, 2 * w - 1);
        // A table of one row adds the same to all scores of a query: it changes nothing, and its gradient is zero.
        let has = [
            self.rel_h.is_some() && rows > 1,
            self.rel_w.is_some() && columns > 1,
            self.bias.is_some() && rows * columns > 1,
        ];
        TableLayout { rows, columns, heads: g, d, has }
    }

    /// The problem of q, k, v `[N, H, W, G, d]` that are stored as x is and on its device; the tables are known to fit.
    pub(super) fn problem_of(
        &self,
        x: &Tensor,
        sizes: [usize; 5],
    ) -> Problem<GlobalAttentionParams> {
        let [n, h, w, g, d] = sizes;
        let layout = TableLayout { d: padded(x, d), ..self.layout(sizes) };
        let by_axis = PASSES.by_axis(x, &layout);
        let pieces =
            if by_axis { axis_pieces(n * (h * w).div_ceil(64), g) } else { layout.pieces(n) };
        let part = part(n * h * w * g, layout.d);
        let params = GlobalAttentionParams {
            n: n as u32,
            h: h as u32,
            w: w as u32,
            g: g as u32,
            d: layout.d as u32,
            has_rel_h: layout.has[0] as u32,
            has_rel_w: layout.has[1] as u32,
            has_bias: layout.has[2] as u32,
            scale: self.scale.unwrap_or(1.0 / (d as f32).sqrt()),
            pieces: pieces as u32,
            part: part as u32,
            by_axis: by_axis as u32,
        };
        Problem { params, d, layout, pieces, part }
    }
}
