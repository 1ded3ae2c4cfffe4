//! Equal blocks of rows of one tensor: a layer that keeps the weights of q, k and v in one parameter takes them apart with it.
//!
//! The blocks are views where each starts at a multiple of [`ALIGN`] elements, else copies. Their gradients are put together by one
//! kernel, whatever the number of blocks.

use super::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use super::columns::HALF_WIDE;
use super::elementwise::{add, mul};
use crate::cpu::split_rows as cpu;
use crate::error::{Error, Result};
use crate::kernel::{
    Access, Cuda, CudaPlan, Kernel, Plan, Stored, cuda_text, params, require_float,
};
use crate::tape;
use crate::tensor::{ALIGN, Tensor};
use bytemuck::{Pod, Zeroable};

const OP: &str = "split_rows";
const WGSL: &str = include_str!("../../shaders/split_rows.wgsl");

/// Blocks that the backward takes: with its output it has the eight bindings that WebGPU allows.
const MAX_BLOCKS: usize = 7;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct SplitRowsParams {
    /// Elements of a block.
    pub(crate) block: u32,
    /// Forward: which block. Backward: how many.
    pub(crate) number: u32,
    /// Backward: a bit for each block that has a gradient; the others' is zero.
    pub(crate) given: u32,
}

fn block_len(bytes: &[u8]) -> usize {
    params::<SplitRowsParams>(bytes).block as usize
}

fn all_len(bytes: &[u8]) -> usize {
    block_len(bytes) * params::<SplitRowsParams>(bytes).number as usize
}

static FWD: Kernel = Kernel {
    name: "split_rows_fwd_f32",
    bindings: &[("w", Access::Read, Stored), ("block", Access::Write, Stored)],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("split_rows"),
        half: Some(|bytes, _| CudaPlan::items(block_len(bytes), HALF_WIDE, 256)),
        plan: |bytes, _| CudaPlan::items(block_len(bytes), 4, 256),
    }),
    plan: |bytes, _| Plan::items(block_len(bytes), 256),
};

static BWD: Kernel = Kernel {
    name: "split_rows_bwd_f32",
    bindings: &[
        ("d0", Access::Read, Stored),
        ("d1", Access::Read, Stored),
        ("d2", Access::Read, Stored),
        ("d3", Access::Read, Stored),
        ("d4", Access::Read, Stored),
        ("d5", Access::Read, Stored),
        ("d6", Access::Read, Stored),
        ("dw", Access::Write, Stored),
    ],
    cpu: cpu::bwd,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("split_rows"),
        half: Some(|bytes, _| CudaPlan::items(all_len(bytes), HALF_WIDE, 256)),
        plan: |bytes, _| CudaPlan::items(all_len(bytes), 4, 256),
    }),
    plan: |bytes, _| Plan::items(all_len(bytes), 256),
};

/// `w [k * R, ..]` as k blocks `[R, ..]`. The gradient is stored as the blocks' gradients are (f32 for weights, however w is stored).
///
/// # Errors
/// [`Error::Shape`] where k does not divide the rows or is more than 7, or w is u32.
pub fn split_rows(w: &Tensor, k: usize) -> Result<Vec<Tensor>> {
    require_float(OP, "w", w)?;
    let rows = w.shape().first().copied().unwrap_or(0);
    if k == 0 || k > MAX_BLOCKS || !rows.is_multiple_of(k) || rows == 0 {
        let message = format!(
            "w {:?} cannot be cut into {k} equal blocks of rows (1 to {MAX_BLOCKS}); its first axis must be a multiple of their number",
            w.shape()
        );
        return Err(Error::shape(OP, message));
    }
    let mut shape = w.shape().to_vec();
    shape[0] = rows / k;
    let block = w.numel() / k;
    let part = |i: usize| {
        if block.is_multiple_of(ALIGN) {
            return w.view(i * block, &shape);
        }
        let part = Tensor::uninit(w.device(), &shape, w.dtype())?;
        FWD.launch(
            &SplitRowsParams { block: block as u32, number: i as u32, given: 0 },
            &[w, &part],
        )?;
        Ok(part)
    };
    let parts = (0..k).map(part).collect::<Result<_>>()?;
    let all = w.shape().to_vec();
    Ok(tape::record_all(OP, &[w], parts, move |grads, _| Ok(vec![Some(join(&grads, &all)?)])))
}

