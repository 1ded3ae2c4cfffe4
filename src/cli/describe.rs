//! `attn2d models describe`: every layer of a model, and plain nets of its size.

use std::fmt::Write;

use clap::Args;
use serde_json::{Value, json};

use super::models::{CLASSES, SIDE, grouped, pretty};
use crate::Result;
use crate::models::{self, Matched, Spec};
use crate::nn::Layer;
use crate::train::Progress;

const HELP: &str = "Examples:
  attn2d models describe resnet18+la7@3,4
  attn2d models describe vit_ti_16 --num-classes 2 --img-size 96 --json

Counts are for one image. FLOPs are those of the products, a multiply-add counted as two; norms, activations, softmax and pooling
are not counted. A star marks attention.";

/// Every layer of a model: output size, parameters, FLOPs; and plain nets of its size
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct Options {
    /// A model string, such as resnet18+ga@4
    #[arg(value_name = "MODEL")]
    model: String,
    /// Classes
    #[arg(long, value_name = "N", default_value_t = CLASSES)]
    num_classes: usize,
    /// Height and width of the images in pixels
    #[arg(long, value_name = "N", default_value_t = SIDE)]
    img_size: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Prints the table.
pub(super) fn describe(options: &Options) -> Result<()> {
    let spec: Spec = options.model.parse()?;
    let image = (options.img_size, options.img_size);
    let layers = models::layers(&spec, options.num_classes, image)?;
    let matched = models::matched(&spec, options.num_classes, image)?;
    let text = if options.json {
        pretty(&table_json(options, &spec, &layers, &matched))?
    } else {
        table(options, &spec, &layers, &matched)
    };
    Progress::Lines.line(text.trim_end());
    Ok(())
}

fn total(layers: &[Layer]) -> (usize, f64) {
    (layers.iter().map(|l| l.parameters).sum(), layers.iter().map(|l| l.flop).sum())
}

/// Whether a layer is one of an attention: the scores and sums themselves, or what projects to and from them.
fn is_attention(layer: &Layer) -> bool {
    let parts = ["attn", "self_attention"];
    layer.pairs > 0.0 || layer.name.split('.').any(|part| parts.contains(&part))
}

fn size(output: &[usize]) -> String {
    output.iter().map(usize::to_string).collect::<Vec<_>>().join("x")
}

/// 3628146688 as 3,628.1 M.
fn millions(flop: f64) -> String {
    if flop == 0.0 {
        return String::new();
    }
    let tenths = (flop / 1e5).round() as usize;
    format!("{}.{} M", grouped(tenths / 10), tenths % 10)
}

fn table(options: &Options, spec: &Spec, layers: &[Layer], matched: &[Matched]) -> String {
    let width = |f: &dyn Fn(&Layer) -> usize| layers.iter().map(f).max().unwrap_or(0);
    let (names, kinds) = (width(&|l| l.name.len()), width(&|l| l.kind.len()));
    let (classes, side) = (options.num_classes, options.img_size);
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(out, "model      {spec}");
    let _ = writeln!(out, "built for  {classes} classes, images of {side}x{side}\n");
    let mut row = |mark: &str, name: &str, kind: &str, output: &str, params: &str, flop: &str| {
        let line =
            format!("{mark:1} {name:names$}  {kind:kinds$}  {output:>12} {params:>12} {flop:>12}");
        let _ = writeln!(out, "{}", line.trim_end());
    };
    row("", "layer", "kind", "output", "parameters", "FLOPs");
    for l in layers {
        let mark = if is_attention(l) { "*" } else { "" };
        let parameters = if l.parameters == 0 { String::new() } else { grouped(l.parameters) };
        row(mark, &l.name, &l.kind, &size(&l.output), &parameters, &millions(l.flop));
    }
    let (parameters, flop) = total(layers);
    row("", "total", "", "", &grouped(parameters), &millions(flop));
    let ours: Vec<Layer> = layers.iter().filter(|l| is_attention(l)).cloned().collect();
    if !ours.is_empty() {
        let (parameters, flop) = total(&ours);
        row("*", "attention", "", "", &grouped(parameters), &millions(flop));
    }
    let _ = writeln!(out, "\nplain nets of its size");
    let width = matched.iter().map(|m| m.spec.to_string().len()).max().unwrap_or(0);
    for Matched { spec, parameters: theirs } in matched {
        let change = 100.0 * (*theirs as f64 / parameters as f64 - 1.0);
        let name = spec.to_string();
        let _ = writeln!(out, "  {name:width$}  {:>12}  {change:+.1} %", grouped(*theirs));
    }
    out
}

fn table_json(options: &Options, spec: &Spec, layers: &[Layer], matched: &[Matched]) -> Value {
    let layer = |l: &Layer| {
        json!({
            "name": l.name,
            "kind": l.kind,
            "output": l.output,
            "parameters": l.parameters,
            "flop": l.flop,
            "attention": is_attention(l),
        })
    };
    let baseline = |m: &Matched| json!({"model": m.spec.to_string(), "parameters": m.parameters});
    let (parameters, flop) = total(layers);
    json!({
        "model": spec.to_string(),
        "num_classes": options.num_classes,
        "img_size": options.img_size,
        "layers": layers.iter().map(layer).collect::<Vec<_>>(),
        "parameters": parameters,
        "flop": flop,
        "size_matched": matched.iter().map(baseline).collect::<Vec<_>>(),
    })
}
