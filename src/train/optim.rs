//! The optimiser of a run: its settings, its state on the device, and its state in a file.

use std::path::Path;

use crate::config::{self, OptimName};
use crate::io::safetensors;
use crate::nn::{Parameters, StateDict};
use crate::ops::{AdamW, Guide, Sgd, adamw_step, sgd_step};
use crate::{Error, Result, Tensor};

/// SGD with momentum or AdamW over all parameters of a model at once.
pub struct Optimizer {
    settings: config::Optim,
    /// Where weight decay applies, and 0 for frozen parameters; `None` where it applies to all.
    mask: Option<Tensor>,
    /// Named state tensors, laid out as the flat parameters: `momentum`, or `mean` and `square`.
    state: Vec<(&'static str, Tensor)>,
}

impl Optimizer {
    /// An optimiser that has made no step yet.
    pub fn new(settings: &config::Optim, parameters: &Parameters) -> Result<Self> {
        let names: &[&'static str] = match settings.name {
            OptimName::Sgd => &["momentum"],
            OptimName::Adamw => &["mean", "square"],
        };
        let values = parameters.values();
        let zeros =
            |name: &&'static str| Ok((*name, Tensor::zeros(values.device(), values.shape())?));
        let state = names.iter().map(zeros).collect::<Result<_>>()?;
        let mask = match settings.decay_norm_and_bias {
            true => parameters.trained_mask()?,
            false => Some(parameters.decay_mask().clone()),
        };
        Ok(Self { settings: settings.clone(), mask, state })
    }

    /// Changes the parameters by one step along their gathered gradients, as `control` ([`crate::ops::clip_grad_norm()`]) says where
    /// there is one; `step` counts from 1, without those that were left out.
    pub fn step(
        &self,
        parameters: &Parameters,
        control: Option<&Tensor>,
        lr: f64,
        step: u64,
    ) -> Result<()> {
        let (values, gradients) = (parameters.values(), parameters.gradients());
        let guide = Guide { mask: self.mask.as_ref(), control };
        let (lr, weight_decay) = (lr as f32, self.settings.weight_decay as f32);
        match self.settings.name {
            OptimName::Sgd => {
                let momentum = self.settings.momentum as f32;
                let opt = Sgd { lr, momentum, weight_decay, nesterov: self.settings.nesterov };
                sgd_step(values, gradients, &self.state[0].1, guide, opt)
            }
            OptimName::Adamw => {
                let [b1, b2] = self.settings.betas;
                let eps = self.settings.eps as f32;
                let opt = AdamW { lr, betas: (b1 as f32, b2 as f32), eps, weight_decay };
                let state = (&self.state[0].1, &self.state[1].1);
                adamw_step(values, gradients, state, guide, opt, step)
            }
        }
    }

    /// The state by name: `momentum.layer1.0.conv1.weight`, in the layout of files.
    pub fn save(&self, parameters: &Parameters) -> Result<StateDict> {
        let mut all = StateDict::default();
        for (kind, tensor) in &self.state {
            let named = parameters.export(tensor)?.arrays;
            all.arrays
                .extend(named.into_iter().map(|(name, array)| (format!("{kind}.{name}"), array)));
        }
        Ok(all)
    }

    /// Takes over the state in a file that [`Optimizer::save`] made for the same model.
    ///
    /// Errors: `File` where an array is missing or has another shape.
    pub fn load(&self, parameters: &Parameters, file: &Path) -> Result<()> {
        let all = safetensors::read(file)?;
        for (kind, tensor) in &self.state {
            let mut part = StateDict { source: file.to_path_buf(), ..StateDict::default() };
            let prefix = format!("{kind}.");
            let own = all.arrays.iter().filter_map(|(k, a)| Some((k.strip_prefix(&prefix)?, a)));
            part.arrays = own.map(|(name, array)| (name.to_owned(), array.clone())).collect();
            if part.arrays.is_empty() {
                let message = format!("holds no '{kind}': this is the state of another optimiser");
                return Err(Error::file(file, message));
            }
            parameters.import(tensor, &part)?;
        }
        Ok(())
    }
}
