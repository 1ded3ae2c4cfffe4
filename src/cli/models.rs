//! `attn2d models`: what models there are, how model strings are read, what a model consists of.

use std::fmt::Write;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use crate::models::{self, Listing, PartCount, Spec};
use crate::train::Progress;
use crate::{Error, Result};

/// Classes and image side that counts are for, unless others are asked for.
pub(super) const CLASSES: usize = 1000;
pub(super) const SIDE: usize = 224;

const HELP: &str = "Examples:
  attn2d models
      every backbone, plain and with attention, and how to write a model string
  attn2d models resnet18+ga@4 --num-classes 3 --img-size 64
      the parameters of one model, part by part
  attn2d models describe efficientnet_b0+la7@6,7 --num-classes 2 --img-size 96
      every layer with its output, parameters and FLOPs, and plain nets of the same size
  attn2d models --json
      the list for a program to read";

/// List models, explain model strings, count a model's parameters
#[derive(Debug, Args)]
#[command(after_help = HELP, args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// A model string, such as resnet18+ga@4; all models if not given
    #[arg(value_name = "MODEL")]
    model: Option<String>,
    /// Classes to count for; 1000 if not given
    #[arg(long, value_name = "N", requires = "model")]
    num_classes: Option<usize>,
    /// Height and width in pixels of the images to count for: global position tables grow with it; 224 if not given
    #[arg(long, value_name = "N", requires = "model")]
    img_size: Option<usize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Describe(super::describe::Options),
}

/// How model strings are read; `src/models/spec/mod.rs` has the whole grammar.
const GRAMMAR: &str = "Model strings
  backbone[:option,..] and any number of  +attention[@place,..][:option,..]

  attention    ga           global: every place of the map sees every other, with learned relative positions
               la7          local: a 7x7 window round each place, without positions; odd windows up to 13
               ela7         local with learned relative positions (= ela-position): our reading of \"embedded local\"
               ela-bottleneck7, ela-gaussian7   two other readings of it
               nonlocal, botnet, lesa           published global layers
  places       3,4          all blocks of stages 3 and 4 (the last two stages if no place is given)
               4.1          block 1 of stage 4; stages count from 1, blocks from 0
  its options  replace      stands for the block's spatial convolution: the second 3x3 of a basic block, the 3x3 of a bottleneck,
                            the depthwise one of an MBConv (the default but for nonlocal and ela-gaussian)
               append       follows the block as a residual branch that starts at zero: pretrained weights stay valid
               heads=4      heads; if not given 8, botnet 4, nonlocal and ela-gaussian 1
               border=zero  places outside the map stay in the softmax with k = v = 0 (local ones); they are masked if not given
               scale=none   q.k is not divided by the root of a head's channels (ga, la, ela, ela-bottleneck)
               sasa         as the authors of stand-alone self-attention have it (la, ela)
               pos=none     no relative positions (ga)
  backbone's   w16          channels of a ResNet's stage 1, of an EfficientNet's stem, of a transformer's tokens
  options      stages=2     only the first two stages (ResNet, EfficientNet)
               stem=small   a 3x3 stem at stride 1 without pooling, for images of 28 or 32 pixels (ResNet)
               depth=6, heads=2, patch=8                    layers, heads and pixels of a patch (vit)
               dropout=0.1, stochastic_depth=0.1            probabilities in training (the second not for ResNet)
  timm's names vit_tiny_patch16_224, vit_small_patch16_224, vit_base_patch16_224 are understood.

";

/// Model strings for `attn2d models` to show: each must parse.
const EXAMPLES: [(&str, &str); 9] = [
    ("resnet18", "the plain net"),
    ("resnet18+ga@4", "global attention in stage 4"),
    ("resnet18+la7@3,4", "local attention in stages 3 and 4"),
    ("resnet18+ela7@3+ga@4", "local in stage 3, global in stage 4"),
    ("resnet34+ga@3.5,4:append", "after the last block of stage 3 and all of stage 4"),
    ("resnet18:w16,stem=small+ga@4:heads=4", "a narrow net for small images"),
    ("resnet50+botnet@4", "BoTNet's attention in ResNet50"),
    (
        "efficientnet_b0+ela7@6,7",
        "local attention for the depthwise convolutions of stages 6 and 7",
    ),
    ("vit_ti_16:patch=8", "a transformer of smaller patches"),
];

