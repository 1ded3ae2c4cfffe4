//! Model strings, read and printed.

use super::{AttentionSpec, Backbone, Family, Placement, Spec, Stem};
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

impl FromStr for Spec {
    type Err = Error;

    /// # Errors
    /// [`Error::Usage`] that names the model string, what in it is not known, and the nearest known name.
    fn from_str(text: &str) -> Result<Self> {
        let refuse = |message: String| Error::usage(format!("model '{text}': {message}"));
        let lower = text.trim().to_ascii_lowercase();
        let mut parts = lower.split('+');
        let head = parts.next().unwrap_or_default();
        let (name, options) = head.split_once(':').unwrap_or((head, ""));
        let backbone = Backbone::find(name)
            .ok_or_else(|| refuse(unknown("backbone", name, &Backbone::ALL.map(Backbone::name))))?;
        let mut spec = Self::plain(backbone);
        for option in split_options(options).map_err(refuse)? {
            spec.set_option(option).map_err(refuse)?;
        }
        spec.check().map_err(refuse)?;
        for part in parts {
            let attention = spec.parse_attention(part).map_err(refuse)?;
            spec.attention.push(attention);
        }
        Ok(spec)
    }
}

/// Four times the width of the widest net of its kind in use, and of few enough parameters to be counted anywhere.
const MOST_WIDTH: usize = 1024;

impl Spec {
    fn set_option(&mut self, option: &str) -> Result<(), String> {
        let family = self.backbone.family();
        let count = |text: &str, what: &str, max: usize| {
            let range = || format!("{what} must be 1 to {max}");
            number(text).filter(|n| (1..=max).contains(n)).ok_or_else(range)
        };
        match (option.split_once('=').unwrap_or((option, "")), family) {
            (("stages", n), Family::ResNet | Family::EfficientNet) => {
                self.stages = count(n, "stages", self.backbone.blocks().len())?;
            }
            (("stem", "large"), Family::ResNet) => self.stem = Stem::Large,
            (("stem", "small"), Family::ResNet) => self.stem = Stem::Small,
            (("stem", other), Family::ResNet) => {
                return Err(unknown("stem", other, &["large", "small"]));
            }
            (("depth", n), Family::ViT) => self.depth = count(n, "depth", 48)?,
            (("heads", n), Family::ViT) => {
                self.heads = Some(count(n, "heads", 64)?).filter(|n| *n != self.backbone.heads());
            }
            (("patch", n), Family::ViT) => self.patch = count(n, "patch", 64)?,
            (("dropout", p), _) => self.dropout = probability("dropout", p)?,
            (("stochastic_depth", p), Family::EfficientNet | Family::ViT) => {
                self.stochastic_depth = probability("stochastic_depth", p)?;
            }
            _ => match option.strip_prefix('w').and_then(number) {
                Some(width) if (1..=MOST_WIDTH).contains(&width) => self.width = width,
                Some(width) => {
                    return Err(format!("the width is {width}; it must be 1 to {MOST_WIDTH}"));
                }
                None => {
                    let what = format!("option of {}", self.backbone.name());
                    return Err(unknown(&what, option, known_options(family)));
                }
            },
        }
        Ok(())
    }

    /// What options together must be.
    fn check(&self) -> Result<(), String> {
        if self.backbone.family() == Family::ViT && !self.width.is_multiple_of(self.vit_heads()) {
            return Err(format!(
                "{} heads do not divide the width {}; add heads=N with N a divisor of it",
                self.vit_heads(),
                self.width
            ));
        }
        Ok(())
    }

    /// The blocks that `stage` or `stage.block` names.
    fn place(&self, text: &str) -> Result<Vec<(usize, usize)>, String> {
        let stages = self.stages;
        let (stage, block) = text.split_once('.').map_or((text, None), |(s, b)| (s, Some(b)));
        let stage = number(stage)
            .filter(|s| (1..=stages).contains(s))
            .ok_or_else(|| format!("place '{text}': stages are 1 to {stages}"))?;
        let blocks = self.backbone.blocks()[stage - 1];
        let Some(block) = block else { return Ok((0..blocks).map(|b| (stage, b)).collect()) };
        let block = number(block).filter(|b| *b < blocks);
        let last = blocks - 1;
        let block = block
            .ok_or_else(|| format!("place '{text}': blocks of stage {stage} are 0 to {last}"))?;
        Ok(vec![(stage, block)])
    }

