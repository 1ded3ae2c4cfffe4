//! Baselines of a given size.

use super::{Backbone, Family, Spec, count};
use crate::error::Result;

/// A plain net beside a model of a certain number of parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Matched {
    /// The plain net.
    pub spec: Spec,
    /// Its parameters.
    pub parameters: usize,
}

/// Plain nets whose number of parameters is nearest to a model's, with the same classes and images: the nearest conv net and
/// transformer under their own names, and, where that is nearer, of another width (conv nets) or width and depth (transformers, with
/// heads of 64 channels as the named ones have). In the order conv net, transformer, each named before resized. The model itself is
/// none of them; transformers are left out where the images cannot be cut into patches.
///
/// # Errors
/// As [`super::Model::build`].
pub fn matched(spec: &Spec, num_classes: usize, image: (usize, usize)) -> Result<Vec<Matched>> {
    let target = count(spec, num_classes, image)?;
    let of = |spec: Spec| -> Result<Matched> {
        let parameters = count(&spec, num_classes, image)?;
        Ok(Matched { spec, parameters })
    };
    let whole = |side: usize| side.is_multiple_of(Backbone::ViTTi.patch());
    let mut found = Vec::new();
    for transformers in [false, true] {
        if transformers && !(whole(image.0) && whole(image.1)) {
            continue;
        }
        let mut named: Option<Matched> = None;
        let mut resized: Option<Matched> = None;
        for backbone in Backbone::ALL {
            if (backbone.family() == Family::ViT) != transformers {
                continue;
            }
            let plain = Spec::plain(backbone);
            if plain != *spec {
                // One that cannot be for such images is none of them.
                if let Ok(found) = of(plain.clone()) {
                    nearer(&mut named, found, target);
                }
            }
            if spec.attention.is_empty() && backbone == spec.backbone {
                continue; // the model at another width would be itself
            }
            if !transformers {
                nearer(&mut resized, by_width(&plain, target, &of)?, target);
            }
        }
        if transformers {
            // Images of so many patches that no transformer has a position for each leave none.
            let found = by_width_and_depth(target, &of).ok().flatten();
            resized = found.filter(|m| m.spec != *spec);
        }
        let worse = |m: &Matched| named.as_ref().is_some_and(|n| gap(n, target) <= gap(m, target));
        let resized = resized.filter(|m| !worse(m));
        found.extend(named);
        found.extend(resized);
    }
    Ok(found)
}

fn gap(m: &Matched, target: usize) -> usize {
    m.parameters.abs_diff(target)
}

fn nearer(best: &mut Option<Matched>, new: Matched, target: usize) {
    if best.as_ref().is_none_or(|b| gap(&new, target) < gap(b, target)) {
        *best = Some(new);
    }
}

/// The net at the width with the nearest count, which grows with the width.
fn by_width(plain: &Spec, target: usize, of: &impl Fn(Spec) -> Result<Matched>) -> Result<Matched> {
    let at = |width: usize| of(Spec { width, ..plain.clone() });
    // The greatest width that is not above the target, and the next.
    let (mut low, mut high) = (1, 4 * plain.width);
    while high - low > 1 {
        let middle = low.midpoint(high);
        if at(middle)?.parameters <= target { low = middle } else { high = middle }
    }
    let (below, above) = (at(low)?, at(high)?);
    Ok(if gap(&above, target) < gap(&below, target) { above } else { below })
}

/// The transformer of heads of 64 channels with the nearest count; of equals, the one whose depth is nearest to 12.
fn by_width_and_depth(
    target: usize,
    of: &impl Fn(Spec) -> Result<Matched>,
) -> Result<Option<Matched>> {
    let plain = Spec::plain(Backbone::ViTTi);
    let named = [Backbone::ViTTi, Backbone::ViTS, Backbone::ViTB];
    let at = |heads: usize, depth: usize| {
        let width = 64 * heads;
        match named.into_iter().find(|b| b.width() == width) {
            Some(backbone) => Spec { depth, ..Spec::plain(backbone) },
            None => Spec { width, heads: Some(heads), depth, ..plain.clone() },
        }
    };
    let mut best: Option<(usize, usize, Spec)> = None;
    for heads in 1..=12 {
        // Every layer has as many: two counts tell those of every depth.
        let (one, two) = (of(at(heads, 1))?.parameters, of(at(heads, 2))?.parameters);
        for depth in 6_usize..=18 {
            let parameters = one + (depth - 1) * (two - one);
            let key = (parameters.abs_diff(target), depth.abs_diff(12));
            if best.as_ref().is_none_or(|b| key < (b.0, b.1)) {
                best = Some((key.0, key.1, at(heads, depth)));
            }
        }
    }
    best.map(|(_, _, spec)| of(spec)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str, image: usize) -> Vec<(String, usize)> {
        let found = matched(&text.parse().unwrap(), 1000, (image, image)).unwrap();
        found.into_iter().map(|m| (m.spec.to_string(), m.parameters)).collect()
    }

    #[test]
    fn baselines_of_efficientnet_b0() {
        let found = names("efficientnet_b0", 224);
        assert_eq!(found[0], ("efficientnet_b1".into(), 7_794_184));
        let (resized, parameters) = &found[1];
        assert!(resized.starts_with("resnet") && parameters.abs_diff(5_288_548) < 100_000);
        assert_eq!(found[2], ("vit_ti_16".into(), 5_717_416));
        assert!(found.len() <= 4 && found.iter().all(|f| f.0 != "efficientnet_b0"), "{found:?}");
    }

    #[test]
    fn with_attention_the_plain_net_counts_and_odd_images_have_no_transformer() {
        let found = names("resnet18+la7@3.1", 40);
        assert_eq!(found[0].0, "resnet18");
        assert!(found.iter().all(|f| !f.0.starts_with("vit")), "{found:?}");
        let found = names("resnet18", 100_000);
        assert!(found.iter().all(|f| !f.0.starts_with("vit")) && !found.is_empty(), "{found:?}");
    }
}
