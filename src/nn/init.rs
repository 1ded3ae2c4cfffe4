//! Random initialisation, the same on every device: drawn on the host from counter-based streams.

use crate::Device;
use crate::error::Result;
use crate::tensor::Tensor;
use crate::tensor::philox::Philox;
use rayon::prelude::*;

/// Makes the tensors of fresh modules. The `i`-th parameter that is asked for draws from the stream
/// `Philox { seed, step: 0, op: i }`.
pub struct Init {
    device: Device,
    seed: u64,
    next: u32,
    blank: bool,
}

impl Init {
    /// Parameters on `device`, drawn from `seed`.
    pub fn new(device: &Device, seed: u64) -> Self {
        Self { device: device.clone(), seed, next: 0, blank: false }
    }

    /// Parameters that have shapes and no memory, at no cost: to count and name them. A module made of them cannot compute.
    pub fn blank() -> Self {
        Self { blank: true, ..Self::new(&Device::shapes(), 0) }
    }

    /// Normal with mean 0.
    ///
    /// # Errors
    /// As [`Tensor::uninit`]; so for all of these.
    pub fn normal(&mut self, shape: &[usize], std: f32) -> Result<Tensor> {
        self.fill(shape, |stream, i| std * stream.normal(i))
    }

    /// Uniform in `-bound..bound`.
    ///
    /// # Errors
    /// As [`Init::normal`].
    pub fn uniform(&mut self, shape: &[usize], bound: f32) -> Result<Tensor> {
        self.fill(shape, |stream, i| bound * (2.0 * stream.uniform(i) - 1.0))
    }

    /// Equal elements.
    ///
    /// # Errors
    /// As [`Init::normal`].
    pub fn constant(&mut self, shape: &[usize], value: f32) -> Result<Tensor> {
        self.fill(shape, |_, _| value)
    }

    /// Elements that are not learned and not drawn.
    ///
    /// # Errors
    /// As [`Init::normal`].
    pub fn fixed(&mut self, shape: &[usize], data: &[f32]) -> Result<Tensor> {
        Tensor::from_f32(&self.device, shape, data)
    }

    fn fill(
        &mut self,
        shape: &[usize],
        element: impl Fn(&Philox, u64) -> f32 + Sync,
    ) -> Result<Tensor> {
        let stream = Philox { seed: self.seed, step: 0, op: self.next };
        self.next += 1;
        let t = Tensor::empty(&self.device, shape)?;
        if !self.blank {
            let indices = (0..t.numel()).into_par_iter().with_min_len(4096);
            t.write_f32(&indices.map(|i| element(&stream, i as u64)).collect::<Vec<_>>())?;
        }
        Ok(t)
    }
}