    fn parse_attention(&self, text: &str) -> Result<AttentionSpec, String> {
        let name = self.backbone.name();
        if self.backbone.family() == Family::ViT {
            return Err(format!("'+{text}': {name} is made of attention; add it to a conv net"));
        }
        let (head, options) = text.split_once(':').unwrap_or((text, ""));
        let (head, places) = head.split_once('@').map_or((head, None), |(h, p)| (h, Some(p)));
        let mut this = AttentionSpec::parse(head)?;
        match places {
            Some(places) => {
                for place in places.split(',') {
                    this.places.extend(self.place(place)?);
                }
            }
            None => {
                for stage in self.stages.saturating_sub(1).max(1)..=self.stages {
                    this.places.extend((0..self.backbone.blocks()[stage - 1]).map(|b| (stage, b)));
                }
            }
        }
        for option in split_options(options)? {
            this.set_option(option)?;
        }
        self.check_attention(&this)?;
        Ok(this)
    }

    /// Heads must divide the channels, and no block may have two attentions.
    fn check_attention(&self, new: &AttentionSpec) -> Result<(), String> {
        let inside = new.placement == Placement::Replace;
        let channels = |place: &(usize, usize)| self.block_channels(*place, inside);
        let every: Vec<usize> = new.places.iter().map(channels).collect();
        for (&(stage, block), &channels) in new.places.iter().zip(&every) {
            new.check_channels((stage, channels), &every)?;
            if self.attention_at(stage, block).is_some() {
                return Err(format!("block {stage}.{block} is named by two attentions"));
            }
        }
        Ok(())
    }
}

impl AttentionSpec {
    fn print_places(&self, blocks: &[usize]) -> String {
        let mut words = Vec::new();
        for (stage, &blocks) in (1..).zip(blocks) {
            let here: Vec<usize> =
                self.places.iter().filter(|p| p.0 == stage).map(|p| p.1).collect();
            if here.len() == blocks {
                words.push(stage.to_string());
            } else {
                words.extend(here.iter().map(|block| format!("{stage}.{block}")));
            }
        }
        words.join(",")
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = Self::plain(self.backbone);
        let mut options = Vec::new();
        let mut add = |differs: bool, text: String| {
            if differs {
                options.push(text);
            }
        };
        add(self.width != plain.width, format!("w{}", self.width));
        add(self.stages != plain.stages, format!("stages={}", self.stages));
        add(self.stem == Stem::Small, "stem=small".into());
        add(self.depth != plain.depth, format!("depth={}", self.depth));
        add(self.vit_heads() != plain.vit_heads(), format!("heads={}", self.vit_heads()));
        add(self.patch != plain.patch, format!("patch={}", self.patch));
        add(self.dropout != plain.dropout, format!("dropout={}", self.dropout));
        let depth = self.stochastic_depth;
        add(depth != plain.stochastic_depth, format!("stochastic_depth={depth}"));
        write!(f, "{}{}", self.backbone.name(), tail(&options))?;
        for a in &self.attention {
            let window = if a.variant.is_local() { a.window.to_string() } else { String::new() };
            let places = a.print_places(self.backbone.blocks());
            write!(f, "+{}{window}@{places}{}", a.variant.name(), tail(&a.print_options()))?;
        }
        Ok(())
    }
}

fn known_options(family: Family) -> &'static [&'static str] {
    match family {
        Family::ResNet => &["w64", "stages=4", "stem=small", "dropout=0"],
        Family::EfficientNet => &["w32", "stages=7", "dropout=0.2", "stochastic_depth=0.2"],
        Family::ViT => {
            &["w192", "depth=12", "heads=3", "patch=16", "dropout=0", "stochastic_depth=0"]
        }
    }
}

/// Options between commas or colons, none twice.
fn split_options(text: &str) -> Result<Vec<&str>, String> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let about = |option: &str| match option.split_once('=') {
        Some((name, _)) => name.to_owned(),
        None if option == "replace" || option == "append" => "place in a block".into(),
        None => option.trim_end_matches(|c: char| c.is_ascii_digit()).into(),
    };
    let mut options: Vec<&str> = Vec::new();
    for option in text.split([',', ':']) {
        if option.is_empty() {
            return Err(format!(
                "':{text}' has an empty option; options stand between single commas"
            ));
        }
        if let Some(first) = options.iter().find(|first| about(first) == about(option)) {
            return Err(format!("'{first}' and '{option}' speak of the same; give one of them"));
        }
        options.push(option);
    }
    Ok(options)
}

