//! The two halves of locally enhanced self-attention (LESA, Yang et al. 2021): its logits, and what its softmax makes of the values.
//!
//! L pixels of a map attend to each other, whatever their distance. Positions enter by the offset of the flattened pixels, one table for
//! queries, keys and values:
//!
//! ```text
//! qkv [N, L, G, 4 e]: of each head q (e numbers), k (e), v (2 e)          table [2 L - 1, 4 e]: rows for offsets, columns q, k, v
//! logits [N, L, L, 3 G]: for query i, key j, kind, head    q_i . k_j      q_i . table_q[i - j]      k_j . table_k[j - i]
//! A = softmax over j of the three kinds' sum               context [N, L, 2, 2 e G]: sum over j of A v_j, and of A table_v[i - j]
//! ```
//!
//! with `table_*[o]` short for row `o + L - 1`. A batch norm over the 3 G channels stands between the halves, so logits have to be in memory
//! (all other attention of this crate never stores a score): maps are small where this attention is used (14x14 and less), and more than
//! [`MAX_PIXELS`] are refused. Channels are last, so [`super::batch_norm()`] takes logits and context as they are. All is f32.

use super::reduce::sum_rows;
use crate::Caps;
use crate::cpu::lesa as cpu;
use crate::error::{Error, Result};
use crate::kernel::{Access, Cuda, CudaPlan, F32, Kernel, Plan, cuda_text, params, require_f32};
use crate::tape;
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

mod spec;

pub(crate) use spec::{CONTEXT, LOGITS};

const LOGITS_OP: &str = "lesa_logits";
const CONTEXT_OP: &str = "lesa_context";
const WGSL: &str =
    concat!(include_str!("../../shaders/group.wgsl"), include_str!("../../shaders/lesa.wgsl"));

/// Pixels of a map that logits are stored for.
pub const MAX_PIXELS: usize = 1024;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct LesaParams {
    pub(crate) images: u32,
    pub(crate) pixels: u32,
    pub(crate) heads: u32,
    /// Numbers of a query and of a key; a value has twice as many.
    pub(crate) size: u32,
}

impl LesaParams {
    fn sizes(bytes: &[u8]) -> [usize; 4] {
        let p: Self = params(bytes);
        [p.images, p.pixels, p.heads, p.size].map(|v| v as usize)
    }

    /// Query, key and head of every image.
    fn pairs(bytes: &[u8]) -> usize {
        let [n, l, g, _] = Self::sizes(bytes);
        n * l * l * g
    }

    fn queries(bytes: &[u8]) -> usize {
        let [n, l, g, _] = Self::sizes(bytes);
        n * l * g
    }

    /// Elements of the gradients of qkv and of every image's table.
    fn gradients(bytes: &[u8]) -> usize {
        let [n, l, g, e] = Self::sizes(bytes);
        n * (l * g + 2 * l - 1) * 4 * e
    }
}

const fn cuda(plan: fn(&[u8], &Caps) -> CudaPlan) -> Option<Cuda> {
    Some(Cuda { text: cuda_text!("lesa"), half: None, plan })
}

/// A warp a query of a head, with a number for each key in shared memory.
fn cuda_queries(bytes: &[u8], _: &Caps) -> CudaPlan {
    let queries = LesaParams::queries(bytes) as u32;
    CudaPlan::grid([queries, 1, 1], 32).shared(4 * params::<LesaParams>(bytes).pixels)
}

static LOGITS_FWD: Kernel = Kernel {
    name: "lesa_logits_fwd_f32",
    bindings: &[
        ("qkv", Access::Read, F32),
        ("table", Access::Read, F32),
        ("logits", Access::Write, F32),
    ],
    cpu: cpu::logits_fwd,
    wgsl: WGSL,
    cuda: cuda(|bytes, _| CudaPlan::items(LesaParams::pairs(bytes), 1, 256)),
    plan: |bytes, _| Plan::items(LesaParams::pairs(bytes), 256),
};

static LOGITS_BWD: Kernel = Kernel {
    name: "lesa_logits_bwd_f32",
    bindings: &[
        ("qkv", Access::Read, F32),
        ("table", Access::Read, F32),
        ("dlogits", Access::Read, F32),
        ("dqkv", Access::Write, F32),
        ("dtables", Access::Write, F32),
    ],
    cpu: cpu::logits_bwd,
    wgsl: WGSL,
    cuda: cuda(|bytes, _| CudaPlan::items(LesaParams::gradients(bytes), 1, 256)),
    plan: |bytes, _| Plan::items(LesaParams::gradients(bytes), 256),
};

static CONTEXT_FWD: Kernel = Kernel {
    name: "lesa_context_fwd_f32",
    bindings: &[
        ("qkv", Access::Read, F32),
        ("table", Access::Read, F32),
        ("logits", Access::Read, F32),
        ("weights", Access::Write, F32),
        ("y", Access::Write, F32),
    ],
    cpu: cpu::context_fwd,
    wgsl: WGSL,
    cuda: cuda(cuda_queries),
    plan: |bytes, _| Plan::items(LesaParams::queries(bytes), 1),
};

static CONTEXT_BWD: Kernel = Kernel {
    name: "lesa_context_bwd_f32",
    bindings: &[
        ("qkv", Access::Read, F32),
        ("table", Access::Read, F32),
        ("weights", Access::Read, F32),
        ("dy", Access::Read, F32),
        ("dlogits", Access::Write, F32),
    ],
    cpu: cpu::context_bwd,
    wgsl: WGSL,
    cuda: cuda(cuda_queries),
    plan: |bytes, _| Plan::items(LesaParams::queries(bytes), 1),
};

