//! What global and local attention have in common: how their position tables lie in one buffer, and the order of launches.

use super::attention_rows::{delta, repad};
use crate::error::{Error, Result};
use crate::kernel::{Kernel, require_f32, require_float, require_same};
use crate::tape;
use crate::tensor::{ALIGN, Tensor};
use bytemuck::Pod;

/// The position tables of an attention: `rel_h [rows, G*d]`, `rel_w [columns, G*d]`, `bias [G, rows, columns]`. A kernel
/// may bind only 8 buffers, so they lie in one, absent ones taking no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableLayout {
    /// Row offsets: 2H-1, or the height of the window.
    pub rows: usize,
    /// Column offsets.
    pub columns: usize,
    /// Heads.
    pub heads: usize,
    /// Channels of a head.
    pub d: usize,
    /// Whether there is `rel_h`, `rel_w`, `bias`.
    pub has: [bool; 3],
}

impl TableLayout {
    /// Where `rel_h`, `rel_w` and `bias` start, and where the last ends. Starts are aligned so that each can be a tensor of
    /// its own.
    pub(crate) fn offsets(&self) -> [usize; 4] {
        let sizes = [
            self.rows * self.heads * self.d,
            self.columns * self.heads * self.d,
            self.heads * self.rows * self.columns,
        ];
        let mut at = [0; 4];
        for i in 0..3 {
            at[i + 1] = at[i] + self.has[i] as usize * sizes[i].next_multiple_of(ALIGN);
        }
        at
    }

    /// Whether there is any table.
    pub(crate) fn any(&self) -> bool {
        self.has.contains(&true)
    }

    /// Numbers that a GPU's table pass sums up for each offset (a, b): dS * q, and dS for the bias.
    pub(crate) fn partial_width(&self) -> usize {
        let rel = self.has[0] || self.has[1];
        (if rel { self.d.next_multiple_of(4) } else { 0 }) + 4 * self.has[2] as usize
    }

    /// Offsets (a, b) of all heads: the threads of the table pass, for each piece of the batch.
    pub(crate) fn partial_rows(&self) -> usize {
        self.heads * self.rows * self.columns
    }

    /// Lines that a table pass by axis sums up for each head and piece of the work.
    pub(crate) fn axis_lines(&self) -> usize {
        self.has[0] as usize * self.rows + self.has[1] as usize * self.columns
    }

    /// Pieces that `units` of work are cut into, so that a table pass of one thread an offset and piece fills a GPU.
    pub(crate) fn pieces(&self, units: usize) -> usize {
        const THREADS: usize = 32 * 1024;
        let each = units.div_ceil(THREADS.div_ceil(self.partial_rows()).min(units));
        units.div_ceil(each)
    }

    /// Refuses tables that do not have the layout's shapes; `what` says what they must fit.
    pub(crate) fn check(
        &self,
        op: &'static str,
        what: &str,
        tables: [Option<&Tensor>; 3],
    ) -> Result<()> {
        let (g, d) = (self.heads, self.d);
        let expected = [
            ("rel_h", vec![self.rows, g * d]),
            ("rel_w", vec![self.columns, g * d]),
            ("bias", vec![g, self.rows, self.columns]),
        ];
        for ((name, shape), table) in expected.iter().zip(tables) {
            let Some(table) = table else { continue };
            require_f32(op, name, table)?;
            if table.shape() != shape {
                let message = format!(
                    "{name} must be {shape:?} for {what} with {g} heads of {d}, but is {:?}",
                    table.shape()
                );
                return Err(Error::shape(op, message));
            }
        }
        Ok(())
    }

    /// The tables in one buffer, each head's rows `self.d` wide where the tables' own are `d`.
    pub(crate) fn pack(
        &self,
        d: usize,
        q: &Tensor,
        tables: [Option<&Tensor>; 3],
    ) -> Result<Tensor> {
        if !self.any() {
            return q.device().none();
        }
        let at = self.offsets();
        let packed = Tensor::empty(q.device(), &[at[3]])?;
        for (i, table) in tables.into_iter().enumerate() {
            let Some(table) = table.filter(|_| self.has[i]) else { continue };
            match i {
                2 => packed.copy_range_from(at[i], table)?,
                _ => packed.copy_range_from(at[i], &repad(table, d, self.d)?)?,
            }
        }
        Ok(packed)
    }

    /// The gradients of the tables that were given, of their own shapes, out of the packed ones.
    pub(crate) fn unpack(
        &self,
        d: usize,
        q: &Tensor,
        packed: Option<&Tensor>,
        shapes: &[Option<Vec<usize>>; 3],
    ) -> Result<Vec<Option<Tensor>>> {
        let at = self.offsets();
        let mut grads = Vec::new();
        for (i, shape) in shapes.iter().enumerate() {
            let Some(shape) = shape else { continue };
            grads.push(match packed {
                _ if !self.has[i] => Some(Tensor::zeros(q.device(), shape)?),
                None => None,
                Some(t) if i == 2 => Some(t.view(at[i], shape)?),
                Some(t) => {
                    let grad = t.view(at[i], &[shape[0], self.heads * self.d])?;
                    Some(repad(&grad, self.d, d)?)
                }
            });
        }
        Ok(grads)
    }
}