fn tail(options: &[String]) -> String {
    if options.is_empty() { String::new() } else { format!(":{}", options.join(",")) }
}

pub(super) fn number(text: &str) -> Option<usize> {
    text.parse().ok()
}

fn probability(what: &str, text: &str) -> Result<f32, String> {
    let p = text.parse().ok().filter(|p| (0.0..1.0).contains(p));
    p.ok_or_else(|| format!("{what}='{text}': a probability of at least 0 and below 1"))
}

/// "unknown `what` 'name', did you mean 'x'? (known: x, y)"
pub(super) fn unknown(what: &str, name: &str, known: &[&str]) -> String {
    let likeness = |k: &str| strsim::normalized_damerau_levenshtein(name, k);
    let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    let hint = match nearest {
        Some(nearest) if likeness(nearest) >= 0.5 => format!(", did you mean '{nearest}'?"),
        _ => String::new(),
    };
    format!("unknown {what} '{name}'{hint} (known: {})", known.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(text: &str) -> String {
        text.parse::<Spec>().unwrap().to_string()
    }

    #[test]
    fn strings_are_read_and_printed_canonically() {
        for text in [
            "resnet50+ela-bottleneck7@3,4.0",
            "efficientnet_b0:w8,stages=3,stochastic_depth=0+ga@2.0",
            "vit_ti_16:w48,depth=2,patch=8",
            "vit_s_16:heads=8,dropout=0.1",
            "resnet18+la7@3:sasa",
            "resnet18+la7@3:scale=none,tables=concat",
            "resnet18+ela5@3:scale=none,tables=concat",
            "resnet18+nonlocal@3.1+botnet@4",
            "resnet34+nonlocal@3:replace,heads=2",
            "efficientnet_b2+ela-gaussian5@6",
        ] {
            assert_eq!(canonical(text), text);
        }
        assert_eq!(canonical("ViT_Tiny_Patch16_224.augreg_in1k"), "vit_ti_16");
        assert_eq!(
            canonical("resnet18+ela-position7@4:border=zero,tables=concat,scale=none"),
            "resnet18+ela7@4:sasa"
        );
        assert_eq!(canonical("efficientnet_b0:dropout=0.2+la"), "efficientnet_b0+la7@6,7");
    }

    #[test]
    fn wrong_strings_say_what_is_wrong() {
        for (text, message) in [
            ("resnet51", "did you mean 'resnet"),
            ("vit_ti_16+ga@1", "is made of attention"),
            ("vit_ti_16:w100", "3 heads do not divide the width 100"),
            ("efficientnet_b0+ga@8", "stages are 1 to 7"),
            ("efficientnet_b0:stem=small", "unknown option of efficientnet_b0"),
            ("resnet18:stochastic_depth=0.1", "unknown option of resnet18"),
            ("efficientnet_b0:dropout=1", "at least 0 and below 1"),
            ("resnet18+nonlocal5@4", "no window '5'"),
            ("resnet18+botnet@4:border=zero", "it has no border"),
            ("resnet18:w6,stages=1+ela-bottleneck", "cannot divide by 4"),
            ("resnet18:w8,stages=1+ela-bottleneck", "(2 inside 'ela-bottleneck')"),
            ("efficientnet_b0+la7@1:append,heads=7", "add ':heads=4'"),
            // 40 and 112 channels: 10 would do for the first alone.
            ("efficientnet_b0+ga@3,5:append,heads=16", "add ':heads=8'"),
            ("resnet18+ga@4:heads=0", "heads='0'"),
            ("resnet18:w16,w8", "'w16' and 'w8' speak of the same"),
            ("resnet18+ga@4:append,replace", "'append' and 'replace' speak of the same"),
            ("resnet18:w16,,stem=small", "an empty option"),
            ("resnet18.w8", "unknown backbone 'resnet18.w8'"),
        ] {
            let error = text.parse::<Spec>().unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}