/// The gradient of w, of the blocks' gradients.
fn join(grads: &[Option<Tensor>], shape: &[usize]) -> Result<Tensor> {
    let any = grads.iter().flatten().next();
    let any = any.ok_or_else(|| Error::Autograd(format!("{OP}: no block has a gradient")))?;
    let given = grads.iter().enumerate().map(|(i, g)| u32::from(g.is_some()) << i).sum();
    let p = SplitRowsParams { block: any.numel() as u32, number: grads.len() as u32, given };
    let dw = Tensor::uninit(any.device(), shape, any.dtype())?;
    let mut bindings: Vec<&Tensor> = grads.iter().map(|g| g.as_ref().unwrap_or(any)).collect();
    bindings.resize(MAX_BLOCKS, any);
    bindings.push(&dw);
    BWD.launch(&p, &bindings)?;
    Ok(dw)
}

/// The conformance op: `y = sum over i of block[i] * block[(i + 1) % k]`, so that the blocks can be told apart and each has a gradient.
fn run(attrs: &Attrs, t: &Tensors) -> Result<Tensors> {
    let k = attrs.usize("k", 3)?;
    let parts = split_rows(need(OP, t, "w")?, k)?;
    let mut y = mul(&parts[0], &parts[1 % k])?;
    for i in 1..k {
        y = add(&y, &mul(&parts[i], &parts[(i + 1) % k])?)?;
    }
    Ok(Tensors::from([("y".into(), y)]))
}

/// Conformance of [`split_rows`], by the sum that [`run`] makes of the blocks.
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[Port::new("w", Layout::Plain).stored()],
    outputs: &[Port::new("y", Layout::Plain).stored()],
    attrs: &["k"],
    cases: || {
        let case = |label, shape: &[usize]| Case::new(label).uniform("w", shape, -1.0, 1.0);
        vec![
            case("views", &[48, 8]),
            case("copies", &[9, 7]),
            case("a bias", &[12]),
            case("copies in packs", &[6, 3, 4]).attr("k", 2),
            case("one block", &[5, 3]).attr("k", 1),
            case("seven blocks", &[7, 65]).attr("k", 7),
            case("several workgroups", &[72, 33]).no_gradcheck(),
        ]
    },
    run,
    reference: |attrs, a: &Arrays| {
        let (w, k) = (need(OP, a, "w")?, attrs.usize("k", 3)?);
        let (block, mut shape) = (w.data.len() / k, w.shape.clone());
        shape[0] /= k;
        let mut y = Array::zeros(&shape);
        for (j, y) in y.data.iter_mut().enumerate() {
            *y = (0..k).map(|i| w.data[i * block + j] * w.data[(i + 1) % k * block + j]).sum();
        }
        Ok(Arrays::from([("y".into(), y)]))
    },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn blocks_are_views_and_an_unused_one_has_gradient_zero() {
        let device = Device::cpu();
        let data: Vec<f32> = (0..3 * ALIGN).map(|i| i as f32).collect();
        let w = Tensor::from_f32(&device, &[3, ALIGN], &data).unwrap().requires_grad();
        let before = device.launches();
        let parts = split_rows(&w, 3).unwrap();
        assert_eq!(device.launches(), before, "no kernel for views");
        assert_eq!(parts[1].to_f32().unwrap(), data[ALIGN..2 * ALIGN]);
        // Only the middle block goes into the loss, twice.
        let loss = add(&parts[1], &parts[1]).unwrap();
        let grads = loss.backward_with(&loss.full_like(1.5).unwrap()).unwrap();
        let want: Vec<f32> =
            (0..3 * ALIGN).map(|i| if i / ALIGN == 1 { 3.0 } else { 0.0 }).collect();
        assert_eq!(grads.get(&w).unwrap().to_f32().unwrap(), want);
    }

    #[test]
    fn rows_that_cannot_be_shared_are_refused() {
        let w = Tensor::zeros(&Device::cpu(), &[8, 2]).unwrap();
        for k in [0, 3, 8] {
            assert!(split_rows(&w, k).unwrap_err().to_string().contains("equal blocks"), "{k}");
        }
    }
}
