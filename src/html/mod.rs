//! Pages of one file for reports: tables and charts in plain HTML and inline SVG, no script, nothing from outside, light and dark.
//!
//! Functions from data to text; whoever calls them writes the file.

pub mod chart;
pub mod document;
pub mod plot;

/// A table of text. The first column names the row; the others are numbers, set to the right.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// What it shows.
    pub caption: String,
    /// Headings of the columns.
    pub head: Vec<String>,
    /// Cells, as many in a row as there are headings.
    pub rows: Vec<Vec<String>>,
}

/// Text as HTML.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c => out.push(c),
        }
    }
    out
}

/// A whole page around the HTML of its sections.
pub fn page(title: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{body}</main>\n</body>\n</html>\n"
    )
}

/// A section under its heading.
pub fn section(heading: &str, body: &str) -> String {
    format!("<section>\n<h2>{}</h2>\n{body}</section>\n", escape(heading))
}

/// A part of a section under a heading of its own.
pub fn subsection(heading: &str, body: &str) -> String {
    format!("<h3>{}</h3>\n{body}", escape(heading))
}

/// Points of a list.
pub fn list(items: &[String]) -> String {
    let item = |text: &String| format!("<li>{}</li>\n", escape(text));
    format!("<ul>\n{}</ul>\n", items.iter().map(item).collect::<String>())
}

/// A paragraph of text.
pub fn paragraph(text: &str) -> String {
    format!("<p>{}</p>\n", escape(text))
}

/// Lines for a terminal, as they are.
pub fn code(text: &str) -> String {
    format!("<pre><code>{}</code></pre>\n", escape(text))
}

/// Names and what they stand for.
pub fn facts(pairs: &[(&str, &str)]) -> String {
    let pair = |(name, value): &(&str, &str)| {
        format!("<dt>{}</dt><dd>{}</dd>\n", escape(name), escape(value))
    };
    format!("<dl>\n{}</dl>\n", pairs.iter().map(pair).collect::<String>())
}

/// What is shown when its summary is opened.
pub fn details(summary: &str, body: &str) -> String {
    format!("<details>\n<summary>{}</summary>\n{body}</details>\n", escape(summary))
}

/// Charts side by side, as many as the width allows.
pub fn grid(charts: &[String]) -> String {
    format!("<div class=\"grid\">\n{}</div>\n", charts.concat())
}

