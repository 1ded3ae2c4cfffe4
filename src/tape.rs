//! Reverse-mode differentiation. An op computes its output, then hands it to [`record`] with the function that turns the
//! output's gradient into its inputs' gradients; [`Tensor::backward`] walks these functions from last to first.
//!
//! Tensor ids grow with time, so a node's inputs always have smaller ids than its output: the greatest pending id is
//! the next to visit, and no graph has to be sorted.

use crate::cpu;
use crate::error::{Error, Result};
use crate::kernel::{Access, Cuda, CudaPlan, Kernel, Plan, Stored, cuda_text, params};
use crate::tensor::{Id, Tensor};
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

type Backward = Box<dyn FnOnce(&Tensor, &[bool]) -> Result<Vec<Option<Tensor>>> + Send>;

/// How a tensor was computed.
pub(crate) struct Node {
    op: &'static str,
    inputs: Vec<Tensor>,
    /// Taken by the first backward, so that what it saved is freed as the walk goes on.
    backward: Mutex<Option<Backward>>,
    /// One of several outputs: its gradient is kept for the walk's visit to the one input, which stands for all of them.
    part: bool,
}

thread_local! {
    static RECORDING: Cell<bool> = const { Cell::new(true) };
}

/// Runs `f` without recording: nothing is saved for a backward (evaluation).
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    /// Restores the flag also when `f` panics.
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            RECORDING.set(self.0);
        }
    }
    let _restore = Restore(RECORDING.replace(false));
    f()
}

/// Whether an op on these inputs will be recorded; an op may skip what only its backward needs when it is not.
pub fn is_recording(inputs: &[&Tensor]) -> bool {
    RECORDING.get() && inputs.iter().any(|t| t.wants_grad())
}

/// Puts `output` on the tape. `backward(dy, needs)` returns one gradient per input, of the input's shape; it may leave
/// out those that `needs` says nobody wants. A wanted gradient that is missing is an error, never a silent cut.
pub fn record(
    op: &'static str,
    inputs: &[&Tensor],
    output: Tensor,
    backward: impl FnOnce(&Tensor, &[bool]) -> Result<Vec<Option<Tensor>>> + Send + 'static,
) -> Tensor {
    if !is_recording(inputs) {
        return output;
    }
    output.with_node(Arc::new(Node {
        op,
        inputs: inputs.iter().map(|t| (*t).clone()).collect(),
        backward: Mutex::new(Some(Box::new(backward))),
        part: false,
    }))
}

/// As [`record`], for an op with several outputs: `backward(dys, needs)` gets all their gradients together, `None` for an output that
/// nothing was made of.
pub fn record_all(
    op: &'static str,
    inputs: &[&Tensor],
    outputs: Vec<Tensor>,
    backward: impl FnOnce(Vec<Option<Tensor>>, &[bool]) -> Result<Vec<Option<Tensor>>> + Send + 'static,
) -> Vec<Tensor> {
    let Some(first) = outputs.first().filter(|_| is_recording(inputs)) else {
        return outputs;
    };
    let grads = Arc::new(Mutex::new(vec![None; outputs.len()]));
    let all = grads.clone();
    // Older than the outputs and newer than the inputs, so the walk comes to it when it has left the last output.
    let joint = record(op, inputs, first.detach(), move |_, needs| {
        backward(std::mem::take(&mut *all.lock().unwrap_or_else(PoisonError::into_inner)), needs)
    });
    let part = |(i, y): (usize, Tensor)| {
        let grads = grads.clone();
        let keep = move |dy: &Tensor, _: &[bool]| {
            grads.lock().unwrap_or_else(PoisonError::into_inner)[i] = Some(dy.detach());
            Ok(Vec::new())
        };
        y.with_node(Arc::new(Node {
            op,
            inputs: vec![joint.clone()],
            backward: Mutex::new(Some(Box::new(keep))),
            part: true,
        }))
    };
    outputs.into_iter().enumerate().map(part).collect()
}

/// The gradients of the leaves, after a backward.
#[derive(Default)]
pub struct Gradients(HashMap<Id, Tensor>);

impl Gradients {
    /// The gradient of a leaf made by [`Tensor::requires_grad`]; `None` where the loss does not depend on it.
    pub fn get(&self, leaf: &Tensor) -> Option<&Tensor> {
        self.0.get(&leaf.id())
    }
}

