//! The fused attention block: 1x1 projections to q, k and v, attention of every place to every place, output projection and
//! residual, for the small maps of late CNN stages:
//!
//!   q = x Wq^T, k = x Wk^T, v = x Wv^T,   a = attention(q, k, v) as in [`super::global_attention()`],   y = a Wo^T + x.
//!
//! **Forward is two launches.** The first has a workgroup for each head of an image (of several, where maps have fewer than 32
//! places): it makes q, k and v of the head from x and attends at once, while they are in its cache. The second is the output
//! projection with the residual in its end. Written op by op these are five or six, and x is read by three of them.
//!
//! **Backward** is the projection's two gradients, rowsum(dy * a), attention's one launch (and two for tables), then
//! dx = dy + dq Wq + dk Wk + dv Wv in one launch and the three weight gradients in one, where op by op there are nine for the
//! gradients of x and three sums of them.
//!
//! A GPU does so for maps of up to 64 places (7x7, 8x8), the CPU for maps whose head fits a cache. Any other problem is handed
//! to the ops that the block is made of: the same function, with more launches.

use super::attention::{Problem, one_walk, packed, packed_fits, packed_tables};
use super::attention_rows::{delta, repad};
use super::conv2d::{self, Conv2dParams};
use super::global_attention::{GlobalAttentionParams, MAX_HALF_WIDTH, PASSES};
use super::reduce::sum_rows;
use super::{GlobalAttention, add, global_attention, linear};
use crate::cpu::attention_block as cpu;
use crate::error::{Error, Result};
use crate::kernel::{
    Access, F32, Kernel, MAX_GROUPS, Plan, Stored, params, require_float, require_same,
};
use crate::tape;
use crate::tensor::{ALIGN, Tensor};
use bytemuck::{Pod, Zeroable};

mod cuda;
mod spec;
pub(crate) use spec::SPEC;

const OP: &str = "attention_block";

/// Places of a map that one workgroup takes, and the side of a tile of every product here.
const TILE: usize = 64;

/// Numbers of q, of k and of v of a head that a CPU's cache should hold.
const CACHED: usize = 16 * 1024;

/// What an [`attention_block`] is made of. Weights may lie as `[rows, columns]` or as those of 1x1 convolutions,
/// `[rows, 1, 1, columns]`; D is the width of all heads together.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBlock<'a> {
    /// Heads; they divide D.
    pub heads: usize,
    /// Factor of q.k; 1 / sqrt(D / heads) by default. The position terms are not scaled.
    pub scale: Option<f32>,
    /// Weights of q, k and v, `[D, C]` each.
    pub qkv: [&'a Tensor; 3],
    /// Weight of the output projection, `[O, D]`; without it y is the attention's output and O is D.
    pub proj: Option<&'a Tensor>,
    /// Learned row offsets `[2H-1, D]`, as in [`GlobalAttention`].
    pub rel_h: Option<&'a Tensor>,
    /// Learned column offsets `[2W-1, D]`.
    pub rel_w: Option<&'a Tensor>,
    /// Whether x is added to the output; O is then C.
    pub residual: bool,
}

/// The parameter block of every kernel here.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct AttentionBlockParams {
    /// Of the attention between the projections, whose heads are as wide as the device wants them.
    pub attention: GlobalAttentionParams,
    /// Channels of x.
    pub c: u32,
    /// Channels of a head in the weights.
    pub width: u32,
    /// Channels of y.
    pub o: u32,
    /// 1 where x is added to y (backward: dy to dx).
    pub residual: u32,
    /// 1 where q, k and v are wanted afterwards; a GPU needs them in memory anyway.
    pub save: u32,
    /// Images that a workgroup takes: their places fit a tile.
    pub images: u32,
    /// Weight gradient: into how many parts the rows are cut.
    pub parts: u32,
    /// Elements from dWq to dWk, to dWv.
    pub weight: u32,
}