/// The kernels of an attention. Bindings of `fwd`: q, k, v, tables, y, lse. The backward ones read q, k, v, tables, dy and
/// stats `[N, H, W, G, 2]` (log-sum-exp, rowsum(dy * y)).
pub(crate) struct Passes {
    /// Its name in errors and on the tape.
    pub op: &'static str,
    /// y and log-sum-exp.
    pub fwd: &'static Kernel,
    /// dq, dk and dv in one buffer; the CPU also fills in the tables' gradients.
    pub bwd: &'static Kernel,
    /// dq.
    pub dq: &'static Kernel,
    /// dk, dv.
    pub dkv: &'static Kernel,
    /// Sums for each piece of the batch, head and offset: `[pieces, G, rows, columns, partial_width]`.
    pub tables: &'static Kernel,
    /// These sums -> the packed tables' gradients.
    pub tables_sum: &'static Kernel,
    /// Whether CUDA in half precision sums by axis where there is no bias: `[pieces, G, rows + columns, d]`, the lines of
    /// absent tables left out.
    pub by_axis: bool,
}

impl Passes {
    /// Whether the tables' gradients of this problem are summed by axis.
    pub(crate) fn by_axis(&self, q: &Tensor, layout: &TableLayout) -> bool {
        self.by_axis && on_tensor_cores(q) && layout.any() && !layout.has[2]
    }
}

/// An attention to be run.
pub(crate) struct Problem<P> {
    /// The parameter block, for heads of `layout.d` channels.
    pub params: P,
    /// Channels of a head in the caller's tensors.
    pub d: usize,
    /// The packed tables.
    pub layout: TableLayout,
    /// Pieces of the table pass.
    pub pieces: usize,
    /// Elements from dq to dk, to dv, to the tables in the packed gradients.
    pub part: usize,
}

/// The width that a head of `d` channels has on the device of x: GPU kernels read 16 bytes at a time, and zeros change no
/// product.
pub(crate) fn padded(x: &Tensor, d: usize) -> usize {
    if one_walk(x) { d } else { d.next_multiple_of(16 / x.dtype().bytes()) }
}

/// Elements from one of q's gradients to the next in the packed gradients: `rows` tokens of heads of d numbers.
pub(crate) fn part(rows: usize, d: usize) -> usize {
    (rows * d).next_multiple_of(ALIGN)
}

/// Whether kernels for tensor cores take x: those of CUDA in half precision.
pub(crate) fn on_tensor_cores(x: &Tensor) -> bool {
    x.dtype().is_half() && x.device().name().starts_with("cuda")
}

/// Whether the device has no workgroups and so walks over a head once for all gradients (the CPU).
pub(crate) fn one_walk(x: &Tensor) -> bool {
    x.device().caps().max_invocations == 1
}

/// Refuses q, k and v that differ or are no floats, and tables that do not fit or are not f32.
pub(crate) fn check(
    op: &'static str,
    [q, k, v]: [&Tensor; 3],
    tables: [Option<&Tensor>; 3],
    layout: &TableLayout,
    what: &str,
) -> Result<()> {
    for (name, x) in [("k", k), ("v", v)] {
        if x.shape() != q.shape() {
            let message =
                format!("{name} must have q's shape {:?}, but has {:?}", q.shape(), x.shape());
            return Err(Error::shape(op, message));
        }
    }
    require_float(op, "q", q)?;
    require_same(op, ("q", q), "k", k)?;
    require_same(op, ("q", q), "v", v)?;
    layout.check(op, what, tables)
}

/// y of q, k, v `[N, H, W, G, d]` and the tables (`rel_h`, `rel_w`, `bias`), on the tape.
pub(crate) fn attend<P: Pod + Send>(
    passes: &'static Passes,
    qkv: [&Tensor; 3],
    tables: [Option<&Tensor>; 3],
    problem: Problem<P>,
) -> Result<Tensor> {
    let (d, layout) = (problem.d, problem.layout);
    let [q, k, v] = qkv.map(|x| repad(x, d, layout.d));
    let (q, k, v) = (q?, k?, v?);
    let packed = layout.pack(d, &q, tables)?;
    let y = q.empty_like()?;
    let lse = Tensor::empty(q.device(), &q.shape()[..4])?;
    passes.fwd.launch(&problem.params, &[&q, &k, &v, &packed, &y, &lse])?;
    let out = repad(&y, layout.d, d)?;
    let inputs: Vec<&Tensor> = qkv.into_iter().chain(tables.into_iter().flatten()).collect();
    let shapes = tables.map(|table| table.map(|t| t.shape().to_vec()));
    Ok(tape::record(passes.op, &inputs, out, move |dy, needs| {
        let dy = repad(dy, d, layout.d)?;
        let stats = delta(&y, &dy, &lse)?;
        let saved = [&q, &k, &v, &packed, &dy, &stats];
        let wants_tables = layout.any() && needs.iter().skip(3).any(|n| *n);
        let (qkv, dtables) = if one_launch(&problem, &q) {
            packed_gradients(passes, &problem, saved, wants_tables)?
        } else {
            separate_gradients(passes, &problem, saved, wants_tables)?
        };
        let mut grads: Vec<Option<Tensor>> = Vec::new();
        for x in &qkv {
            grads.push(Some(repad(x, layout.d, d)?));
        }
        grads.extend(layout.unpack(d, &q, dtables.as_ref(), &shapes)?);
        Ok(grads)
    }))
}

