//! Where a model's parameters are.

use super::{Model, Spec};
use crate::Device;
use crate::error::Result;
use crate::nn::Init;

/// The parameters of one part of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartCount {
    /// `stem`, `stage 1` to `stage 4`, `attention` or `head`.
    pub part: String,
    /// Learned numbers.
    pub parameters: usize,
}

/// Parameters by part, in the order in which an image meets them; their sum is [`super::count`]. All that belongs to an
/// attention (projections, position tables, an appended branch's norm) counts as `attention`, whichever stage it is in; a
/// model without attention has no such part.
///
/// # Errors
/// As [`Model::build`].
pub fn count_parts(
    spec: &Spec,
    num_classes: usize,
    image: (usize, usize),
) -> Result<Vec<PartCount>> {
    let init = &mut Init::blank(&Device::cpu());
    let model = Model::from_init(init, spec, num_classes, image)?;
    let mut parts = vec![PartCount { part: "stem".into(), parameters: 0 }];
    parts
        .extend((1..=spec.stages).map(|s| PartCount { part: format!("stage {s}"), parameters: 0 }));
    if !spec.attention.is_empty() {
        parts.push(PartCount { part: "attention".into(), parameters: 0 });
    }
    parts.push(PartCount { part: "head".into(), parameters: 0 });
    for name in model.parameters.parameter_names() {
        let part = part_of(name);
        let numel = model.parameters.parameter(name).map_or(0, |t| t.numel());
        if let Some(entry) = parts.iter_mut().find(|p| p.part == part) {
            entry.parameters += numel;
        }
    }
    Ok(parts)
}

/// The part that a parameter belongs to, by its torchvision name.
fn part_of(name: &str) -> String {
    let stage = name.strip_prefix("layer").and_then(|rest| rest.split('.').next());
    match stage {
        Some(_) if name.contains(".attn.") => "attention".into(),
        Some(stage) => format!("stage {stage}"),
        None if name.starts_with("fc.") => "head".into(),
        None => "stem".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::count;

    fn parts(text: &str) -> Vec<(String, usize)> {
        let spec = text.parse().unwrap();
        let parts = count_parts(&spec, 1000, (224, 224)).unwrap();
        let sum: usize = parts.iter().map(|p| p.parameters).sum();
        assert_eq!(sum, count(&spec, 1000, (224, 224)).unwrap(), "{text}");
        parts.into_iter().map(|p| (p.part, p.parameters)).collect()
    }

    #[test]
    fn the_parts_of_a_resnet18_by_hand() {
        // 64 * 3 * 7 * 7 + 2 * 64; two blocks of two 64 x 64 x 3 x 3 and two norms.
        let plain = parts("resnet18");
        assert_eq!(plain[0], ("stem".into(), 9_536));
        assert_eq!(plain[1], ("stage 1".into(), 2 * (2 * 36_864 + 2 * 128)));
        assert_eq!(plain[5], ("head".into(), 513_000));
        assert_eq!(plain.len(), 6);
    }

    #[test]
    fn attention_is_counted_apart() {
        // q, k and v of 512 x 512 and two tables of 13 rows of 512, in each of two blocks.
        let with = parts("resnet18+ga@4");
        assert_eq!(with[5], ("attention".into(), 2 * (3 * 512 * 512 + 2 * 13 * 512)));
        assert_eq!(with[4].1, parts("resnet18")[4].1 - 2 * 512 * 512 * 9);
        // Local attention without tables, in all of stages 3 and 4.
        assert_eq!(parts("resnet18+la7@3,4")[5].1, 2 * 3 * (256 * 256 + 512 * 512));
        // An appended branch also has a projection and a norm.
        let appended = parts("resnet18+ga@4.1:append");
        assert_eq!(appended[5].1, 4 * 512 * 512 + 2 * 13 * 512 + 2 * 512);
    }
}