impl AttentionBlockParams {
    /// Places of all images.
    pub(crate) fn rows(&self) -> usize {
        self.attention.n as usize * self.attention.tokens()
    }

    /// Channels of all heads in the weights.
    pub(crate) fn depth(&self) -> usize {
        (self.attention.g * self.width) as usize
    }

    /// Channels of all heads in q, k and v.
    fn padded_depth(&self) -> usize {
        (self.attention.g * self.attention.d) as usize
    }
}

const WGSL: &str = include_str!("../../shaders/attention_block.wgsl");
const READ: Access = Access::Read;
const WRITE: Access = Access::Write;

/// Tiles of a product.
fn tiles(rows: usize, columns: usize) -> usize {
    rows.div_ceil(TILE) * columns.div_ceil(TILE)
}

/// x, weights, tables -> q, k, v (`attention.part` apart), the attention's output and log-sum-exp.
static FWD: Kernel = Kernel {
    name: "attention_block_fwd_f32",
    bindings: &[
        ("x", READ, Stored),
        ("wq", READ, Stored),
        ("wk", READ, Stored),
        ("wv", READ, Stored),
        ("tables", READ, F32),
        ("qkv", WRITE, Stored),
        ("attended", WRITE, Stored),
        ("lse", WRITE, F32),
    ],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: cuda::FWD,
    plan: |bytes, _| {
        let p: AttentionBlockParams = params(bytes);
        Plan::items((p.attention.n.div_ceil(p.images) * p.attention.g) as usize, 1)
    },
};

/// y = attended Wo^T (+ x).
static PROJ: Kernel = Kernel {
    name: "attention_block_proj_f32",
    bindings: &[
        ("attended", READ, Stored),
        ("wo", READ, Stored),
        ("x", READ, Stored),
        ("y", WRITE, Stored),
    ],
    cpu: cpu::proj,
    wgsl: WGSL,
    cuda: cuda::PROJ,
    plan: |bytes, _| {
        let p: AttentionBlockParams = params(bytes);
        Plan::items(tiles(p.rows(), p.o as usize), 1)
    },
};

/// dx = dq Wq + dk Wk + dv Wv (+ dy), of the packed gradients of q, k and v.
static DGRAD: Kernel = Kernel {
    name: "attention_block_dgrad_f32",
    bindings: &[
        ("grads", READ, Stored),
        ("wq", READ, Stored),
        ("wk", READ, Stored),
        ("wv", READ, Stored),
        ("dy", READ, Stored),
        ("dx", WRITE, Stored),
    ],
    cpu: cpu::dgrad,
    wgsl: WGSL,
    cuda: cuda::DGRAD,
    plan: |bytes, _| {
        let p: AttentionBlockParams = params(bytes);
        Plan::items(tiles(p.rows(), p.c as usize), 1)
    },
};

/// dWq, dWk and dWv `weight` apart, in `parts` sums over as many stretches of the rows.
static WGRAD: Kernel = Kernel {
    name: "attention_block_wgrad_f32",
    bindings: &[("x", READ, Stored), ("grads", READ, Stored), ("dw", WRITE, F32)],
    cpu: cpu::wgrad,
    wgsl: WGSL,
    cuda: cuda::WGRAD,
    plan: |bytes, _| {
        let p: AttentionBlockParams = params(bytes);
        let plan = Plan::items(tiles(p.padded_depth(), p.c as usize), 1);
        Plan { grid: [plan.grid[0], plan.grid[1], 3 * p.parts], ..plan }
    },
};

/// Rows and columns of a weight, with or without the two axes of a 1x1 kernel.
fn matrix(name: &str, w: &Tensor) -> Result<(usize, usize)> {
    match *w.shape() {
        [rows, columns] | [rows, 1, 1, columns] => Ok((rows, columns)),
        _ => Err(Error::shape(
            OP,
            format!("{name} must be [rows, columns] or [rows, 1, 1, columns], got {:?}", w.shape()),
        )),
    }
}

