//! The attention of a model string: kinds, options and their defaults.

use super::parse::{number, unknown};
use crate::nn::Tables;
use crate::ops::{Border, MAX_WINDOW};
use std::collections::BTreeSet;

/// A kind of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// `ga`: global, with relative position tables.
    Global,
    /// `la`: local, without a position term.
    Local,
    /// `ela` or `ela-position`: local, with relative position tables.
    EmbeddedLocal,
    /// `ela-bottleneck`: `la` between two 1x1 convolutions, at a quarter of the channels.
    Bottleneck,
    /// `ela-gaussian`: a non-local block whose softmax sees a window.
    Gaussian,
    /// `nonlocal`: the non-local block, embedded Gaussian.
    NonLocal,
    /// `botnet`: global attention as BoTNet has it.
    BotNet,
    /// `lesa`: locally enhanced self-attention.
    Lesa,
}

/// Where attention stands in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// In place of the block's spatial convolution.
    Replace,
    /// After the block, as a residual branch.
    Append,
}

/// One attention of a model string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionSpec {
    /// Its kind.
    pub variant: Variant,
    /// Height and width of the window, odd; only local kinds use it.
    pub window: usize,
    /// Stages from 1 and blocks from 0.
    pub places: BTreeSet<(usize, usize)>,
    /// Where it stands in a block.
    pub placement: Placement,
    /// Number of heads.
    pub heads: usize,
    /// The position tables.
    pub tables: Tables,
    /// Whether q.k is divided by the root of a head's channels.
    pub scaled: bool,
    /// What a window sees outside the map; only local kinds use it.
    pub border: Border,
}

const NAMES: [(&str, Variant); 9] = [
    ("ga", Variant::Global),
    ("la", Variant::Local),
    ("ela", Variant::EmbeddedLocal),
    ("ela-position", Variant::EmbeddedLocal),
    ("ela-bottleneck", Variant::Bottleneck),
    ("ela-gaussian", Variant::Gaussian),
    ("nonlocal", Variant::NonLocal),
    ("botnet", Variant::BotNet),
    ("lesa", Variant::Lesa),
];
const WINDOW: usize = 7;

impl Variant {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Global,
        Self::Local,
        Self::EmbeddedLocal,
        Self::Bottleneck,
        Self::Gaussian,
        Self::NonLocal,
        Self::BotNet,
        Self::Lesa,
    ];

    /// Its shortest name in model strings.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|row| row.1 == self).map_or("", |row| row.0)
    }

    /// One line on it.
    pub const fn about(self) -> &'static str {
        match self {
            Self::Global => "global attention with learned relative positions",
            Self::Local => "local attention in a 7x7 window, no positions",
            Self::EmbeddedLocal => {
                "local attention with learned relative positions (ela-position, our default reading of \"embedded local\")"
            }
            Self::Bottleneck => {
                "local attention between 1x1 embeddings at a quarter of the channels"
            }
            Self::Gaussian => "non-local block whose softmax sees a 7x7 window",
            Self::NonLocal => "non-local block, embedded Gaussian, after each block",
            Self::Lesa => "locally enhanced: a gate adds global attention to a grouped convolution",
            Self::BotNet => "BoTNet's global attention: 4 heads that share relative positions",
        }
    }

    /// Whether a query sees a window and not the whole map.
    pub const fn is_local(self) -> bool {
        match self {
            Self::Local | Self::EmbeddedLocal | Self::Bottleneck | Self::Gaussian => true,
            Self::Global | Self::NonLocal | Self::BotNet | Self::Lesa => false,
        }
    }

    /// What the published layer's channels are divided by inside it.
    pub const fn reduction(self) -> usize {
        match self {
            Self::Bottleneck => 4,
            Self::Gaussian | Self::NonLocal => 2,
            Self::Global | Self::Local | Self::EmbeddedLocal | Self::BotNet | Self::Lesa => 1,
        }
    }

    const fn heads(self) -> usize {
        match self {
            Self::Gaussian | Self::NonLocal => 1,
            Self::BotNet => 4,
            Self::Global | Self::Local | Self::EmbeddedLocal | Self::Bottleneck | Self::Lesa => 8,
        }
    }

    const fn placement(self) -> Placement {
        match self {
            Self::NonLocal | Self::Gaussian => Placement::Append,
            _ => Placement::Replace,
        }
    }

    const fn tables(self) -> Tables {
        match self {
            Self::Global | Self::EmbeddedLocal => Tables::Sum,
            Self::BotNet => Tables::Shared,
            Self::Local | Self::Bottleneck | Self::Gaussian | Self::NonLocal | Self::Lesa => {
                Tables::None // LESA has tables of its own
            }
        }
    }

    /// Its options in a model string, for messages.
    fn options(self) -> &'static [&'static str] {
        match self {
            Self::Global => &["replace", "append", "heads=8", "pos=none", "scale=none"],
            // `la` has tables only where they are asked for, alone or by `sasa`.
            Self::Local | Self::EmbeddedLocal => &[
                "replace",
                "append",
                "heads=8",
                "border=zero",
                "scale=none",
                "tables=concat",
                "sasa",
            ],
            Self::Bottleneck => &["replace", "append", "heads=8", "border=zero", "scale=none"],
            Self::Gaussian => &["replace", "append", "heads=1", "border=zero"],
            Self::NonLocal => &["replace", "append", "heads=1"],
            Self::BotNet => &["replace", "append", "heads=4"],
            Self::Lesa => &["replace", "append", "heads=8"],
        }
    }
}

