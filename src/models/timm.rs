//! Names of timm's state dicts, as torchvision's. Only names differ: shapes and numbers are the same.

use super::Family;
use crate::nn::StateDict;

/// A state dict with torchvision's names, from one with timm's of the same net; names that are neither stay. timm's ResNets have
/// torchvision's names already.
pub(super) fn with_torchvision_names(family: Family, dict: &StateDict) -> StateDict {
    let rename = match family {
        Family::ResNet => return dict.clone(),
        Family::EfficientNet => efficientnet,
        Family::ViT => vit,
    };
    // Stages whose blocks have an expansion, which timm names shifted by one layer.
    let expands = |prefix: &str| dict.arrays.contains_key(&format!("{prefix}.conv_pwl.weight"));
    let stages = dict
        .arrays
        .keys()
        .filter_map(|name| name.strip_prefix("blocks.")?.split('.').next()?.parse::<usize>().ok());
    let stages = stages.max().map_or(0, |last| last + 1);
    let arrays = dict.arrays.iter().map(|(name, array)| {
        let new = rename(name, stages, &expands).unwrap_or_else(|| name.clone());
        (new, array.clone())
    });
    StateDict { arrays: arrays.collect(), ..dict.clone() }
}

fn vit(name: &str, _: usize, _: &dyn Fn(&str) -> bool) -> Option<String> {
    if let Some(rest) = name.strip_prefix("blocks.") {
        let (layer, rest) = rest.split_once('.')?;
        let (part, leaf) = rest.rsplit_once('.')?;
        let part = match part {
            "norm1" => "ln_1.",
            "attn.qkv" => "self_attention.in_proj_",
            "attn.proj" => "self_attention.out_proj.",
            "norm2" => "ln_2.",
            "mlp.fc1" => "mlp.0.",
            "mlp.fc2" => "mlp.3.",
            _ => return None,
        };
        return Some(format!("encoder.layers.encoder_layer_{layer}.{part}{leaf}"));
    }
    Some(match name {
        "cls_token" => "class_token".into(),
        "pos_embed" => "encoder.pos_embedding".into(),
        _ => {
            let (part, leaf) = name.rsplit_once('.')?;
            match part {
                "patch_embed.proj" => format!("conv_proj.{leaf}"),
                "norm" => format!("encoder.ln.{leaf}"),
                "head" => format!("heads.head.{leaf}"),
                _ => return None,
            }
        }
    })
}

fn efficientnet(name: &str, stages: usize, expands: &dyn Fn(&str) -> bool) -> Option<String> {
    let (part, leaf) = name.rsplit_once('.')?;
    if let Some(rest) = part.strip_prefix("blocks.") {
        let mut words = rest.splitn(3, '.');
        let (stage, block, part) = (words.next()?, words.next()?, words.next()?);
        let part = if expands(&format!("blocks.{stage}.{block}")) {
            match part {
                "conv_pw" => "0.0",
                "bn1" => "0.1",
                "conv_dw" => "1.0",
                "bn2" => "1.1",
                "se.conv_reduce" => "2.fc1",
                "se.conv_expand" => "2.fc2",
                "conv_pwl" => "3.0",
                "bn3" => "3.1",
                _ => return None,
            }
        } else {
            match part {
                "conv_dw" => "0.0",
                "bn1" => "0.1",
                "se.conv_reduce" => "1.fc1",
                "se.conv_expand" => "1.fc2",
                "conv_pw" => "2.0",
                "bn2" => "2.1",
                _ => return None,
            }
        };
        let stage = stage.parse::<usize>().ok()? + 1;
        return Some(format!("features.{stage}.{block}.block.{part}.{leaf}"));
    }
    let part = match part {
        "conv_stem" => "features.0.0".into(),
        "bn1" => "features.0.1".into(),
        "conv_head" => format!("features.{}.0", stages + 1),
        "bn2" => format!("features.{}.1", stages + 1),
        "classifier" => "classifier.1".into(),
        _ => return None,
    };
    Some(format!("{part}.{leaf}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::StateArray;

    fn renamed(family: Family, names: &[&str]) -> Vec<String> {
        let mut dict = StateDict::default();
        for name in names {
            dict.arrays.insert((*name).into(), StateArray::count(0));
        }
        with_torchvision_names(family, &dict).arrays.into_keys().collect()
    }

    #[test]
    fn a_transformers_names() {
        let timm = [
            "blocks.11.attn.proj.bias",
            "blocks.11.attn.qkv.weight",
            "blocks.11.mlp.fc2.weight",
            "blocks.11.norm1.bias",
            "cls_token",
            "head.weight",
            "norm.weight",
            "patch_embed.proj.bias",
            "pos_embed",
        ];
        let mut expected = vec![
            "encoder.layers.encoder_layer_11.self_attention.out_proj.bias",
            "encoder.layers.encoder_layer_11.self_attention.in_proj_weight",
            "encoder.layers.encoder_layer_11.mlp.3.weight",
            "encoder.layers.encoder_layer_11.ln_1.bias",
            "class_token",
            "heads.head.weight",
            "encoder.ln.weight",
            "conv_proj.bias",
            "encoder.pos_embedding",
        ];
        expected.sort_unstable();
        assert_eq!(renamed(Family::ViT, &timm), expected);
        // torchvision's own stay.
        assert_eq!(renamed(Family::ViT, &expected), expected);
    }

    #[test]
    fn an_efficientnets_names() {
        let timm = [
            "blocks.0.0.bn2.running_mean",
            "blocks.0.0.conv_pw.weight",
            "blocks.0.0.se.conv_reduce.bias",
            "blocks.6.0.bn3.weight",
            "blocks.6.0.conv_dw.weight",
            "blocks.6.0.conv_pwl.weight",
            "bn2.num_batches_tracked",
            "classifier.bias",
            "conv_stem.weight",
        ];
        let mut expected = vec![
            "features.1.0.block.2.1.running_mean",
            "features.1.0.block.2.0.weight",
            "features.1.0.block.1.fc1.bias",
            "features.7.0.block.3.1.weight",
            "features.7.0.block.1.0.weight",
            "features.7.0.block.3.0.weight",
            "features.8.1.num_batches_tracked",
            "classifier.1.bias",
            "features.0.0.weight",
        ];
        expected.sort_unstable();
        assert_eq!(renamed(Family::EfficientNet, &timm), expected);
        assert_eq!(renamed(Family::EfficientNet, &["classifier.1.bias"]), ["classifier.1.bias"]);
    }
}
