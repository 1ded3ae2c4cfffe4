//! WGSL texts for tensors in f16, made from those for f32: what is bound as [`Element::Stored`] becomes an array of `f16`, each read of it
//! is widened and each write rounded, so that all arithmetic stays in f32. WGSL has neither macros nor types as parameters; one text that
//! is rewritten keeps both precisions the same kernel.
//!
//! The texts keep to what this reads: storage variables are `array<f32>` or `array<vec4f>` (or `vec2f`) and always indexed where they
//! are used, and are assigned to in statements of their own.

use crate::kernel::{Element, Kernel};
use crate::tensor::DType;

/// A storage variable whose numbers are 16 bits wide.
struct Half<'a> {
    name: &'a str,
    /// Components of an element: 1, 2 or 4.
    wide: usize,
}

impl Half<'_> {
    fn stored(&self) -> &'static str {
        ["f16", "vec2h", "vec4h"][self.wide / 2]
    }

    fn widened(&self) -> &'static str {
        ["f32", "vec2f", "vec4f"][self.wide / 2]
    }
}

/// What a text begins the part with that adapters without subgroups do not get.
const SUBGROUPS: &str = "// subgroups:";

/// The whole text of a kernel's shader, the common part first, for tensors stored as `stored` (f32 or f16).
pub(crate) fn source(kernel: &Kernel, stored: DType, subgroups: bool) -> String {
    let base = kernel.wgsl.split(SUBGROUPS).next().unwrap_or_default();
    let own = if subgroups { kernel.wgsl } else { base };
    let text = format!("{}\n{own}", include_str!("../../shaders/common.wgsl"));
    if stored == DType::F16 { in_f16(kernel, &text) } else { text }
}

/// The text of a kernel's shader for tensors in f16. Every variable at the binding of a `Stored` tensor is rewritten, also those that other
/// kernels of the text have there, so the text stays whole.
fn in_f16(kernel: &Kernel, text: &str) -> String {
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let text: String = lines.flat_map(|line| [line, "\n"]).collect();
    let (mut head, mut halves) = (String::from("enable f16;\n"), Vec::new());
    for line in text.lines() {
        match variable(kernel, line) {
            Some(half) => {
                let array = line.rfind("array<").unwrap_or(line.len());
                head += &format!("{}array<{}>;\n", &line[..array], half.stored());
                halves.push(half);
            }
            None => head += &format!("{line}\n"),
        }
    }
    statements(&head, &halves)
}

/// The variable that a line declares, where it is to have 16 bits.
fn variable<'a>(kernel: &Kernel, line: &'a str) -> Option<Half<'a>> {
    let (binding, rest) = line.split_once("@binding(")?.1.split_once(')')?;
    let index = binding.parse::<usize>().ok()?.checked_sub(1)?;
    let stored = kernel.bindings.get(index).is_some_and(|b| b.2 == Element::Stored);
    let (_, declared) = rest.split_once("var<storage").filter(|_| stored)?;
    let (name, element) = declared.split_once('>')?.1.split_once(": array<")?;
    let wide = match element.trim_end_matches([';', '>', ' ']) {
        "f32" => 1,
        "vec2f" => 2,
        "vec4f" => 4,
        _ => return None,
    };
    Some(Half { name: name.trim(), wide })
}

/// Rewrites every use of the variables.
fn statements(text: &str, halves: &[Half<'_>]) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((at, half)) = first_use(rest, halves) {
        out += &rest[..at];
        let Some(end) = closing(rest, at + half.name.len()) else { break };
        let index = statements(&rest[at + half.name.len() + 1..end - 1], halves);
        let element = format!("{}[{index}]", half.name);
        let after = &rest[end..];
        let part = component(after);
        let to = if part.is_empty() { half.stored() } else { "f16" };
        let assigned = after[part.len()..].trim_start();
        let operator = assigned.find('=').map(|equals| &assigned[..equals]);
        match operator.filter(|_| !assigned.starts_with("==")) {
            Some(operator) if operator.is_empty() || ["+", "-", "*", "/"].contains(&operator) => {
                let value = &assigned[operator.len() + 1..];
                let stop = value.find(';').unwrap_or(value.len());
                let value_of = statements(value[..stop].trim(), halves);
                let old = format!("{}({element}){part} {operator} ", half.widened());
                let old = if operator.is_empty() { "" } else { &old };
                out += &format!("{element}{part} = {to}({old}({value_of}))");
                rest = &value[stop..];
            }
            _ => {
                out += &format!("{}({element})", half.widened());
                rest = after;
            }
        }
    }
    out + rest
}

/// Where a variable is indexed first.
fn first_use<'h>(text: &str, halves: &'h [Half<'h>]) -> Option<(usize, &'h Half<'h>)> {
    let of_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
    let uses = halves.iter().filter_map(|half| {
        let mut found = text.match_indices(half.name);
        let at = found.find(|(at, name)| {
            let free = !text[..*at].ends_with(of_name);
            free && text[at + name.len()..].starts_with('[')
        });
        at.map(|(at, _)| (at, half))
    });
    uses.min_by_key(|(at, _)| *at)
}

/// Behind the bracket that closes the one at `open`.
fn closing(text: &str, open: usize) -> Option<usize> {
    let mut depth = 0;
    for (i, c) in text[open..].char_indices() {
        match c {
            '[' => depth += 1,
            ']' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(open + i + 1);
        }
    }
    None
}

/// `.x`, or `[i]`, at the beginning of a text: the component of an element that is meant.
fn component(text: &str) -> &str {
    let end = match text.chars().next() {
        Some('.') => text[1..].find(|c: char| !c.is_ascii_alphabetic()).map(|n| n + 1),
        Some('[') => closing(text, 0),
        _ => Some(0),
    };
    &text[..end.unwrap_or(text.len())]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Access, F32, Plan, Stored};

    static KERNEL: Kernel = Kernel {
        name: "k_f32",
        bindings: &[
            ("x", Access::Read, Stored),
            ("w", Access::Read, F32),
            ("y", Access::Write, Stored),
        ],
        cpu: |_| {},
        wgsl: "",
        cuda: None,
        plan: |_, _| Plan::items(1, 1),
    };

    #[test]
    fn adapters_without_subgroups_do_not_get_what_needs_them() {
        let kernel = Kernel { wgsl: "base\n// subgroups: more\nwide\n", ..KERNEL };
        assert!(source(&kernel, DType::F32, true).ends_with("base\n// subgroups: more\nwide\n"));
        assert!(source(&kernel, DType::F32, false).ends_with("base\n"));
    }

    #[test]
    fn reads_are_widened_and_writes_rounded() {
        let text = "\
@group(0) @binding(1) var<storage, read> x: array<vec4f>; // x[
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
    y[i] = w[i] * x[at[i] / 4u].x + y[x2[i]];
    if x[0].y == 1.0 { y[i + 1u] += dot(x[i], x[j]); }
    p.x[i] = xy[i];
";
        let expected = "enable f16;
@group(0) @binding(1) var<storage, read> x: array<vec4h>; 
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f16>;
    y[i] = f16((w[i] * vec4f(x[at[i] / 4u]).x + f32(y[x2[i]])));
    if vec4f(x[0]).y == 1.0 { y[i + 1u] = f16(f32(y[i + 1u]) + (dot(vec4f(x[i]), vec4f(x[j])))); }
    p.x[i] = xy[i];
";
        assert_eq!(in_f16(&KERNEL, text).replace("; \n", ";\n"), expected.replace("; \n", ";\n"));
    }
}