impl Tensor {
    /// Gradients of this one-element tensor with respect to every leaf that wants one. The tape is used up.
    ///
    /// # Errors
    /// [`Error::Autograd`] where the tensor has more than one element, depends on no leaf, or was walked before.
    pub fn backward(&self) -> Result<Gradients> {
        if self.numel() != 1 {
            return Err(Error::Autograd(format!(
                "backward() needs a scalar loss, but the shape is {:?}; use backward_with(&dy)",
                self.shape()
            )));
        }
        self.backward_with(&self.full_like(1.0)?)
    }

    /// Gradients of `sum(self * dy)` with respect to every leaf that wants one. The tape is used up.
    ///
    /// # Errors
    /// [`Error::Autograd`] as for [`Tensor::backward`], or where `dy` has another shape.
    pub fn backward_with(&self, dy: &Tensor) -> Result<Gradients> {
        if dy.shape() != self.shape() {
            let message =
                format!("the upstream gradient is {:?}, the output {:?}", dy.shape(), self.shape());
            return Err(Error::Autograd(message));
        }
        if !self.wants_grad() {
            return Err(Error::Autograd(
                "nothing to differentiate: no input called requires_grad(), or the op ran inside no_grad".into(),
            ));
        }
        let mut leaves = Gradients::default();
        let mut pending = BTreeMap::from([(self.id(), (self.clone(), dy.detach()))]);
        while let Some((id, (t, grad))) = pending.pop_last() {
            let Some(node) = t.node() else {
                leaves.0.insert(id, grad);
                continue;
            };
            if node.part {
                node.take()?(&grad, &[])?;
                let joint = &node.inputs[0];
                pending.entry(joint.id()).or_insert((joint.clone(), grad));
                continue;
            }
            for (input, grad) in node.inputs.iter().zip(node.step(&grad)?) {
                let Some(grad) = grad.filter(|_| input.wants_grad()) else { continue };
                let sum = match pending.remove(&input.id()) {
                    Some((_, earlier)) => add(&earlier, &grad)?,
                    None => grad.detach(),
                };
                pending.insert(input.id(), (input.clone(), sum));
            }
        }
        Ok(leaves)
    }
}

impl Node {
    fn take(&self) -> Result<Backward> {
        let backward = self.backward.lock().unwrap_or_else(PoisonError::into_inner).take();
        backward.ok_or_else(|| {
            Error::Autograd(format!(
                "{}: this part of the tape was used by an earlier backward",
                self.op
            ))
        })
    }

    fn step(&self, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let backward = self.take()?;
        let needs: Vec<bool> = self.inputs.iter().map(Tensor::wants_grad).collect();
        let grads = no_grad(|| backward(dy, &needs))?;
        for (i, (input, need)) in self.inputs.iter().zip(&needs).enumerate() {
            match grads.get(i) {
                Some(Some(g)) if g.shape() != input.shape() => {
                    return Err(Error::Autograd(format!(
                        "{}: gradient {i} is {:?}, its input {:?}",
                        self.op,
                        g.shape(),
                        input.shape()
                    )));
                }
                Some(Some(_)) => {}
                _ if *need => {
                    return Err(Error::Autograd(format!(
                        "{}: input {i} wants a gradient the op cannot give",
                        self.op
                    )));
                }
                _ => {}
            }
        }
        Ok(grads)
    }
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct AddParams {
    pub(crate) len: u32,
}

/// y = a + b, elementwise: also how gradients of a tensor that was used twice are summed.
pub(crate) static ADD: Kernel = Kernel {
    name: "add_fwd_f32",
    bindings: &[
        ("a", Access::Read, Stored),
        ("b", Access::Read, Stored),
        ("y", Access::Write, Stored),
    ],
    cpu: cpu::elementwise::add_fwd,
    wgsl: include_str!("../shaders/elementwise.wgsl"),
    cuda: Some(Cuda {
        text: cuda_text!("elementwise"),
        plan: |bytes, _| CudaPlan::items(params::<AddParams>(bytes).len as usize, 4, 256),
        half: Some(|bytes, _| CudaPlan::items(params::<AddParams>(bytes).len as usize, 8, 256)),
    }),
    plan: |bytes, _| Plan::items(params::<AddParams>(bytes).len as usize, 256),
};

/// `a + b` off the tape; shapes are equal.
pub(crate) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let y = a.empty_like()?;
    ADD.launch(&AddParams { len: a.numel() as u32 }, &[a, b, &y])?;
    Ok(y)
}
