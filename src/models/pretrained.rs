//! Weights of other programs to start from: prefixes that wrappers put before names, classifiers of other data.

use super::freeze::is_head;
use super::{Load, Model, timm};
use crate::error::{Error, Result};
use crate::nn::{Differences, StateArray, StateDict};
use std::collections::BTreeMap;

/// What `DistributedDataParallel`, Lightning modules and feature extractors put before names.
const PREFIXES: [&str; 3] = ["module.", "backbone.", "model."];

/// What became of a file of pretrained weights.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Arrays that the model took over.
    pub taken: usize,
    /// How model and file differ otherwise.
    pub differences: Differences,
    /// Prefixes that were taken off the file's names.
    pub prefixes: Vec<&'static str>,
    /// Why the classifier starts anew, where it does.
    pub new_head: Option<String>,
    /// Heights and widths of the maps of patches that a transformer's position embeddings were interpolated from and to, where the
    /// file's are for images of another size.
    pub positions: Option<((usize, usize), (usize, usize))>,
}

impl Model {
    /// Takes over pretrained weights as [`Load::Pretrained`] does. Prefixes `module.`, `backbone.` and `model.` are taken off names that
    /// the model does not know with them; a classifier of another number of classes, or under another name, is left out, and so is any
    /// for `drop_head`. A transformer's position embeddings for images of another size are interpolated, as torchvision does.
    ///
    /// # Errors
    /// As [`Model::load`], and [`Error::File`] where numbers are not finite or two names become one without their prefixes.
    pub fn load_pretrained(&self, dict: &StateDict, drop_head: bool) -> Result<Loaded> {
        let bad = dict.arrays.iter().find(|(_, a)| a.to_f32().iter().any(|x| !x.is_finite()));
        if let Some((name, _)) = bad {
            let message = format!("'{name}' has numbers that are not finite; take another file");
            return Err(Error::file(&dict.source, message));
        }
        let (dict, prefixes) = self.without_prefixes(dict)?;
        let mut dict = timm::with_torchvision_names(self.spec.backbone.family(), &dict);
        let positions = self.fit_positions(&mut dict)?;
        let mut new_head = drop_head.then(|| "left out by --drop-head".to_owned());
        if new_head.is_none() {
            match self.load(&dict, Load::Pretrained { drop_head: false }) {
                Ok(differences) => {
                    let taken = dict.arrays.len() - differences.unexpected.len();
                    return Ok(Loaded { taken, differences, prefixes, new_head, positions });
                }
                // What does not fit may be the classifier alone.
                Err(error) => new_head = Some(self.other_head(&dict).ok_or(error)?),
            }
        }
        dict.arrays.retain(|name, _| !is_head(name));
        let differences = self.load(&dict, Load::Pretrained { drop_head: true })?;
        let taken = dict.arrays.len() - differences.unexpected.len();
        Ok(Loaded { taken, differences, prefixes, new_head, positions })
    }

    fn without_prefixes(&self, dict: &StateDict) -> Result<(StateDict, Vec<&'static str>)> {
        let mut arrays: BTreeMap<String, StateArray> = BTreeMap::new();
        let mut prefixes = Vec::new();
        for (name, array) in &dict.arrays {
            let mut bare = name.as_str();
            while !self.parameters.names().any(|known| known == bare) {
                let cut = |p: &&'static str| Some((bare.strip_prefix(*p)?, *p));
                let Some((rest, prefix)) = PREFIXES.iter().find_map(cut) else { break };
                bare = rest;
                if !prefixes.contains(&prefix) {
                    prefixes.push(prefix);
                }
            }
            if arrays.insert(bare.to_owned(), array.clone()).is_some() {
                let message =
                    format!("'{name}' and another array are both '{bare}' without their prefix");
                return Err(Error::file(&dict.source, message));
            }
        }
        Ok((StateDict { arrays, ..dict.clone() }, prefixes))
    }

