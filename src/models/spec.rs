//! Model strings.
//!
//! ```text
//! model     = backbone [":" options] { "+" attention }
//! attention = variant [window] ["@" places] [":" options]
//! places    = place { "," place }         place = stage | stage "." block      stages from 1, blocks from 0
//! options   = option { "," option }
//! ```
//!
//! | option of a backbone | meaning | default |
//! |---|---|---|
//! | `w8` | channels of stage 1; each later stage has twice as many | `w64` |
//! | `stages=2` | leave the last stages out | `stages=4` |
//! | `stem=small` | a 3x3 stem at stride 1 without pooling, for images of 28 or 32 pixels | `stem=large` |
//!
//! | variant | what a query sees | logit |
//! |---|---|---|
//! | `ga` | the whole map | q.k / sqrt(d) + q.(rel_h + rel_w), learned relative positions |
//! | `la` | a window, `la7` for 7x7 | q.k / sqrt(d), no position term |
//! | `ela`, `ela-position` | a window | as `la`, with learned relative positions |
//!
//! What the paper means by "embedded local" attention is not known; `ela` is our reading of it: local attention with the
//! relative position embeddings of stand-alone self-attention.
//!
//! | option of an attention | meaning | default |
//! |---|---|---|
//! | `replace` | the attention takes the place of the block's second 3x3 convolution | yes |
//! | `append` | it follows the block as a residual branch that starts at zero, so pretrained weights still work | |
//! | `heads=4` | number of heads | `heads=8` |
//! | `border=zero` | window pixels outside the map stay in the softmax with k = v = 0 (`la`, `ela`) | `border=mask` |
//! | `pos=none` | no position tables (`ga`) | `pos=rel` |
//!
//! The window is odd, at most 13, and 7 where none is named; places are the last two stages where none are named. These
//! defaults are our choice: the paper's placements and sizes are not known.

use crate::error::{Error, Result};
use crate::ops::{Border, MAX_WINDOW};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// What a model string says. `Display` prints it canonically, with defaults left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// The convolutional net.
    pub backbone: Backbone,
    /// Channels of stage 1.
    pub width: usize,
    /// Stages, 1 to 4.
    pub stages: usize,
    /// The first layers.
    pub stem: Stem,
    /// Attention in chosen blocks; no block is named twice.
    pub attention: Vec<AttentionSpec>,
}

/// A convolutional net.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backbone {
    /// Two basic blocks in each of four stages.
    ResNet18,
    /// 3, 4, 6 and 3 basic blocks.
    ResNet34,
}

/// The first layers of a net.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stem {
    /// 7x7 at stride 2 and 3x3 max pooling at stride 2, as torchvision's.
    Large,
    /// 3x3 at stride 1, no pooling.
    Small,
}

/// A kind of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// `ga`: global, with relative position tables.
    Global,
    /// `la`: local, without a position term.
    Local,
    /// `ela` or `ela-position`: local, with relative position tables.
    EmbeddedLocal,
}

/// Where attention stands in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// In place of the second 3x3 convolution.
    Replace,
    /// After the block, as a residual branch.
    Append,
}

/// One attention of a model string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionSpec {
    /// Its kind.
    pub variant: Variant,
    /// Height and width of the window, odd; not used by `ga`.
    pub window: usize,
    /// Stages from 1 and blocks from 0.
    pub places: BTreeSet<(usize, usize)>,
    /// Where it stands in a block.
    pub placement: Placement,
    /// Number of heads.
    pub heads: usize,
    /// Whether there are position tables.
    pub position: bool,
    /// What a window sees outside the map; not used by `ga`.
    pub border: Border,
}

const BACKBONES: [Backbone; 2] = [Backbone::ResNet18, Backbone::ResNet34];
const VARIANTS: [(&str, Variant); 4] = [
    ("ga", Variant::Global),
    ("la", Variant::Local),
    ("ela", Variant::EmbeddedLocal),
    ("ela-position", Variant::EmbeddedLocal),
];
const WIDTH: usize = 64;
const WINDOW: usize = 7;
const HEADS: usize = 8;