/// A table in HTML; a wide one scrolls within itself.
pub fn table(table: &Table) -> String {
    let head: String =
        table.head.iter().map(|h| format!("<th scope=\"col\">{}</th>", escape(h))).collect();
    let row = |cells: &Vec<String>| {
        let cell = |(i, text): (usize, &String)| match i {
            0 => format!("<th scope=\"row\">{}</th>", escape(text)),
            _ => format!("<td>{}</td>", escape(text)),
        };
        format!("<tr>{}</tr>\n", cells.iter().enumerate().map(cell).collect::<String>())
    };
    let (caption, rows) = (escape(&table.caption), table.rows.iter().map(row).collect::<String>());
    format!(
        "<div class=\"wide\" tabindex=\"0\" role=\"region\" aria-label=\"{caption}\">\n<table>\n<caption>{caption}</caption>\n\
         <thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    )
}

/// A table in Markdown, under its caption in bold.
pub fn markdown(table: &Table) -> String {
    let line = |cells: &[String]| {
        let cells: Vec<_> = cells.iter().map(|c| one_line(c).replace('|', "\\|")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule = vec!["---".to_string(); table.head.len()];
    let rows: String = table.rows.iter().map(|row| line(row)).collect();
    format!("**{}**\n\n{}{}{rows}", one_line(&table.caption), line(&table.head), line(&rule))
}

/// Text in a line of Markdown, without tags of HTML.
fn one_line(text: &str) -> String {
    text.replace('<', "&lt;").replace(['\n', '\r'], " ")
}

/// A table for a terminal.
pub fn aligned(table: &Table) -> String {
    let lines = || std::iter::once(&table.head).chain(&table.rows);
    let width = |i: usize| lines().filter_map(|l| l.get(i)).map(|c| c.chars().count()).max();
    let line = |cells: &Vec<String>| {
        let cell = |(i, text): (usize, &String)| {
            let width = width(i).unwrap_or(0);
            if i == 0 { format!("{text:<width$}") } else { format!("{text:>width$}") }
        };
        cells.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ").trim_end().to_string()
            + "\n"
    };
    format!("{}\n{}", table.caption, lines().map(line).collect::<String>())
}

/// Colours are told apart without colour too: every chart also differs in marks and has its numbers in a table.
const STYLE: &str = r#":root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --faint: #5b6370; --rule: #d5d9df; --raised: #f4f6f8;
  --a: #0b5cad; --b: #b3530a; --c: #1a7f4b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e6e9ed; --faint: #a3abb6; --rule: #383e47; --raised: #1d2126;
    --a: #6db3f2; --b: #f0a35e; --c: #6fcf97;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--rule); padding-bottom: .25rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
p { max-width: 48rem; margin: .5rem 0; overflow-wrap: anywhere; }
ul { max-width: 48rem; margin: .5rem 0; padding-left: 1.25rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .5rem 0; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--raised); padding: .75rem 1rem; overflow-x: auto; border-radius: 4px; font-size: .875rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--a); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .35rem; white-space: nowrap; }
th, td { padding: .2rem .65rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
thead th { color: var(--faint); font-weight: 600; }
th:first-child { text-align: left; }
tbody th { font-weight: 400; white-space: normal; min-width: 9rem; max-width: 22rem; overflow-wrap: break-word; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem 1.5rem; margin: 1rem 0; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .title { font-size: 14px; font-weight: 600; }
svg .faint { fill: var(--faint); }
svg .axis { stroke: var(--rule); stroke-width: 1; fill: none; }
svg .a { fill: var(--a); stroke: var(--a); } svg .b { fill: var(--b); stroke: var(--b); } svg .c { fill: var(--c); stroke: var(--c); }
svg .hollow { fill: var(--paper); stroke-width: 1.5; }
svg .line { fill: none; stroke-width: 1.5; }
svg .seed { fill-opacity: .35; stroke-width: 1; }
svg .thin { stroke-width: 1; opacity: .35; stroke-dasharray: none; }
svg .bold { stroke-width: 2.5; }
svg .cell { stroke: none; }
svg .small { font-size: 10px; }
svg .whisker { stroke-width: 1.5; opacity: .75; }
svg .b.line { stroke-dasharray: 6 3; } svg .c.line { stroke-dasharray: 2 3; }
@media (max-width: 40rem) { main { padding: 1rem .75rem; } }
@media print { main { max-width: none; } details { display: block; } }
"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Table {
        let text = |words: &[&str]| words.iter().map(|w| w.to_string()).collect::<Vec<_>>();
        let rows = vec![text(&["a|b", "1"]), text(&["<c>", "22"])];
        Table { caption: "Things & others".into(), head: text(&["name", "ms"]), rows }
    }

    #[test]
    fn a_table_in_three_forms() {
        assert_eq!(
            markdown(&small()),
            "**Things & others**\n\n| name | ms |\n| --- | --- |\n| a\\|b | 1 |\n| &lt;c> | 22 |\n"
        );
        assert_eq!(aligned(&small()), "Things & others\nname  ms\na|b    1\n<c>   22\n");
        let html = table(&small());
        assert!(html.contains("<caption>Things &amp; others</caption>"), "{html}");
        assert!(html.contains("<th scope=\"row\">&lt;c&gt;</th><td>22</td>"), "{html}");
    }

    #[test]
    fn a_page_stands_alone() {
        let page = page("A \"title\"", &section("One", &paragraph("1 < 2")));
        assert!(page.contains("<title>A &quot;title&quot;</title>") && page.contains("1 &lt; 2"));
        for word in ["http", "src=", "@import", "<script"] {
            assert!(!page.contains(word), "{word}");
        }
    }
}