    /// Why the file's classifier cannot be this model's; `None` where it can.
    fn other_head(&self, dict: &StateDict) -> Option<String> {
        let ours: Vec<&str> = self.parameters.parameter_names().filter(|n| is_head(n)).collect();
        let theirs: Vec<&String> = dict.arrays.keys().filter(|name| is_head(name)).collect();
        if theirs.is_empty() {
            return Some("the file has none".into());
        }
        if !ours.iter().any(|name| dict.arrays.contains_key(*name)) {
            return Some(format!("the file's is called {}", theirs[0]));
        }
        let other =
            self.parameters.compare(dict).reshaped.into_iter().find(|r| is_head(&r.name))?;
        let classes = |shape: &[usize]| shape.first().copied().unwrap_or_default();
        Some(format!(
            "the file's has {} classes, the model {}",
            classes(&other.found),
            classes(&other.expected)
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    fn model(classes: usize, seed: u64) -> Model {
        let spec = "resnet18:w8,stages=1,stem=small+la3@1.1:append".parse().unwrap();
        Model::build(&spec, classes, (8, 8), &Device::cpu(), seed).unwrap()
    }

    /// The plain net's part of another model's state.
    fn file(classes: usize) -> StateDict {
        let mut dict = model(classes, 7).state().unwrap();
        dict.arrays.retain(|name, _| !name.contains(".attn."));
        dict
    }

    fn renamed(mut dict: StateDict, new: impl Fn(&str) -> String) -> StateDict {
        dict.arrays = dict.arrays.iter().map(|(name, a)| (new(name), a.clone())).collect();
        dict
    }

    #[test]
    fn prefixes_of_wrappers_are_taken_off() {
        let plain = model(3, 1);
        let loaded = plain.load_pretrained(&file(3), false).unwrap();
        assert_eq!((loaded.taken, &loaded.new_head), (file(3).arrays.len(), &None));
        assert!(loaded.prefixes.is_empty());
        assert!(loaded.differences.missing.iter().all(|name| name.contains(".attn.")));
        for prefix in ["module.", "backbone.", "module.model."] {
            let wrapped = model(3, 1);
            let dict = renamed(file(3), |name| format!("{prefix}{name}"));
            let got = wrapped.load_pretrained(&dict, false).unwrap();
            assert!(!got.prefixes.is_empty() && got.taken == loaded.taken, "{prefix}: {got:?}");
            assert_eq!(wrapped.state().unwrap().arrays, plain.state().unwrap().arrays, "{prefix}");
        }
        let mut twice = file(3);
        let array = twice.arrays["conv1.weight"].clone();
        twice.arrays.insert("model.conv1.weight".into(), array);
        let error = model(3, 1).load_pretrained(&twice, false).unwrap_err().to_string();
        assert!(error.contains("both 'conv1.weight'"), "{error}");
    }

    #[test]
    fn a_classifier_that_does_not_fit_starts_anew() {
        let fresh = model(3, 1).state().unwrap();
        let head = |name: &str| name.replace("fc.", "head.fc.");
        let none = {
            let mut dict = file(3);
            dict.arrays.retain(|name, _| !name.starts_with("fc."));
            dict
        };
        for (dict, drop_head, why) in [
            (file(1000), false, "the file's has 1000 classes, the model 3"),
            (renamed(file(5), head), false, "the file's is called head.fc.bias"),
            (none, false, "the file has none"),
            (file(3), true, "left out by --drop-head"),
        ] {
            let model = model(3, 1);
            let loaded = model.load_pretrained(&dict, drop_head).unwrap();
            assert_eq!(loaded.new_head.as_deref(), Some(why));
            let now = model.state().unwrap().arrays;
            assert_eq!(now["fc.weight"], fresh.arrays["fc.weight"], "{why}");
            assert_eq!(now["conv1.weight"], file(3).arrays["conv1.weight"], "{why}");
        }
        // What is missing of the backbone is no matter of the head.
        let mut dict = file(3);
        dict.arrays.remove("layer1.0.conv1.weight");
        let error = model(3, 1).load_pretrained(&dict, false).unwrap_err().to_string();
        assert!(error.contains("1 missing (layer1.0.conv1.weight)"), "{error}");
    }
}