impl Backbone {
    /// Every backbone.
    pub const ALL: [Self; 2] = BACKBONES;

    /// Its name in model strings.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ResNet18 => "resnet18",
            Self::ResNet34 => "resnet34",
        }
    }

    /// Blocks in each stage.
    pub const fn blocks(self) -> [usize; 4] {
        match self {
            Self::ResNet18 => [2, 2, 2, 2],
            Self::ResNet34 => [3, 4, 6, 3],
        }
    }
}

impl Variant {
    /// Its shortest name in model strings.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Global => "ga",
            Self::Local => "la",
            Self::EmbeddedLocal => "ela",
        }
    }
}

impl Spec {
    /// A plain backbone.
    pub fn plain(backbone: Backbone) -> Self {
        Self { backbone, width: WIDTH, stages: 4, stem: Stem::Large, attention: Vec::new() }
    }

    /// Channels of a stage (from 1).
    pub fn channels(&self, stage: usize) -> usize {
        self.width << (stage - 1)
    }

    /// The attention of a block, if it has one.
    pub fn attention_at(&self, stage: usize, block: usize) -> Option<&AttentionSpec> {
        self.attention.iter().find(|a| a.places.contains(&(stage, block)))
    }

    fn set_option(&mut self, option: &str) -> Result<(), String> {
        match option.split_once('=') {
            Some(("stages", n)) => {
                self.stages =
                    number(n).filter(|n| (1..=4).contains(n)).ok_or("stages must be 1 to 4")?;
            }
            Some(("stem", "large")) => self.stem = Stem::Large,
            Some(("stem", "small")) => self.stem = Stem::Small,
            Some(("stem", other)) => return Err(unknown("stem", other, &["large", "small"])),
            _ => match option.strip_prefix('w').and_then(number) {
                Some(width) if (1..=1024).contains(&width) => self.width = width,
                Some(_) => return Err("the width must be 1 to 1024".into()),
                None => return Err(unknown("option", option, &["w64", "stages=4", "stem=small"])),
            },
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
        let (head, options) = text.split_once(':').unwrap_or((text, ""));
        let (head, places) = head.split_once('@').map_or((head, None), |(h, p)| (h, Some(p)));
        let letters = head.find(|c: char| c.is_ascii_digit()).unwrap_or(head.len());
        let (name, window) = head.split_at(letters);
        let known = VARIANTS.map(|(name, _)| name);
        let variant = VARIANTS.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
        let variant = variant.ok_or_else(|| unknown("attention", name, &known))?;
        let mut this = AttentionSpec {
            variant,
            window: parse_window(variant, window)?,
            places: BTreeSet::new(),
            placement: Placement::Replace,
            heads: HEADS,
            position: variant != Variant::Local,
            border: Border::Mask,
        };
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
        for option in options.split([',', ':']).filter(|o| !o.is_empty()) {
            this.set_option(option)?;
        }
        self.check_attention(&this)?;
        Ok(this)
    }

    /// Heads must divide the channels, and no block may have two attentions.
    fn check_attention(&self, new: &AttentionSpec) -> Result<(), String> {
        for &(stage, block) in &new.places {
            let channels = self.channels(stage);
            if !channels.is_multiple_of(new.heads) {
                let fits = (1..=new.heads).rev().find(|h| channels.is_multiple_of(*h)).unwrap_or(1);
                return Err(format!(
                    "stage {stage} has {channels} channels, which {} heads do not divide; add ':heads={fits}'",
                    new.heads
                ));
            }
            if self.attention_at(stage, block).is_some() {
                return Err(format!("block {stage}.{block} is named by two attentions"));
            }
        }
        Ok(())
    }
}

impl AttentionSpec {
    fn set_option(&mut self, option: &str) -> Result<(), String> {
        let name = self.variant.name();
        let global = self.variant == Variant::Global;
        match option.split_once('=').unwrap_or((option, "")) {
            ("replace", "") => self.placement = Placement::Replace,
            ("append", "") => self.placement = Placement::Append,
            ("heads", n) => {
                self.heads =
                    number(n).filter(|n| *n > 0).ok_or("heads must be a number above 0")?;
            }
            ("border", _) if global => {
                return Err("'ga' sees the whole map: it has no border".into());
            }
            ("border", "mask") => self.border = Border::Mask,
            ("border", "zero") => self.border = Border::Zero,
            ("border", other) => return Err(unknown("border", other, &["mask", "zero"])),
            ("pos", _) if !global => {
                return Err(format!(
                    "'{name}' has no option pos: 'la' is without positions, 'ela' with"
                ));
            }
            ("pos", "rel") => self.position = true,
            ("pos", "none") => self.position = false,
            ("pos", other) => return Err(unknown("pos", other, &["rel", "none"])),
            (other, _) => {
                let known = ["replace", "append", "heads=8", "border=zero", "pos=none"];
                return Err(unknown("option", other, &known));
            }
        }
        Ok(())
    }

