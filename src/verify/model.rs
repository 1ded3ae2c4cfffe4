//! Whole models in case files (op `model`): a state dict and a batch, and what PyTorch makes of them.

use super::case_file::CaseFile;
use super::compare::{Atol, Tolerance};
use super::trial::{Results, check_labels, guarded};
use crate::Device;
use crate::error::{Error, Result};
use crate::models::run_case;
use crate::ops::case::{Arrays, Attrs, Layout, Port};

/// A case of a whole model, everything in the file's layouts.
pub(super) struct ModelTrial {
    pub(super) label: String,
    attrs: Attrs,
    inputs: Arrays,
    state: Arrays,
    pub(super) expected: Results,
    pub(super) tolerance: Tolerance,
}

impl ModelTrial {
    pub(super) fn from_file(file: &CaseFile) -> Result<Self> {
        let wrong = |message: String| Error::file(&file.path, format!("model: {message}"));
        let take = |group: &str, known: &[&str]| -> Result<Arrays> {
            let arrays = file.group(group);
            match arrays.keys().find(|name| !known.contains(&name.as_str())) {
                Some(name) => Err(wrong(format!(
                    "unknown tensor '{group}.{name}'; a model case has {known:?}"
                ))),
                None => Ok(arrays),
            }
        };
        let inputs = take("in", &["image", "labels"])?;
        for name in ["image", "labels"] {
            let array =
                inputs.get(name).ok_or_else(|| wrong(format!("tensor 'in.{name}' is missing")))?;
            if name == "labels" {
                check_labels(&Port::new("labels", Layout::Labels), array).map_err(wrong)?;
            }
        }
        take("gout", &[])?;
        let outputs = take("out", &["logits", "loss", "step_losses"])?;
        let expected =
            Results { outputs, gradients: file.group("gin"), after: file.group("after") };
        if expected.outputs.is_empty() && expected.gradients.is_empty() && expected.after.is_empty()
        {
            let message = "nothing to check: the file has no 'out.', 'gin.' or 'after.' tensor";
            return Err(wrong(message.into()));
        }
        let tolerance = Tolerance {
            rtol: file.rtol.unwrap_or(Tolerance::MODEL.rtol),
            atol: file.atol.map_or(Tolerance::MODEL.atol, Atol::Fixed),
        };
        let (label, attrs, state) = (file.label(), file.attrs.clone(), file.group("state"));
        Ok(Self { label, attrs, inputs, state, expected, tolerance })
    }

    pub(super) fn run(&self, device: &Device) -> Result<Results> {
        guarded(device, |device| {
            let given = run_case(device, &self.attrs, &self.inputs, &self.state)?;
            device.check_guards()?;
            let (outputs, gradients) = (given.outputs, given.gradients);
            Ok(Results { outputs, gradients, after: given.after })
        })
    }
}
