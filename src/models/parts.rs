//! Where a model's parameters are.

use super::{Family, Spec, network};
use crate::error::Result;
use crate::nn::{Init, Slot, Value};

/// The parameters of one part of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartCount {
    /// `stem`, `stage 1` and so on (`layer 1` in a transformer), `attention` or `head`. The 1x1 convolution and the norm before a
    /// classifier are the head's.
    pub part: String,
    /// Learned numbers.
    pub parameters: usize,
}

/// Parameters by part, in the order in which an image meets them; their sum is [`super::count`]. All that belongs to an
/// attention (projections, position tables, an appended branch's norm) counts as `attention`, whichever stage it is in; a
/// model without attention has no such part.
///
/// # Errors
/// As [`super::Model::build`].
pub fn count_parts(
    spec: &Spec,
    num_classes: usize,
    image: (usize, usize),
) -> Result<Vec<PartCount>> {
    let mut net = network(&mut Init::blank(), spec, num_classes, image)?;
    let mut parts: Vec<PartCount> = Vec::new();
    net.visit("", &mut |Slot { name, value }| {
        let Value::Parameter { tensor, .. } = value else { return };
        let part = part_of(spec, &name);
        match parts.iter_mut().find(|p| p.part == part) {
            Some(entry) => entry.parameters += tensor.numel(),
            None => parts.push(PartCount { part, parameters: tensor.numel() }),
        }
    });
    // The head last, the attention of all stages before it.
    parts.sort_by_key(|p| match p.part.as_str() {
        "attention" => 1,
        "head" => 2,
        _ => 0,
    });
    Ok(parts)
}

/// The part that a parameter belongs to, by its torchvision name.
fn part_of(spec: &Spec, name: &str) -> String {
    let number = |prefix: &str| -> Option<usize> {
        name.strip_prefix(prefix)?.split('.').next()?.parse().ok()
    };
    let family = spec.backbone.family();
    let stage = match family {
        Family::ResNet => number("layer"),
        Family::EfficientNet => number("features.").filter(|n| *n > 0),
        Family::ViT => number("encoder.layers.encoder_layer_").map(|n| n + 1),
    };
    match stage {
        Some(_) if name.contains(".attn.") => "attention".into(),
        Some(stage) if family == Family::EfficientNet && stage > spec.stages => "head".into(),
        Some(stage) if family == Family::ViT => format!("layer {stage}"),
        Some(stage) => format!("stage {stage}"),
        None if name.starts_with(family.head()) || name.starts_with("encoder.ln.") => "head".into(),
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