impl AttentionBlock<'_> {
    /// `[N, H, W, heads, d]` of q and the channels of y: the one place where shapes are checked.
    fn check(&self, x: &Tensor) -> Result<([usize; 5], usize)> {
        let fail = |message: String| Err(Error::shape(OP, message));
        let [n, h, w, c] = x.dims(OP, "x [N, H, W, C]")?;
        require_float(OP, "x", x)?;
        let (depth, _) = matrix("q_weight", self.qkv[0])?;
        for (name, weight) in ["q_weight", "k_weight", "v_weight"].iter().zip(self.qkv) {
            require_same(OP, ("x", x), name, weight)?;
            if matrix(name, weight)? != (depth, c) {
                return fail(format!(
                    "{name} must be [{depth}, {c}] as the {c} channels of x and the rows of q_weight say, got {:?}",
                    weight.shape()
                ));
            }
        }
        if self.heads == 0 || !depth.is_multiple_of(self.heads) {
            return fail(format!(
                "{} heads do not divide the {depth} rows of q_weight; choose a divisor",
                self.heads
            ));
        }
        let mut outputs = depth;
        if let Some(weight) = self.proj {
            require_same(OP, ("x", x), "proj_weight", weight)?;
            let (o, columns) = matrix("proj_weight", weight)?;
            if columns != depth {
                return fail(format!(
                    "proj_weight must have {depth} columns, one for each row of q_weight, got {:?}",
                    weight.shape()
                ));
            }
            outputs = o;
        }
        if self.residual && outputs != c {
            return fail(format!(
                "the residual needs as many channels out as in, but x has {c} and the output {outputs}"
            ));
        }
        let sizes = [n, h, w, self.heads, depth / self.heads];
        let tables = [self.rel_h, self.rel_w, None];
        self.positions().layout(sizes).check(OP, &format!("a {h}x{w} map"), tables)?;
        // What the projections' gradients are limited by.
        Conv2dParams::pointwise(n * h * w, c.max(depth), outputs, false)?;
        Ok((sizes, outputs))
    }

    fn positions(&self) -> GlobalAttention<'_> {
        GlobalAttention { scale: self.scale, rel_h: self.rel_h, rel_w: self.rel_w, bias: None }
    }

    /// The same op by op.
    fn composed(&self, x: &Tensor, sizes: [usize; 5], outputs: usize) -> Result<Tensor> {
        let [n, h, w, heads, d] = sizes;
        let depth = heads * d;
        let project = |x: &Tensor, weight: &Tensor, (o, i): (usize, usize)| {
            linear(x, &weight.reshape(&[o, i])?, None)
        };
        let c = x.shape()[3];
        let [q, k, v] = self.qkv.map(|weight| project(x, weight, (depth, c))?.reshape(&sizes));
        let y = global_attention(&q?, &k?, &v?, self.positions())?;
        let mut y = y.reshape(&[n, h, w, depth])?;
        if let Some(weight) = self.proj {
            y = project(&y, weight, (outputs, depth))?;
        }
        if self.residual { add(&y, x) } else { Ok(y) }
    }
}

/// Whether the kernels here are for this problem.
fn fused(x: &Tensor, problem: &Problem<GlobalAttentionParams>, outputs: usize) -> bool {
    let (tokens, depth) = (x.shape()[1] * x.shape()[2], problem.layout.heads * problem.d);
    let fits = packed_fits(problem, x);
    match (one_walk(x), x.dtype().is_half()) {
        // On the CPU half precision is for reference: op by op everything is rounded as on a GPU.
        (true, half) => fits && !half && tokens * problem.d <= CACHED,
        (false, false) => fits && tokens <= TILE,
        // Tensor cores are fed by copies of eight numbers.
        (false, true) => {
            let eights = [x.shape()[3], depth, outputs].iter().all(|n| n.is_multiple_of(8));
            fits && tokens <= TILE && eights && problem.layout.d <= MAX_HALF_WIDTH
        }
    }
}