impl AttentionSpec {
    /// Reads `variant [window]`; the places are still to be named.
    pub(super) fn parse(head: &str) -> Result<Self, String> {
        let letters = head.find(|c: char| c.is_ascii_digit()).unwrap_or(head.len());
        let (name, window) = head.split_at(letters);
        let variant = NAMES.iter().find(|row| row.0 == name).map(|row| row.1);
        let variant =
            variant.ok_or_else(|| unknown("attention", name, &NAMES.map(|(name, _)| name)))?;
        Ok(Self {
            variant,
            window: parse_window(variant, window)?,
            places: BTreeSet::new(),
            placement: variant.placement(),
            heads: variant.heads(),
            tables: variant.tables(),
            scaled: variant.reduction() != 2,
            border: Border::Mask,
        })
    }

    /// Takes one option.
    pub(super) fn set_option(&mut self, option: &str) -> Result<(), String> {
        let known = self.variant.options();
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        let applies = known.iter().any(|k| k.split('=').next() == Some(key));
        if !applies && key == "border" {
            let name = self.variant.name();
            return Err(format!("'{name}' sees the whole map: it has no border"));
        }
        if !applies && key == "pos" {
            return Err(format!(
                "'{}' has no option pos: 'la' is without positions, 'ela' with",
                self.variant.name()
            ));
        }
        if !applies {
            return Err(unknown(&format!("option of '{}'", self.variant.name()), option, known));
        }
        match (key, value) {
            ("replace", "") => self.placement = Placement::Replace,
            ("append", "") => self.placement = Placement::Append,
            ("sasa", "") => {
                self.tables = Tables::Concat;
                self.scaled = false;
                self.border = Border::Zero;
            }
            ("heads", n) => {
                let above = number(n).filter(|n| *n > 0);
                self.heads =
                    above.ok_or_else(|| format!("heads='{n}': heads must be a number above 0"))?;
            }
            ("border", "mask") => self.border = Border::Mask,
            ("border", "zero") => self.border = Border::Zero,
            ("border", other) => return Err(unknown("border", other, &["mask", "zero"])),
            ("pos", "rel") => self.tables = Tables::Sum,
            ("pos", "none") => self.tables = Tables::None,
            ("pos", other) => return Err(unknown("pos", other, &["rel", "none"])),
            ("scale", "dim") => self.scaled = true,
            ("scale", "none") => self.scaled = false,
            ("scale", other) => return Err(unknown("scale", other, &["dim", "none"])),
            ("tables", "sum") => self.tables = Tables::Sum,
            ("tables", "concat") => self.tables = Tables::Concat,
            ("tables", other) => return Err(unknown("tables", other, &["sum", "concat"])),
            _ => return Err(unknown("option", option, known)),
        }
        Ok(())
    }

    /// Heads must divide the channels at which a layer in a block of `channels` channels attends; `every` has those of all its blocks,
    /// which the advice is for.
    pub(super) fn check_channels(
        &self,
        (stage, channels): (usize, usize),
        every: &[usize],
    ) -> Result<(), String> {
        let reduction = self.variant.reduction();
        let inner = channels / reduction;
        let name = self.variant.name();
        if inner * reduction != channels {
            return Err(format!(
                "stage {stage} has {channels} channels, which '{name}' cannot divide by {reduction}; take a multiple of it"
            ));
        }
        // LESA's queries and keys have half of a head's channels.
        let split = if self.variant == Variant::Lesa { 2 } else { 1 };
        if !inner.is_multiple_of(split * self.heads) {
            let all = |h: &usize| every.iter().all(|c| (c / reduction).is_multiple_of(split * h));
            let fits = (1..=self.heads).rev().find(all).unwrap_or(1);
            let inside =
                if reduction == 1 { String::new() } else { format!(" ({inner} inside '{name}')") };
            return Err(format!(
                "stage {stage} has {channels} channels{inside}, which {} heads do not divide; add ':heads={fits}'",
                self.heads
            ));
        }
        if self.tables == Tables::Concat && !channels.is_multiple_of(2) {
            return Err(format!(
                "stage {stage} has {channels} channels, but the halves of 'tables=concat' need an even number"
            ));
        }
        Ok(())
    }

    /// Options that are not the defaults, as a model string has them.
    pub(super) fn print_options(&self) -> Vec<String> {
        let variant = self.variant;
        let mut options: Vec<String> = Vec::new();
        if self.placement != variant.placement() {
            let name = if self.placement == Placement::Append { "append" } else { "replace" };
            options.push(name.into());
        }
        if self.heads != variant.heads() {
            options.push(format!("heads={}", self.heads));
        }
        let rest = (self.tables, self.scaled, self.border);
        if rest == (Tables::Concat, false, Border::Zero) {
            options.push("sasa".into());
            return options;
        }
        if self.border == Border::Zero {
            options.push("border=zero".into());
        }
        if !self.scaled && variant.reduction() != 2 {
            options.push("scale=none".into());
        }
        match self.tables {
            Tables::None if variant.tables() != Tables::None => options.push("pos=none".into()),
            Tables::Sum if variant.tables() == Tables::None => options.push("tables=sum".into()),
            Tables::Concat => options.push("tables=concat".into()),
            _ => {}
        }
        options
    }
}

fn parse_window(variant: Variant, text: &str) -> Result<usize, String> {
    if text.is_empty() {
        return Ok(WINDOW);
    }
    if !variant.is_local() {
        let name = variant.name();
        return Err(format!("'{name}' sees the whole map: it has no window '{text}'"));
    }
    number(text).filter(|k| k % 2 == 1 && *k <= MAX_WINDOW).ok_or_else(|| {
        format!("window '{text}': the window is an odd number up to {MAX_WINDOW}, such as {WINDOW}")
    })
}
