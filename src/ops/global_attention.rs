//! Global attention over a feature map: every place attends to every place, with optional 2D position tables.
//!
//! With query (y, x), key (y', x') and offset (a, b) = (y' - y, x' - x), for each image and head g:
//!
//!   logit = scale * q.k + q.(rel_h[a] + rel_w[b]) + bias[g, a, b],   y = sum over keys of softmax(logit) * v.
//!
//! The tables' rows start at the smallest offset: row a + H-1 of `rel_h`, row b + W-1 of `rel_w`. Flash style (Dao et al.
//! 2022, "FlashAttention"): scores live in tiles, forward keeps the output and the log-sum-exp, backward makes the scores
//! again. Memory beside inputs and outputs grows with H W C, never with (H W)^2.

use crate::cpu::global_attention as cpu;
use crate::error::{Error, Result};
use crate::kernel::{Access, Kernel, Plan, params, require_f32};
use crate::tape;
use crate::tensor::{ALIGN, Tensor};
use bytemuck::{Pod, Zeroable};

mod cuda;
mod spec;
pub(crate) use spec::SPEC;

const OP: &str = "global_attention";

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

/// The parameter block of every kernel here but `pad`.
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
    /// Pieces of the batch whose table gradients a GPU sums apart.
    pub pieces: u32,
    /// Elements from dq to dk, to dv, to the tables in the packed gradients.
    pub part: u32,
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

    /// Where `rel_h`, `rel_w` and `bias` start in the packed tables, and where these end. Absent ones take no place; starts
    /// are aligned so that each can be a tensor of its own.
    pub(crate) fn table_offsets(&self) -> [usize; 4] {
        let row = (self.g * self.d) as usize;
        let offsets = self.g as usize * self.offsets_h() * self.offsets_w();
        let sizes = [
            self.has_rel_h as usize * self.offsets_h() * row,
            self.has_rel_w as usize * self.offsets_w() * row,
            self.has_bias as usize * offsets,
        ];
        let [h, w, b] = sizes.map(|n| n.next_multiple_of(ALIGN));
        [0, h, h + w, h + w + b]
    }

    /// Whether there is any table.
    pub(crate) fn any_table(&self) -> bool {
        self.has_rel_h + self.has_rel_w + self.has_bias > 0
    }

    /// Numbers that the table pass sums up for each offset (a, b): dS * q, and dS for the bias.
    pub(crate) fn partial_width(&self) -> usize {
        let rel = self.has_rel_h + self.has_rel_w > 0;
        (if rel { self.d.next_multiple_of(4) as usize } else { 0 }) + 4 * self.has_bias as usize
    }

    /// Pairs (a, b) of all heads and pieces: the threads of the table pass.
    fn partial_rows(&self) -> usize {
        (self.pieces * self.g) as usize * self.offsets_h() * self.offsets_w()
    }
}

/// The parameter block of `pad`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct PadParams {
    /// Rows.
    pub rows: u32,
    /// Numbers in a row of the input.
    pub from: u32,
    /// Numbers in a row of the output.
    pub to: u32,
}

const WGSL: &str = concat!(
    include_str!("../../shaders/global_attention.wgsl"),
    include_str!("../../shaders/global_attention_bwd.wgsl")
);
const READ: Access = Access::Read;
const WRITE: Access = Access::Write;

/// A thread for each token of each head.
fn plan_tokens(bytes: &[u8], _: &crate::Caps) -> Plan {
    let p: GlobalAttentionParams = params(bytes);
    Plan::items(p.n as usize * p.tokens() * p.g as usize, 64)
}

/// The first six bindings of every backward kernel, then what it writes.
macro_rules! backward_bindings {
    ($($output:literal),+) => {
        &[("q", READ), ("k", READ), ("v", READ), ("tables", READ), ("dy", READ), ("stats", READ), $(($output, WRITE)),+]
    };
}

static FWD: Kernel = Kernel {
    name: "global_attention_fwd_f32",
    bindings: &[
        ("q", READ),
        ("k", READ),
        ("v", READ),
        ("tables", READ),
        ("y", WRITE),
        ("lse", WRITE),
    ],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: cuda::FWD,
    plan: plan_tokens,
};

static BWD_DELTA: Kernel = Kernel {
    name: "global_attention_bwd_delta_f32",
    bindings: &[("y", READ), ("dy", READ), ("lse", READ), ("stats", WRITE)],
    cpu: cpu::bwd_delta,
    wgsl: WGSL,
    cuda: cuda::BWD_DELTA,
    plan: plan_tokens,
};