/// Self-attention of a map with its projections: x `[N, H, W, C]` -> `[N, H, W, O]`.
///
/// The formula stands at the top of this module. Gradients flow to x, to every weight and to the tables, deterministically. x and the
/// weights may be stored in half precision (all alike); tables are f32, as are all gradients of weights and tables.
///
/// # Errors
/// [`Error::Shape`] where weights, tables and x do not go together or differ in storage; [`Error::Device`] when memory runs out.
pub fn attention_block(x: &Tensor, block: AttentionBlock<'_>) -> Result<Tensor> {
    let (sizes, outputs) = block.check(x)?;
    let problem = block.positions().problem_of(x, sizes);
    if !fused(x, &problem, outputs) {
        return block.composed(x, sizes, outputs);
    }
    let [n, h, w, heads, d] = sizes;
    let tables = [block.rel_h, block.rel_w, None];
    let mut inputs = vec![x];
    inputs.extend(block.qkv);
    inputs.extend(block.proj);
    inputs.extend(tables.into_iter().flatten());
    let recording = tape::is_recording(&inputs);
    let p = params_of(x, &problem, [d, outputs], block.residual, recording);
    let packed_tables = problem.layout.pack(d, x, tables)?;
    let qkv = match recording || !one_walk(x) {
        true => Tensor::uninit(x.device(), &[3 * problem.part], x.dtype())?,
        false => x.device().none()?,
    };
    let attended = Tensor::uninit(x.device(), &[n, h, w, heads, problem.layout.d], x.dtype())?;
    let lse = Tensor::empty(x.device(), &[n, h, w, heads])?;
    let [wq, wk, wv] = block.qkv;
    FWD.launch(&p, &[x, wq, wk, wv, &packed_tables, &qkv, &attended, &lse])?;
    let rows = repad(&attended, problem.layout.d, d)?;
    let y = match block.proj {
        Some(weight) => {
            let y = Tensor::uninit(x.device(), &[n, h, w, outputs], x.dtype())?;
            PROJ.launch(&p, &[&rows, weight, x, &y])?;
            y
        }
        None if block.residual => tape::add(&rows.reshape(&[n, h, w, outputs])?, &x.detach())?,
        None => rows.reshape(&[n, h, w, outputs])?,
    };
    let saved = Saved {
        x: x.detach(),
        weights: block.qkv.map(Tensor::detach),
        proj: block.proj.map(Tensor::detach),
        shapes: tables.map(|t| t.map(|t| t.shape().to_vec())),
        tables: packed_tables,
        qkv,
        attended,
        rows,
        lse,
        problem,
        p,
    };
    Ok(tape::record(OP, &inputs, y, move |dy, needs| saved.backward(dy, needs)))
}

fn params_of(
    x: &Tensor,
    problem: &Problem<GlobalAttentionParams>,
    [width, outputs]: [usize; 2],
    residual: bool,
    save: bool,
) -> AttentionBlockParams {
    let (attention, c) = (problem.params, x.shape()[3]);
    let weight = (attention.g as usize * width * c).next_multiple_of(ALIGN);
    let p = AttentionBlockParams {
        attention,
        c: c as u32,
        width: width as u32,
        o: outputs as u32,
        residual: residual as u32,
        save: save as u32,
        images: (TILE / attention.tokens()).clamp(1, attention.n as usize) as u32,
        parts: 1,
        weight: weight as u32,
    };
    AttentionBlockParams { parts: weight_parts(x, &p), ..p }
}

/// Into how many parts a GPU cuts the rows of the weight gradients: enough to fill it, few enough that one launch adds them up.
fn weight_parts(x: &Tensor, p: &AttentionBlockParams) -> u32 {
    const WORKGROUPS: usize = 256;
    const MOST: usize = 8;
    // Beyond this many columns the sum's grid would not fit.
    if one_walk(x) || 3 * p.weight / 64 > MAX_GROUPS {
        return 1;
    }
    let tiles = 3 * tiles(p.padded_depth(), p.c as usize);
    (WORKGROUPS / tiles).clamp(1, MOST.min(p.rows().div_ceil(TILE))) as u32
}

