//! A moving average of a model's weights, as timm's `ModelEmaV2`: it starts as a copy of the model, and after each optimiser step
//! (also one that overflow in f16 left out) every parameter and every running statistic moves by a share `1 - decay` of the way to the
//! model's. There is no warm-up of the decay. Counts of batches are the model's own.
//!
//! The averages lie in flat buffers beside the model's, so a step is one launch for the parameters and one for the statistics.

use crate::models::{Load, Model};
use crate::nn::{Parameters, StateDict};
use crate::ops::ema_step;
use crate::{Result, Tensor};

/// The average of a run.
pub(super) struct Ema {
    decay: f64,
    values: Tensor,
    /// `None` for a model without batch norms.
    statistics: Option<Tensor>,
}

fn copy(t: &Tensor) -> Result<Tensor> {
    let copy = t.empty_like()?;
    copy.copy_from(t)?;
    Ok(copy)
}

impl Ema {
    /// An average that starts where the model stands.
    pub(super) fn new(decay: f64, parameters: &Parameters) -> Result<Self> {
        let statistics = parameters.statistics().map(copy).transpose()?;
        Ok(Self { decay, values: copy(parameters.values())?, statistics })
    }

    /// After an optimiser step.
    pub(super) fn step(&self, parameters: &Parameters) -> Result<()> {
        ema_step(&self.values, parameters.values(), self.decay)?;
        if let (Some(average), Some(now)) = (&self.statistics, parameters.statistics()) {
            ema_step(average, now, self.decay)?;
        }
        Ok(())
    }

    /// Runs `f` while the model has the average for its weights; afterwards it has its own again, to the bit.
    pub(super) fn with<R>(
        &self,
        parameters: &Parameters,
        f: impl FnOnce() -> Result<R>,
    ) -> Result<R> {
        let own = Self::new(self.decay, parameters)?;
        self.put_into(parameters)?;
        let result = f();
        // What f says counts first.
        let restored = own.put_into(parameters);
        result.and_then(|value| restored.map(|()| value))
    }

    /// Everything of the model by name, with the average for its weights.
    pub(super) fn state(&self, model: &Model) -> Result<StateDict> {
        self.with(model.parameters(), || model.state())
    }

    /// Takes over what [`Ema::state`] gave. The model's own weights are lost: load them afterwards.
    pub(super) fn load(&mut self, model: &Model, dict: &StateDict) -> Result<()> {
        model.load(dict, Load::Exact)?;
        *self = Self::new(self.decay, model.parameters())?;
        Ok(())
    }

    fn put_into(&self, parameters: &Parameters) -> Result<()> {
        parameters.values().copy_from(&self.values)?;
        match (parameters.statistics(), &self.statistics) {
            (Some(now), Some(average)) => now.copy_from(average),
            _ => Ok(()),
        }
    }
}
