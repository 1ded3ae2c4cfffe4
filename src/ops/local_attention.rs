//! Local attention over a feature map: every place attends to the window around it, with optional position tables.
//!
//! With query (y, x), key (y', x') and offset (a, b) = (y' - y, x' - x) inside a window of kh x kw, for each image and
//! head g:
//!
//!   logit = scale * q.k + q.(rel_h[a] + rel_w[b]) + bias[g, a, b],   y = sum over keys of softmax(logit) * v.
//!
//! This is stand-alone self-attention (Ramachandran et al. 2019, arXiv 1906.05909) with the choices spelled out: the scale,
//! two tables that both span all channels of a head (concatenated halves are tables that are zero in the other half), and
//! what the window sees outside the map ([`Border`]). No window is ever copied out: memory beside inputs and outputs is one
//! log-sum-exp a query and head, in backward two numbers, whatever the window.

use super::attention::{
    Passes, Problem, TableLayout, attend, check, on_tensor_cores, padded, part,
};
use crate::cpu::local_attention as cpu;
use crate::error::{Error, Result};
use crate::kernel::{Access, F32, Kernel, Plan, Stored, params};
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

mod cuda;
mod spec;
pub(crate) use spec::SPEC;

const OP: &str = "local_attention";

/// The greatest height and width of a window.
pub const MAX_WINDOW: usize = 13;

/// What a window sees outside the map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Border {
    /// Nothing: places outside leave the softmax.
    #[default]
    Mask,
    /// Zeros: places outside stay in the softmax with k = v = 0, so their logit is the position term alone, as in the
    /// original stand-alone self-attention and everything built on zero-padded `unfold`.
    Zero,
}

/// Options of [`local_attention`].
#[derive(Clone, Copy, Debug)]
pub struct LocalAttention<'a> {
    /// Height and width of the window: odd, at most [`MAX_WINDOW`]; it may be larger than the map. (7, 7) by default.
    pub window: (usize, usize),
    /// What the window sees outside the map.
    pub border: Border,
    /// Factor of q.k; 1 / sqrt(d) by default. The position terms are not scaled.
    pub scale: Option<f32>,
    /// Learned row offsets `[kh, G*d]`: row i belongs to the offset i - (kh-1)/2, key row minus query row.
    pub rel_h: Option<&'a Tensor>,
    /// Learned column offsets `[kw, G*d]`.
    pub rel_w: Option<&'a Tensor>,
    /// A bias for each head and offset, `[G, kh, kw]`.
    pub bias: Option<&'a Tensor>,
}

impl Default for LocalAttention<'_> {
    fn default() -> Self {
        Self {
            window: (7, 7),
            border: Border::Mask,
            scale: None,
            rel_h: None,
            rel_w: None,
            bias: None,
        }
    }
}

/// The parameter block of every kernel here.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct LocalAttentionParams {
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
    /// Pieces of the batch's rows whose table gradients a GPU sums apart.
    pub pieces: u32,
    /// Elements from dq to dk, to dv, to the tables in the packed gradients.
    pub part: u32,
    /// Height of the window, odd.
    pub kh: u32,
    /// Width of the window, odd.
    pub kw: u32,
    /// 1 where places outside the map stay in the softmax with k = v = 0.
    pub zero_border: u32,
    /// 1 where the table pass sums by row of each table and by bias, 0 where it sums by offset.
    pub by_row: u32,
}

impl LocalAttentionParams {
    /// How the tables lie in their buffer.
    pub(crate) fn layout(&self) -> TableLayout {
        TableLayout {
            rows: self.kh as usize,
            columns: self.kw as usize,
            heads: self.g as usize,
            d: self.d as usize,
            has: [self.has_rel_h != 0, self.has_rel_w != 0, self.has_bias != 0],
        }
    }
}

const WGSL: &str = concat!(
    include_str!("../../shaders/attention_common.wgsl"),
    include_str!("../../shaders/local_attention.wgsl"),
    include_str!("../../shaders/local_attention_bwd.wgsl")
);
const READ: Access = Access::Read;
const WRITE: Access = Access::Write;

/// A thread for each token of each head.
fn plan_tokens(bytes: &[u8], _: &crate::Caps) -> Plan {
    let p: LocalAttentionParams = params(bytes);
    Plan::items((p.n * p.h * p.w * p.g) as usize, 64)
}

/// The first six bindings of every backward kernel, then what it writes.
macro_rules! backward_bindings {
    ($($output:expr),+) => {
        &[("q", READ, Stored), ("k", READ, Stored), ("v", READ, Stored), ("tables", READ, F32), ("dy", READ, Stored), ("stats", READ, F32), $($output),+]
    };
}

static FWD: Kernel = Kernel {
    name: "local_attention_fwd_f32",
    bindings: &[
        ("q", READ, Stored),
        ("k", READ, Stored),
        ("v", READ, Stored),
        ("tables", READ, F32),
        ("y", WRITE, Stored),
        ("lse", WRITE, F32),
    ],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: cuda::FWD,
    plan: plan_tokens,
};

