//! Freezing parts of a model by patterns of parameter names, for fine-tuning.

use super::Model;
use crate::error::{Error, Result};

/// What stands for every parameter but the classifier's.
const BACKBONE: &str = "backbone";

/// Names of classifiers, in torchvision's and timm's models.
const HEADS: [&str; 4] = ["fc", "classifier", "heads", "head"];

/// Whether this is a parameter of a classifier.
pub(super) fn is_head(name: &str) -> bool {
    HEADS.iter().any(|head| name.strip_prefix(head).is_some_and(|rest| rest.starts_with('.')))
}

impl Model {
    /// Freezes every parameter that one of the patterns fits ([`crate::nn::Parameters::freeze`] says what that means) and tells how
    /// many they are. A pattern fits a parameter by its whole name or by that of a part it belongs to: `layer1`, `layer1.*` and
    /// `layer1.0.conv1.weight` are patterns; `*` stands for any characters, `?` for one, and `backbone` for all but the classifier.
    ///
    /// # Errors
    /// [`Error::Usage`] for a pattern that fits nothing, naming those that come near, and where nothing is left to train.
    pub fn freeze(&mut self, patterns: &[String]) -> Result<usize> {
        let names: Vec<String> = self.parameters.parameter_names().map(str::to_owned).collect();
        for pattern in patterns {
            if !names.iter().any(|name| fits(pattern, name)) {
                return Err(Error::usage(self.no_such(pattern, &names)));
            }
        }
        let frozen = |name: &str| patterns.iter().any(|pattern| fits(pattern, name));
        let Self { net, parameters, .. } = self;
        parameters.freeze(&mut **net, frozen)?;
        Ok(names.iter().filter(|name| frozen(name)).count())
    }

    fn no_such(&self, pattern: &str, names: &[String]) -> String {
        // Parts and whole names, each once: layer1, layer1.0, layer1.0.conv1, layer1.0.conv1.weight.
        let mut known: Vec<&str> = vec![BACKBONE];
        for name in names {
            known.extend(parts(name));
        }
        known.sort_unstable();
        known.dedup();
        let bare = pattern.trim_end_matches(['*', '.']);
        let likeness = |name: &str| strsim::normalized_damerau_levenshtein(bare, name);
        known.sort_by(|a, b| likeness(b).total_cmp(&likeness(a)));
        format!(
            "freeze '{pattern}': model '{}' has no such parameter; names that come near: {}",
            self.spec,
            known[..known.len().min(3)].join(", ")
        )
    }
}

/// `layer1`, `layer1.0`, .. up to the whole name.
fn parts(name: &str) -> impl Iterator<Item = &str> {
    let ends = name.match_indices('.').map(|(at, _)| at).chain([name.len()]);
    ends.map(move |end| &name[..end])
}

fn fits(pattern: &str, name: &str) -> bool {
    if pattern == BACKBONE {
        return !is_head(name);
    }
    parts(name).any(|part| glob(pattern.as_bytes(), part.as_bytes()))
}

/// Whether a text is as a pattern with `*` and `?` says.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|skipped| glob(rest, &text[skipped..])),
        Some((b'?', rest)) => !text.is_empty() && glob(rest, &text[1..]),
        Some((c, rest)) => text.first() == Some(c) && glob(rest, &text[1..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Mode;
    use crate::ops::{CrossEntropy, class_labels, cross_entropy};
    use crate::{Device, Tensor};

    #[test]
    fn patterns_fit_names_and_parts() {
        for (pattern, name, expected) in [
            ("layer1", "layer1.0.conv1.weight", true),
            ("layer1.*", "layer1.0.conv1.weight", true),
            ("layer1", "layer10.0.conv1.weight", false),
            ("layer?.0", "layer3.0.bn1.bias", true),
            ("*.bn?.*", "layer3.0.bn1.bias", true),
            ("*.attn", "layer4.1.attn.q.weight", true),
            ("conv1", "layer1.0.conv1.weight", false),
            ("backbone", "layer1.0.conv1.weight", true),
            ("backbone", "fc.weight", false),
            ("backbone", "heads.head.weight", false),
            ("backbone", "fcx.weight", true),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} on {name}");
        }
    }

    fn model() -> Model {
        let spec = "resnet18:w8,stages=2,stem=small".parse().unwrap();
        Model::build(&spec, 3, (16, 16), &Device::cpu(), 1).unwrap()
    }

    #[test]
    fn a_pattern_that_fits_nothing_names_what_comes_near() {
        let message = model().freeze(&["layer11.*".into()]).unwrap_err().to_string();
        assert!(message.contains("freeze 'layer11.*'") && message.contains("layer1,"), "{message}");
        let message = model().freeze(&["backbone".into(), "fc".into()]).unwrap_err().to_string();
        assert!(message.contains("nothing is left to train"), "{message}");
    }

    /// Gradients of what is not frozen are those of a whole backward whose frozen norms are in evaluation mode, with fewer launches;
    /// running statistics of frozen norms stay.
    #[test]
    fn a_frozen_backbone_takes_no_backward() {
        let backward = |model: &Model| {
            let device = model.parameters().values().device();
            let x = Tensor::full(device, &[2, 16, 16, 3], 0.5).unwrap();
            let labels = class_labels(device, &[0, 2], 3).unwrap();
            let before = model.parameters().state().unwrap();
            let logits = model.forward(&x, &Mode::train(0, 1)).unwrap();
            let loss = cross_entropy(&logits, &labels, None, CrossEntropy::default()).unwrap();
            let launched = device.launches();
            model.parameters().gather(&loss.backward().unwrap()).unwrap();
            (before, model.parameters().state().unwrap(), device.launches() - launched)
        };
        let (_, _, whole) = backward(&model());
        let mut frozen = model();
        assert_eq!(frozen.freeze(&["backbone".into()]).unwrap(), 30);
        let (before, after, launched) = backward(&frozen);
        assert_eq!(before, after, "no statistics move");
        assert!(5 * launched < whole, "{launched} launches for {whole}");
        let named = frozen.parameters().export(frozen.parameters().gradients()).unwrap();
        for (name, array) in &named.arrays {
            let zero = array.to_f32().iter().all(|g| *g == 0.0);
            assert_eq!(zero, !name.starts_with("fc."), "{name}");
        }
        let mut part = model();
        part.freeze(&["layer1".into(), "conv1".into(), "bn1".into()]).unwrap();
        let (before, after, launched) = backward(&part);
        assert!(launched < whole, "{launched} launches for {whole}");
        for (name, array) in &before.arrays {
            let moved = *array != after.arrays[name];
            let statistics = name.contains("running") || name.ends_with("tracked");
            assert_eq!(moved, statistics && name.starts_with("layer2"), "{name}");
        }
    }
}