/// dq, dk and dv in one launch; the CPU also fills in the tables' gradients.
static BWD: Kernel = Kernel {
    name: "global_attention_bwd_f32",
    bindings: backward_bindings!("grads"),
    cpu: cpu::bwd,
    wgsl: WGSL,
    cuda: cuda::BWD,
    plan: plan_tokens,
};

static BWD_DQ: Kernel = Kernel {
    name: "global_attention_bwd_dq_f32",
    bindings: backward_bindings!("dq"),
    cpu: cpu::dq,
    wgsl: WGSL,
    cuda: cuda::BWD_DQ,
    plan: plan_tokens,
};

static BWD_DKV: Kernel = Kernel {
    name: "global_attention_bwd_dkv_f32",
    bindings: backward_bindings!("dk", "dv"),
    cpu: cpu::dkv,
    wgsl: WGSL,
    cuda: cuda::BWD_DKV,
    plan: plan_tokens,
};

static BWD_TABLES: Kernel = Kernel {
    name: "global_attention_bwd_tables_f32",
    bindings: backward_bindings!("partial"),
    cpu: cpu::tables,
    wgsl: WGSL,
    cuda: cuda::BWD_TABLES,
    plan: |bytes, _| Plan::items(params::<GlobalAttentionParams>(bytes).partial_rows(), 64),
};

static BWD_TABLES_SUM: Kernel = Kernel {
    name: "global_attention_bwd_tables_sum_f32",
    bindings: &[("partial", READ), ("dtables", WRITE)],
    cpu: cpu::tables_sum,
    wgsl: WGSL,
    cuda: cuda::BWD_TABLES_SUM,
    plan: |bytes, _| Plan::items(params::<GlobalAttentionParams>(bytes).table_offsets()[3], 64),
};

static PAD: Kernel = Kernel {
    name: "global_attention_pad_f32",
    bindings: &[("x", READ), ("padded", WRITE)],
    cpu: cpu::pad,
    wgsl: WGSL,
    cuda: cuda::PAD,
    plan: |bytes, _| {
        let p: PadParams = params(bytes);
        Plan::items(p.rows as usize * p.to as usize, 64)
    },
};

/// Attention of every place to every place of its map: `q`, `k`, `v` `[N, H, W, G, d]` with G heads -> `[N, H, W, G, d]`.
///
/// The formula stands at the top of this module. Gradients flow to q, k, v and to every table, deterministically.
///
/// # Errors
/// [`Error::Shape`] where q, k and v differ, a table does not fit the map, or a tensor is not f32; [`Error::Device`] when
/// memory runs out.
pub fn global_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: GlobalAttention<'_>,
) -> Result<Tensor> {
    let p = options.check(q, k, v)?;
    let device = q.device();
    // Shaders read four numbers at a time; a head of another width is padded with zeros, which change no product.
    let run = match one_walk(q) {
        true => p,
        false => GlobalAttentionParams { d: p.d.next_multiple_of(4), ..p }.with_layout(),
    };
    let [pq, pk, pv] = [q, k, v].map(|x| repad(x, p.d, run.d));
    let (pq, pk, pv) = (pq?, pk?, pv?);
    let tables = options.pack(&p, &run, q)?;
    let y = Tensor::empty(device, pq.shape())?;
    let lse = Tensor::empty(device, &q.shape()[..4])?;
    FWD.launch(&run, &[&pq, &pk, &pv, &tables, &y, &lse])?;
    let out = repad(&y, run.d, p.d)?;
    let extra = [options.rel_h, options.rel_w, options.bias];
    let inputs: Vec<&Tensor> = [q, k, v].into_iter().chain(extra.into_iter().flatten()).collect();
    let shapes = extra.map(|table| table.map(|t| t.shape().to_vec()));
    let saved = Saved { q: pq, k: pk, v: pv, tables, y, lse };
    Ok(tape::record(OP, &inputs, out, move |dy, needs| {
        saved.backward(&p, &run, dy, needs, &shapes)
    }))
}

/// Whether the device has no workgroups and so walks over a head once for all gradients (the CPU).
fn one_walk(x: &Tensor) -> bool {
    x.device().caps().max_invocations == 1
}

