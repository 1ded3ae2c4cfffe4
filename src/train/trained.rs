//! A trained model behind a path: a run directory, one of its checkpoints, or a file of weights that says what it is of.

use std::path::Path;

use super::checkpoint::{self, State};
use super::score;
use crate::config::{Config, Precision};
use crate::data::Transform;
use crate::io::safetensors;
use crate::models::{Load, Model, Spec};
use crate::nn::StateDict;
use crate::{Device, Error, Result};

/// Weights, and all that is needed to use them on pictures.
#[derive(Debug, Clone)]
pub struct Trained {
    /// The model.
    pub spec: Spec,
    /// Names of the classes, in the order of the logits.
    pub classes: Vec<String>,
    /// Side in pixels that pictures are brought to.
    pub img_size: usize,
    /// Subtracted from the channels of pictures (values in 0..=1).
    pub mean: [f32; 3],
    /// Divides after that.
    pub std: [f32; 3],
    /// How activations were stored in training, where that is known.
    pub precision: Option<Precision>,
    /// The weights.
    pub weights: StateDict,
}

/// Writes into a state dict's metadata what [`Trained::open`] needs beside what [`Model::state`] writes there.
pub(super) fn describe(
    dict: &mut StateDict,
    classes: &[String],
    (mean, std): ([f32; 3], [f32; 3]),
) {
    let texts = [
        ("classes", serde_json::json!(classes)),
        ("mean", serde_json::json!(mean)),
        ("std", serde_json::json!(std)),
    ];
    dict.metadata.extend(texts.map(|(key, value)| (key.to_owned(), value.to_string())));
}

impl Trained {
    /// Opens what a user names: `RUN` (its best checkpoint), `RUN/best`, `RUN/last`, or a safetensors file of one of them or of
    /// `attn2d export`. A checkpoint with averaged weights gives these unless `raw` asks for those of the last step.
    ///
    /// Errors: `Usage` where there is no checkpoint; `File` for a file that does not say what it is of, or is damaged.
    pub fn open(given: &Path, raw: bool) -> Result<Self> {
        if given.is_file() {
            return Self::from_file(given);
        }
        let dir = score::find(given)?;
        let (state, config) = (State::load(&dir)?, Config::load(&dir.join(checkpoint::CONFIG))?);
        Ok(Self {
            spec: state.model.parse()?,
            classes: state.classes,
            img_size: config.data.img_size,
            mean: state.mean,
            std: state.std,
            precision: Some(config.train.precision),
            weights: safetensors::read(checkpoint::weights(&dir, raw)?)?,
        })
    }

    fn from_file(path: &Path) -> Result<Self> {
        let weights = safetensors::read(path)?;
        let get = |key: &str| {
            weights.metadata.get(key).map(String::as_str).ok_or_else(|| {
                Error::file(
                    path,
                    format!(
                        "its metadata has no '{key}': it is not a file of `attn2d export`; give a run or checkpoint directory, or \
                         start from it by `attn2d train --pretrained`"
                    ),
                )
            })
        };
        fn json<T: serde::de::DeserializeOwned>(path: &Path, key: &str, text: &str) -> Result<T> {
            serde_json::from_str(text)
                .map_err(|e| Error::file(path, format!("metadata '{key}' is {text}: {e}")))
        }
        let wrong = |key: &str, is: &str, expected: &str| {
            Error::file(path, format!("metadata '{key}' is {is}; expected {expected}"))
        };
        let (model, size) = (get("model")?, get("image_size")?);
        let spec = model
            .parse()
            .map_err(|e: Error| Error::file(path, format!("metadata 'model': {e}")))?;
        let side = size.split_once('x').filter(|(h, w)| h == w).and_then(|(h, _)| h.parse().ok());
        let img_size = side
            .filter(|side| (1..=4096).contains(side))
            .ok_or_else(|| wrong("image_size", size, "a square such as 64x64, up to 4096x4096"))?;
        let classes: Vec<String> = json(path, "classes", get("classes")?)?;
        let mean: [f32; 3] = json(path, "mean", get("mean")?)?;
        let std: [f32; 3] = json(path, "std", get("std")?)?;
        if classes.is_empty() {
            return Err(wrong("classes", "empty", "a name for each logit"));
        }
        if mean.iter().any(|x| !x.is_finite()) {
            return Err(wrong("mean", &format!("{mean:?}"), "finite numbers"));
        }
        if std.iter().any(|x| !x.is_finite() || *x <= 0.0) {
            return Err(wrong("std", &format!("{std:?}"), "numbers above 0"));
        }
        Ok(Self { spec, classes, img_size, mean, std, precision: None, weights })
    }

    /// The model with these weights.
    ///
    /// Errors: `File` where the weights do not fit; those of the device.
    pub fn build(&self, device: &Device) -> Result<Model> {
        let size = (self.img_size, self.img_size);
        let model = Model::build(&self.spec, self.classes.len(), size, device, 0)?;
        model.load(&self.weights, Load::Exact)?;
        Ok(model)
    }

    /// What is done to pictures, as validation did it in training.
    pub fn transform(&self) -> Transform {
        Transform { mean: self.mean, std: self.std, ..Transform::eval(self.img_size) }
    }

    /// Two lines for the screen: the model, where its weights are from and which of a checkpoint's they are.
    pub fn introduce(&self) -> String {
        let source = &self.weights.source;
        let averaged = if source.ends_with(checkpoint::EMA) {
            format!("\n{}", score::AVERAGED)
        } else {
            String::new()
        };
        format!("model     {} from {}{averaged}", self.spec, source.display())
    }

    /// Everything by torchvision's names, with the metadata that [`Trained::open`] reads: what `attn2d export` writes.
    ///
    /// Errors: as [`Trained::build`].
    pub fn export(&self) -> Result<StateDict> {
        let mut dict = self.build(&Device::cpu())?.state()?;
        describe(&mut dict, &self.classes, (self.mean, self.std));
        Ok(dict)
    }
}