/// Lists or counts.
///
/// # Errors
/// [`Error::Usage`] for a model string that is not one, no classes or an empty image.
pub fn models(options: &Options) -> Result<()> {
    if let Some(Verb::Describe(options)) = &options.verb {
        return super::describe::describe(options);
    }
    let text = match &options.model {
        None => {
            let list = models::list()?;
            if options.json { pretty(&list_json(&list))? } else { list_text(&list) }
        }
        Some(text) => {
            let classes = options.num_classes.unwrap_or(CLASSES);
            let one = One::new(text, classes, options.img_size.unwrap_or(SIDE))?;
            if options.json { pretty(&one.json())? } else { one.text()? }
        }
    };
    Progress::Lines.line(text.trim_end());
    Ok(())
}

pub(super) fn pretty(value: &Value) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(|e| Error::usage(format!("--json: {e}")))
}

fn list_json(list: &[Listing]) -> Value {
    let row = |l: &Listing| json!({"model": l.name, "parameters": l.parameters, "about": l.about});
    let rows: Vec<Value> = list.iter().map(row).collect();
    json!({"num_classes": CLASSES, "img_size": SIDE, "models": rows})
}

fn list_text(list: &[Listing]) -> String {
    let width = list.iter().map(|l| l.name.len()).max().unwrap_or(0);
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{:width$}  {:>10}  what it is", "model", "parameters");
    for Listing { name, parameters, about } in list {
        let _ = writeln!(out, "{name:width$}  {:>10}  {about}", grouped(*parameters));
    }
    let _ = writeln!(
        out,
        "Parameters with {} classes and images of {SIDE}x{SIDE} pixels; `attn2d models MODEL` counts any other model.\n",
        grouped(CLASSES)
    );
    out += GRAMMAR;
    let width = EXAMPLES.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (i, (name, about)) in EXAMPLES.iter().enumerate() {
        let head = if i == 0 { "examples" } else { "" };
        let _ = writeln!(out, "  {head:11}  {name:width$}  {about}");
    }
    out
}

/// One model, counted.
struct One {
    spec: Spec,
    classes: usize,
    side: usize,
    parts: Vec<PartCount>,
}

impl One {
    fn new(text: &str, classes: usize, side: usize) -> Result<Self> {
        let spec: Spec = text.parse()?;
        let parts = models::count_parts(&spec, classes, (side, side))?;
        Ok(Self { spec, classes, side, parts })
    }

    fn total(&self) -> usize {
        self.parts.iter().map(|p| p.parameters).sum()
    }

    fn json(&self) -> Value {
        let part = |p: &PartCount| (p.part.replace(' ', "_"), Value::from(p.parameters));
        json!({
            "model": self.spec.to_string(),
            "num_classes": self.classes,
            "img_size": self.side,
            "parameters": self.total(),
            "parts": self.parts.iter().map(part).collect::<Map<_, _>>(),
        })
    }

    fn text(&self) -> Result<String> {
        let (total, side) = (self.total(), self.side);
        let mut out = String::new();
        let _ = writeln!(out, "model      {}", self.spec);
        let _ = writeln!(out, "built for  {} classes, images of {side}x{side}", self.classes);
        let _ = writeln!(out, "\n{:10} {:>12}", "part", "parameters");
        let rows = self.parts.iter().map(|p| (p.part.as_str(), p.parameters));
        for (part, parameters) in rows.chain([("total", total)]) {
            let share = 100.0 * parameters as f64 / total as f64;
            let _ = writeln!(out, "{part:10} {:>12}  {share:5.1} %", grouped(parameters));
        }
        if !self.spec.attention.is_empty() {
            let plain = Spec { attention: Vec::new(), ..self.spec.clone() };
            let without = models::count(&plain, self.classes, (side, side))?;
            let change = 100.0 * (total as f64 / without as f64 - 1.0);
            let _ = writeln!(
                out,
                "\nwithout attention, {plain}: {} (so {change:+.1} %)",
                grouped(without)
            );
        }
        Ok(out)
    }
}

/// 11689512 as 11,689,512.
pub(super) fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        for (n, text) in [(7, "7"), (123, "123"), (1000, "1,000"), (11_689_512, "11,689,512")] {
            assert_eq!(grouped(n), text);
        }
    }

    #[test]
    fn the_examples_are_model_strings_in_canonical_form() {
        for (name, _) in EXAMPLES {
            assert_eq!(name.parse::<Spec>().unwrap().to_string(), name);
        }
    }
}