/// `[.., from]` as `[.., to]`: rows cut, or filled with zeros.
fn repad(x: &Tensor, from: u32, to: u32) -> Result<Tensor> {
    if from == to {
        return Ok(x.detach());
    }
    let rows = x.numel() / from as usize;
    let mut shape = x.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = *last / from as usize * to as usize;
    }
    let out = Tensor::empty(x.device(), &shape)?;
    PAD.launch(&PadParams { rows: rows as u32, from, to }, &[x, &out])?;
    Ok(out)
}

impl GlobalAttentionParams {
    /// Fills in what follows from the rest: the layout of packed gradients and the pieces of the table pass.
    fn with_layout(self) -> Self {
        // Enough threads to fill a GPU, as long as the batch has images for them.
        const THREADS: usize = 32 * 1024;
        let offsets = self.g as usize * self.offsets_h() * self.offsets_w();
        let images = self.n.div_ceil((THREADS.div_ceil(offsets) as u32).min(self.n));
        let part = self.len().next_multiple_of(ALIGN) as u32;
        Self { pieces: self.n.div_ceil(images), part, ..self }
    }
}

impl GlobalAttention<'_> {
    /// The one place where shapes are checked.
    fn check(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<GlobalAttentionParams> {
        let [n, h, w, g, d] = q.dims(OP, "q [N, H, W, heads, d]")?;
        for (name, x) in [("k", k), ("v", v)] {
            if x.shape() != q.shape() {
                let message =
                    format!("{name} must have q's shape {:?}, but has {:?}", q.shape(), x.shape());
                return Err(Error::shape(OP, message));
            }
        }
        let (rows, columns) = (2 * h - 1, 2 * w - 1);
        let tables: [(&str, Option<&Tensor>, Vec<usize>); 3] = [
            ("rel_h [2H-1, heads*d]", self.rel_h, vec![rows, g * d]),
            ("rel_w [2W-1, heads*d]", self.rel_w, vec![columns, g * d]),
            ("bias [heads, 2H-1, 2W-1]", self.bias, vec![g, rows, columns]),
        ];
        for (name, x) in [("q", q), ("k", k), ("v", v)] {
            require_f32(OP, name, x)?;
        }
        for (name, table, expected) in &tables {
            let Some(table) = table else { continue };
            require_f32(OP, name, table)?;
            if table.shape() != expected {
                let message = format!(
                    "{name} must be {expected:?} for a {h}x{w} map with {g} heads of {d}, but is {:?}",
                    table.shape()
                );
                return Err(Error::shape(OP, message));
            }
        }
        let scale = self.scale.unwrap_or(1.0 / (d as f32).sqrt());
        let p = GlobalAttentionParams {
            n: n as u32,
            h: h as u32,
            w: w as u32,
            g: g as u32,
            d: d as u32,
            // A table of one row adds the same to all scores of a query: it changes nothing, and its gradient is zero.
            has_rel_h: (self.rel_h.is_some() && rows > 1) as u32,
            has_rel_w: (self.rel_w.is_some() && columns > 1) as u32,
            has_bias: (self.bias.is_some() && rows * columns > 1) as u32,
            scale,
            pieces: 1,
            part: 0,
        };
        Ok(p.with_layout())
    }

    /// The tables in one buffer (a kernel may bind only 8), each head's rows as wide as `run` wants them.
    fn pack(
        &self,
        p: &GlobalAttentionParams,
        run: &GlobalAttentionParams,
        q: &Tensor,
    ) -> Result<Tensor> {
        if !p.any_table() {
            return q.device().none();
        }
        let [h, w, b, end] = run.table_offsets();
        let packed = Tensor::empty(q.device(), &[end])?;
        for (has, at, table) in [(p.has_rel_h, h, self.rel_h), (p.has_rel_w, w, self.rel_w)] {
            if let Some(table) = table.filter(|_| has != 0) {
                packed.copy_range_from(at, &repad(table, p.d, run.d)?)?;
            }
        }
        if let Some(bias) = self.bias.filter(|_| p.has_bias != 0) {
            packed.copy_range_from(b, bias)?;
        }
        Ok(packed)
    }
}

/// What forward keeps for backward.
struct Saved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor,
    y: Tensor,
    lse: Tensor,
}