/// dq, dk and dv in one launch; the CPU also fills in the tables' gradients.
static BWD: Kernel = Kernel {
    name: "local_attention_bwd_f32",
    bindings: backward_bindings!(("grads", WRITE, Stored)),
    cpu: cpu::bwd,
    wgsl: WGSL,
    cuda: cuda::BWD,
    plan: plan_tokens,
};

static BWD_DQ: Kernel = Kernel {
    name: "local_attention_bwd_dq_f32",
    bindings: backward_bindings!(("dq", WRITE, Stored)),
    cpu: cpu::dq,
    wgsl: WGSL,
    cuda: cuda::BWD_DQ,
    plan: plan_tokens,
};

static BWD_DKV: Kernel = Kernel {
    name: "local_attention_bwd_dkv_f32",
    bindings: backward_bindings!(("dk", WRITE, Stored), ("dv", WRITE, Stored)),
    cpu: cpu::dkv,
    wgsl: WGSL,
    cuda: cuda::BWD_DKV,
    plan: plan_tokens,
};

static BWD_TABLES: Kernel = Kernel {
    name: "local_attention_bwd_tables_f32",
    bindings: backward_bindings!(("partial", WRITE, F32)),
    cpu: cpu::tables,
    wgsl: WGSL,
    cuda: cuda::BWD_TABLES,
    plan: |bytes, _| {
        let p: LocalAttentionParams = params(bytes);
        Plan::items(p.pieces as usize * p.layout().partial_rows(), 64)
    },
};

static BWD_TABLES_SUM: Kernel = Kernel {
    name: "local_attention_bwd_tables_sum_f32",
    bindings: &[("partial", READ, F32), ("dtables", WRITE, F32)],
    cpu: cpu::tables_sum,
    wgsl: WGSL,
    cuda: cuda::BWD_TABLES_SUM,
    plan: |bytes, _| Plan::items(params::<LocalAttentionParams>(bytes).layout().offsets()[3], 64),
};

static PASSES: Passes = Passes {
    op: OP,
    fwd: &FWD,
    bwd: &BWD,
    dq: &BWD_DQ,
    dkv: &BWD_DKV,
    tables: &BWD_TABLES,
    tables_sum: &BWD_TABLES_SUM,
    by_axis: false,
};

/// Attention of every place to the window around it: `q`, `k`, `v` `[N, H, W, G, d]` with G heads -> `[N, H, W, G, d]`.
///
/// The formula stands at the top of this module. Gradients flow to q, k, v and to every table, deterministically: dk and dv
/// are gathered from the queries that see a key, nothing is added atomically.
///
/// # Errors
/// [`Error::Shape`] where q, k and v differ, the window is even, zero or larger than [`MAX_WINDOW`], a table does not fit
/// the window, q, k and v are not all of one float type, or a table is not f32; [`Error::Device`] when memory runs out.
pub fn local_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: LocalAttention<'_>,
) -> Result<Tensor> {
    let problem = options.problem(q, k, v)?;
    attend(&PASSES, [q, k, v], [options.rel_h, options.rel_w, options.bias], problem)
}

impl LocalAttention<'_> {
    /// The one place where shapes are checked.
    fn problem(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Problem<LocalAttentionParams>> {
        let [n, h, w, g, d] = q.dims(OP, "q [N, H, W, heads, d]")?;
        let (kh, kw) = self.window;
        if [kh, kw].iter().any(|k| k % 2 == 0 || *k > MAX_WINDOW) {
            let message = format!(
                "the window must be odd and at most {MAX_WINDOW} in height and width, but is {kh}x{kw}"
            );
            return Err(Error::shape(OP, message));
        }
        // Offsets that a window has more than one of: a masked window sees but one row of a map of one row. A table of one
        // offset adds the same to all scores of a query: it changes nothing, and its gradient is zero.
        let sees = |k: usize, side: usize| k > 1 && (side > 1 || self.border == Border::Zero);
        let (rows, columns) = (sees(kh, h), sees(kw, w));
        let has = [
            self.rel_h.is_some() && rows,
            self.rel_w.is_some() && columns,
            self.bias.is_some() && (rows || columns),
        ];
        let layout = TableLayout { rows: kh, columns: kw, heads: g, d, has };
        let tables = [self.rel_h, self.rel_w, self.bias];
        check(OP, [q, k, v], tables, &layout, &format!("a {kh}x{kw} window"))?;
        let layout = TableLayout { d: padded(q, d), ..layout };
        let part = part(q.numel() / d, layout.d);
        let mut params = LocalAttentionParams {
            n: n as u32,
            h: h as u32,
            w: w as u32,
            g: g as u32,
            d: layout.d as u32,
            has_rel_h: has[0] as u32,
            has_rel_w: has[1] as u32,
            has_bias: has[2] as u32,
            scale: self.scale.unwrap_or(1.0 / (d as f32).sqrt()),
            pieces: layout.pieces(n * h) as u32,
            part: part as u32,
            kh: kh as u32,
            kw: kw as u32,
            zero_border: (self.border == Border::Zero) as u32,
            by_row: 0,
        };
        if on_tensor_cores(q) {
            cuda::sum_by_row(&mut params);
        }
        Ok(Problem { params, d, layout, pieces: params.pieces as usize, part })
    }
}