/// Whether one launch writes all gradients: on the CPU, which has a score at hand once for all five products (in f32: the
/// tables' gradients lie in the same buffer, and are never rounded), and for maps so small that a GPU's time is mostly the
/// launches themselves (software has no such times).
fn one_launch<P>(problem: &Problem<P>, q: &Tensor) -> bool {
    let small = q.shape()[1] * q.shape()[2] <= 64 && !q.device().caps().broadcasts();
    let worth = if one_walk(q) { !q.dtype().is_half() } else { small };
    packed_fits(problem, q) && worth
}

/// Whether the device of x can bind the buffer of [`packed`].
pub(crate) fn packed_fits<P>(problem: &Problem<P>, x: &Tensor) -> bool {
    let elements = packed_len(problem);
    let bytes = (x.dtype().bytes() * elements) as u64;
    elements <= i32::MAX as usize && bytes <= x.device().caps().max_binding
}

pub(crate) type Gradients = ([Tensor; 3], Option<Tensor>);

/// dq, dk, dv (and on the CPU the tables' gradients) as parts of one buffer.
pub(crate) fn packed_gradients<P: Pod>(
    passes: &Passes,
    problem: &Problem<P>,
    inputs: [&Tensor; 6],
    tables: bool,
) -> Result<Gradients> {
    let (q, part) = (inputs[0], problem.part);
    let grads = packed(passes, problem, inputs)?;
    let dtables = tables.then(|| packed_tables(passes, problem, inputs, &grads)).transpose()?;
    let view = |i: usize| grads.view(i * part, q.shape());
    Ok(([view(0)?, view(1)?, view(2)?], dtables))
}

/// The buffer of [`packed_gradients`]: dq, dk and dv `problem.part` elements apart.
pub(crate) fn packed<P: Pod>(
    passes: &Passes,
    problem: &Problem<P>,
    inputs: [&Tensor; 6],
) -> Result<Tensor> {
    let (q, elements) = (inputs[0], packed_len(problem));
    let grads = Tensor::uninit(q.device(), &[elements], q.dtype())?;
    let [a, b, c, d, e, f] = inputs;
    passes.bwd.launch(&problem.params, &[a, b, c, d, e, f, &grads])?;
    Ok(grads)
}

/// Elements of that buffer.
pub(crate) fn packed_len<P>(problem: &Problem<P>) -> usize {
    3 * problem.part + problem.layout.offsets()[3]
}

/// The tables' gradients beside the buffer of [`packed`], or out of it.
pub(crate) fn packed_tables<P: Pod>(
    passes: &Passes,
    problem: &Problem<P>,
    inputs: [&Tensor; 6],
    grads: &Tensor,
) -> Result<Tensor> {
    match one_walk(inputs[0]) {
        true => grads.view(3 * problem.part, &[problem.layout.offsets()[3]]),
        false => table_gradients(passes, problem, inputs),
    }
}

/// dq by a thread for each query, dk and dv by a thread for each key.
pub(crate) fn separate_gradients<P: Pod>(
    passes: &Passes,
    problem: &Problem<P>,
    inputs: [&Tensor; 6],
    tables: bool,
) -> Result<Gradients> {
    let [q, k, v, t, dy, stats] = inputs;
    let (dq, dk, dv) = (q.empty_like()?, q.empty_like()?, q.empty_like()?);
    passes.dq.launch(&problem.params, &[q, k, v, t, dy, stats, &dq])?;
    passes.dkv.launch(&problem.params, &[q, k, v, t, dy, stats, &dk, &dv])?;
    let dtables = if tables { Some(table_gradients(passes, problem, inputs)?) } else { None };
    Ok(([dq, dk, dv], dtables))
}

/// The tables' gradients in their packed layout: sums for each offset (a, b) and piece of the batch, then sums of these.
fn table_gradients<P: Pod>(
    passes: &Passes,
    problem: &Problem<P>,
    inputs: [&Tensor; 6],
) -> Result<Tensor> {
    let ([q, k, v, t, dy, stats], layout) = (inputs, problem.layout);
    let (rows, width) = if passes.by_axis(q, &layout) {
        (layout.heads * layout.axis_lines(), layout.d)
    } else {
        (layout.partial_rows(), layout.partial_width())
    };
    let partial = Tensor::empty(q.device(), &[problem.pieces * rows, width])?;
    passes.tables.launch(&problem.params, &[q, k, v, t, dy, stats, &partial])?;
    let dtables = Tensor::empty(q.device(), &[layout.offsets()[3]])?;
    passes.tables_sum.launch(&problem.params, &[&partial, &dtables])?;
    Ok(dtables)
}