impl Saved {
    /// Gradients of q, k, v and the tables that are there, in this order.
    fn backward(
        &self,
        p: &GlobalAttentionParams,
        run: &GlobalAttentionParams,
        dy: &Tensor,
        needs: &[bool],
        shapes: &[Option<Vec<usize>>; 3],
    ) -> Result<Vec<Option<Tensor>>> {
        let dy = repad(dy, p.d, run.d)?;
        let mut shape = self.lse.shape().to_vec();
        shape.push(2);
        let stats = Tensor::empty(dy.device(), &shape)?;
        BWD_DELTA.launch(run, &[&self.y, &dy, &self.lse, &stats])?;
        let inputs = [&self.q, &self.k, &self.v, &self.tables, &dy, &stats];
        let tables = run.any_table() && needs.iter().skip(3).any(|n| *n);
        let (qkv, dtables) = if one_launch(run, &dy) {
            packed_gradients(run, inputs, tables)?
        } else {
            separate_gradients(run, inputs, tables)?
        };
        let mut grads: Vec<Option<Tensor>> = Vec::new();
        for x in &qkv {
            grads.push(Some(repad(x, run.d, p.d)?));
        }
        let [h, w, b, _] = run.table_offsets();
        let places = [(run.has_rel_h, h), (run.has_rel_w, w), (run.has_bias, b)];
        for ((has, at), shape) in places.into_iter().zip(shapes) {
            let Some(shape) = shape else { continue };
            grads.push(match &dtables {
                _ if has == 0 => Some(Tensor::zeros(dy.device(), shape)?),
                None => None,
                Some(t) if shape.len() == 3 => Some(t.view(at, shape)?),
                Some(t) => {
                    let grad = t.view(at, &[shape[0], (run.g * run.d) as usize])?;
                    Some(repad(&grad, run.d, p.d)?)
                }
            });
        }
        Ok(grads)
    }
}

/// Whether one launch writes all gradients: on the CPU, which has the scores of a tile once for all five products, and for
/// maps so small that a GPU's time is mostly the launches themselves.
fn one_launch(p: &GlobalAttentionParams, x: &Tensor) -> bool {
    let elements = 3 * p.part as usize + p.table_offsets()[3];
    let fits =
        elements <= i32::MAX as usize && 4 * elements as u64 <= x.device().caps().max_binding;
    fits && (one_walk(x) || p.tokens() <= 64)
}

type Gradients = ([Tensor; 3], Option<Tensor>);

/// dq, dk, dv (and on the CPU the tables' gradients) as parts of one buffer.
fn packed_gradients(
    p: &GlobalAttentionParams,
    inputs: [&Tensor; 6],
    tables: bool,
) -> Result<Gradients> {
    let (q, part, end) = (inputs[0], p.part as usize, p.table_offsets()[3]);
    let grads = Tensor::empty(q.device(), &[3 * part + end])?;
    let [a, b, c, d, e, f] = inputs;
    BWD.launch(p, &[a, b, c, d, e, f, &grads])?;
    let dtables = match (one_walk(q), tables) {
        (_, false) => None,
        (true, true) => Some(grads.view(3 * part, &[end])?),
        (false, true) => Some(table_gradients(p, inputs)?),
    };
    let view = |i: usize| grads.view(i * part, q.shape());
    Ok(([view(0)?, view(1)?, view(2)?], dtables))
}

/// dq by a thread for each query, dk and dv by a thread for each key.
fn separate_gradients(
    p: &GlobalAttentionParams,
    inputs: [&Tensor; 6],
    tables: bool,
) -> Result<Gradients> {
    let [q, k, v, t, dy, stats] = inputs;
    let like = || Tensor::empty(q.device(), q.shape());
    let (dq, dk, dv) = (like()?, like()?, like()?);
    BWD_DQ.launch(p, &[q, k, v, t, dy, stats, &dq])?;
    BWD_DKV.launch(p, &[q, k, v, t, dy, stats, &dk, &dv])?;
    let dtables = if tables { Some(table_gradients(p, inputs)?) } else { None };
    Ok(([dq, dk, dv], dtables))
}

/// The tables' gradients in their packed layout: sums for each offset (a, b) and piece of the batch, then sums of these.
fn table_gradients(p: &GlobalAttentionParams, inputs: [&Tensor; 6]) -> Result<Tensor> {
    let [q, k, v, t, dy, stats] = inputs;
    let partial = Tensor::empty(q.device(), &[p.partial_rows(), p.partial_width()])?;
    BWD_TABLES.launch(p, &[q, k, v, t, dy, stats, &partial])?;
    let dtables = Tensor::empty(q.device(), &[p.table_offsets()[3]])?;
    BWD_TABLES_SUM.launch(p, &[&partial, &dtables])?;
    Ok(dtables)
}