/// What a backward needs.
struct Saved {
    x: Tensor,
    weights: [Tensor; 3],
    proj: Option<Tensor>,
    tables: Tensor,
    shapes: [Option<Vec<usize>>; 3],
    /// q, k and v, `problem.part` apart.
    qkv: Tensor,
    /// The attention's output as the device has it, and with heads as wide as in the weights.
    attended: Tensor,
    rows: Tensor,
    lse: Tensor,
    problem: Problem<GlobalAttentionParams>,
    p: AttentionBlockParams,
}

impl Saved {
    /// Gradients in the order of the inputs: x, the weights of q, k and v, the projection's where there is one, tables.
    fn backward(self, dy: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let with_proj = self.proj.is_some() as usize;
        let wants_tables = needs[4 + with_proj..].contains(&true);
        let wants_weights = needs[1..4].contains(&true);
        let inner = needs[0] || wants_weights || wants_tables;
        let (upstream, proj) = match &self.proj {
            Some(weight) => {
                let conv = Conv2dParams::pointwise(
                    self.p.rows(),
                    self.p.depth(),
                    self.p.o as usize,
                    false,
                )?;
                let wanted = [inner, needs[4]];
                let [da, dw] = conv2d::gradients(conv, (&self.rows, weight), dy, wanted)?;
                (da, vec![dw])
            }
            None => (Some(dy.reshape(self.rows.shape())?), vec![]),
        };
        let mut grads = match upstream.filter(|_| inner) {
            Some(upstream) => self.inner(&upstream, dy, needs[0], wants_weights, wants_tables)?,
            None => vec![None; 4 + self.shapes.iter().flatten().count()],
        };
        grads.splice(4..4, proj);
        Ok(grads)
    }

    /// Gradients of x, of the weights of q, k and v and of the tables, `upstream` being the attention's.
    fn inner(
        &self,
        upstream: &Tensor,
        dy: &Tensor,
        wants_x: bool,
        wants_weights: bool,
        wants_tables: bool,
    ) -> Result<Vec<Option<Tensor>>> {
        let problem = &self.problem;
        let upstream = repad(upstream, problem.d, problem.layout.d)?;
        let stats = delta(&self.attended, &upstream, &self.lse)?;
        let part = |i: usize| self.qkv.view(i * problem.part, self.attended.shape());
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let inputs = [&q, &k, &v, &self.tables, &upstream, &stats];
        let grads = packed(&PASSES, problem, inputs)?;
        let dtables = if wants_tables && problem.layout.any() {
            Some(packed_tables(&PASSES, problem, inputs, &grads)?)
        } else {
            None
        };
        let mut out = vec![None];
        if wants_x {
            let dx = self.x.empty_like()?;
            let [wq, wk, wv] = &self.weights;
            // Something has to be bound where no residual is.
            let residual = if self.p.residual == 1 { dy } else { &self.x };
            DGRAD.launch(&self.p, &[&grads, wq, wk, wv, residual, &dx])?;
            out[0] = Some(dx);
        }
        out.extend(if wants_weights { self.weight_gradients(&grads)? } else { vec![None; 3] });
        out.extend(problem.layout.unpack(problem.d, &self.x, dtables.as_ref(), &self.shapes)?);
        Ok(out)
    }

    fn weight_gradients(&self, grads: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let (parts, weight) = (self.p.parts as usize, self.p.weight as usize);
        let sums = Tensor::empty(self.x.device(), &[parts, 3 * weight])?;
        WGRAD.launch(&self.p, &[&self.x, grads, &sums])?;
        let dw = if parts == 1 { sums } else { sum_rows(&sums)? };
        let views = self.weights.iter().enumerate();
        views.map(|(i, w)| dw.view(i * weight, w.shape()).map(Some)).collect()
    }
}