    fn print_places(&self, blocks: [usize; 4]) -> String {
        let mut words = Vec::new();
        for (stage, blocks) in (1..).zip(blocks) {
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
        let backbone = BACKBONES.into_iter().find(|b| b.name() == name);
        let backbone = backbone
            .ok_or_else(|| refuse(unknown("backbone", name, &BACKBONES.map(Backbone::name))))?;
        let mut spec = Self::plain(backbone);
        for option in options.split([',', ':']).filter(|o| !o.is_empty()) {
            spec.set_option(option).map_err(refuse)?;
        }
        for part in parts {
            let attention = spec.parse_attention(part).map_err(refuse)?;
            spec.attention.push(attention);
        }
        Ok(spec)
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut options = Vec::new();
        if self.width != WIDTH {
            options.push(format!("w{}", self.width));
        }
        if self.stages != 4 {
            options.push(format!("stages={}", self.stages));
        }
        if self.stem == Stem::Small {
            options.push("stem=small".into());
        }
        write!(f, "{}{}", self.backbone.name(), tail(&options))?;
        for a in &self.attention {
            let window =
                if a.variant == Variant::Global { String::new() } else { a.window.to_string() };
            let places = a.print_places(self.backbone.blocks());
            let mut options = Vec::new();
            if a.placement == Placement::Append {
                options.push("append".into());
            }
            if a.heads != HEADS {
                options.push(format!("heads={}", a.heads));
            }
            if a.border == Border::Zero {
                options.push("border=zero".into());
            }
            if a.variant == Variant::Global && !a.position {
                options.push("pos=none".into());
            }
            write!(f, "+{}{window}@{places}{}", a.variant.name(), tail(&options))?;
        }
        Ok(())
    }
}

fn tail(options: &[String]) -> String {
    if options.is_empty() { String::new() } else { format!(":{}", options.join(",")) }
}

fn number(text: &str) -> Option<usize> {
    text.parse().ok()
}

fn parse_window(variant: Variant, text: &str) -> Result<usize, String> {
    match variant {
        Variant::Global if text.is_empty() => Ok(WINDOW),
        Variant::Global => Err(format!("'ga' sees the whole map: it has no window '{text}'")),
        _ if text.is_empty() => Ok(WINDOW),
        _ => number(text).filter(|k| k % 2 == 1 && *k <= MAX_WINDOW).ok_or_else(|| {
            format!(
                "window '{text}': the window is an odd number up to {MAX_WINDOW}, such as {WINDOW}"
            )
        }),
    }
}

/// "unknown `what` 'name', did you mean 'x'? (known: x, y)"
fn unknown(what: &str, name: &str, known: &[&str]) -> String {
    let likeness = |k: &str| strsim::normalized_damerau_levenshtein(name, k);
    let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    let hint = match nearest {
        Some(nearest) if likeness(nearest) >= 0.5 => format!(", did you mean '{nearest}'?"),
        _ => String::new(),
    };
    format!("unknown {what} '{name}'{hint} (known: {})", known.join(", "))
}