static CONTEXT_BWD_VALUES: Kernel = Kernel {
    name: "lesa_context_bwd_values_f32",
    bindings: &[
        ("weights", Access::Read, F32),
        ("dy", Access::Read, F32),
        ("dqkv", Access::Write, F32),
        ("dtables", Access::Write, F32),
    ],
    cpu: cpu::context_bwd_values,
    wgsl: WGSL,
    cuda: cuda(|bytes, _| CudaPlan::items(LesaParams::gradients(bytes), 1, 256)),
    plan: |bytes, _| Plan::items(LesaParams::gradients(bytes), 256),
};

/// The three kinds of logits of LESA: qkv `[N, L, G, 4 e]` and table `[2 L - 1, 4 e]` as this module lays them out, to
/// `[N, L, L, 3 G]`; channel `kind * G + head`, kinds `q.k`, `q.table_q`, `k.table_k`. Gradients for both.
///
/// # Errors
/// [`Error::Shape`] where shapes do not fit, a tensor is not f32 ([`super::cast()`] makes it so), or the map has more than
/// [`MAX_PIXELS`] pixels.
pub fn lesa_logits(qkv: &Tensor, table: &Tensor) -> Result<Tensor> {
    let p = check(LOGITS_OP, qkv, table)?;
    let [n, l, g] = [p.images, p.pixels, p.heads].map(|v| v as usize);
    let y = Tensor::empty(qkv.device(), &[n, l, l, 3 * g])?;
    LOGITS_FWD.launch(&p, &[qkv, table, &y])?;
    let saved = [qkv.detach(), table.detach()];
    Ok(tape::record(LOGITS_OP, &[qkv, table], y, move |dy, _| {
        let [qkv, table] = saved;
        let (dqkv, dtables) = (qkv.empty_like()?, tables(&p, &table)?);
        LOGITS_BWD.launch(&p, &[&qkv, &table, dy, &dqkv, &dtables])?;
        Ok(vec![Some(dqkv), Some(sum_rows(&dtables)?.reshape(table.shape())?)])
    }))
}

/// What the softmax of the (normalised) logits makes of the values and of their positions: logits `[N, L, L, 3 G]`, qkv and table as
/// for [`lesa_logits`], to `[N, L, 2, 2 e G]`: first `sum over j of A v_j`, then `sum over j of A table_v[i - j]`, of all heads side by
/// side. Gradients for all three.
///
/// # Errors
/// As [`lesa_logits`].
pub fn lesa_context(logits: &Tensor, qkv: &Tensor, table: &Tensor) -> Result<Tensor> {
    let p = check(CONTEXT_OP, qkv, table)?;
    require_f32(CONTEXT_OP, "logits", logits)?;
    let [n, l, g, e] = [p.images, p.pixels, p.heads, p.size].map(|v| v as usize);
    if logits.shape() != [n, l, l, 3 * g] {
        let (wanted, given) = ([n, l, l, 3 * g], logits.shape());
        let message = format!("logits must be {wanted:?} for this qkv, but they are {given:?}");
        return Err(Error::shape(CONTEXT_OP, message));
    }
    let weights = Tensor::empty(qkv.device(), &[n, g, l, l])?;
    let y = Tensor::empty(qkv.device(), &[n, l, 2, 2 * e * g])?;
    CONTEXT_FWD.launch(&p, &[qkv, table, logits, &weights, &y])?;
    let saved = [qkv.detach(), table.detach()];
    Ok(tape::record(CONTEXT_OP, &[logits, qkv, table], y, move |dy, needs| {
        let [qkv, table] = saved;
        let mut grads = vec![None, None, None];
        if needs[0] {
            let dlogits = Tensor::empty(dy.device(), &[n, l, l, 3 * g])?;
            CONTEXT_BWD.launch(&p, &[&qkv, &table, &weights, dy, &dlogits])?;
            grads[0] = Some(dlogits);
        }
        if needs[1] || needs[2] {
            let (dqkv, dtables) = (qkv.empty_like()?, tables(&p, &table)?);
            CONTEXT_BWD_VALUES.launch(&p, &[&weights, dy, &dqkv, &dtables])?;
            grads[1] = Some(dqkv);
            grads[2] = Some(sum_rows(&dtables)?.reshape(table.shape())?);
        }
        Ok(grads)
    }))
}

/// Room for a table's gradient of each image; they are summed in order.
fn tables(p: &LesaParams, table: &Tensor) -> Result<Tensor> {
    Tensor::empty(table.device(), &[p.images as usize, table.numel()])
}

fn check(op: &'static str, qkv: &Tensor, table: &Tensor) -> Result<LesaParams> {
    require_f32(op, "qkv", qkv)?;
    require_f32(op, "table", table)?;
    let [n, l, g, width] = qkv.dims(op, "qkv")?;
    if l > MAX_PIXELS {
        let message = format!(
            "a map of {l} pixels: the logits of at most {MAX_PIXELS} (32x32) are stored; use this attention in a later stage"
        );
        return Err(Error::shape(op, message));
    }
    if !width.is_multiple_of(4) || table.shape() != [2 * l - 1, width] {
        let message = format!(
            "qkv {:?} must end in a multiple of 4 (a quarter q, a quarter k, half v), and table {:?} must be {:?}",
            qkv.shape(),
            table.shape(),
            [2 * l - 1, width]
        );
        return Err(Error::shape(op, message));
    }
    let [images, pixels, heads, size] = [n, l, g, width / 4].map(|v| v as u32);
    Ok(LesaParams { images, pixels, heads, size })
}
