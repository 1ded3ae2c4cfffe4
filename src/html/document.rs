//! A document as data, shown as a page or as Markdown.

use super::{Table, code, details, escape, facts, grid, list, page, paragraph, table};

/// A piece of a document.
#[derive(Clone, Debug)]
pub enum Block {
    /// A heading below that of the section.
    Heading(String),
    /// A paragraph.
    Text(String),
    /// Points of a list.
    List(Vec<String>),
    /// Names and what they stand for.
    Facts(Vec<(String, String)>),
    /// A table.
    Table(Table),
    /// Charts side by side; Markdown leaves them out.
    Charts(Vec<String>),
    /// Lines for a terminal.
    Code(String),
    /// What is shown when its summary is opened.
    Folded(String, Vec<Block>),
}

/// Blocks under a heading.
#[derive(Clone, Debug)]
pub struct Section {
    /// The heading.
    pub heading: String,
    /// What follows it.
    pub blocks: Vec<Block>,
}

/// The document as one HTML file. Sections without blocks are left out.
pub fn html(title: &str, sections: &[Section]) -> String {
    let filled = sections.iter().filter(|s| !s.blocks.is_empty());
    let body: String =
        filled.map(|s| super::section(&s.heading, &blocks_html(&s.blocks))).collect();
    page(title, &body)
}

fn blocks_html(blocks: &[Block]) -> String {
    let block = |block: &Block| match block {
        Block::Heading(text) => super::subsection(text, ""),
        Block::Text(text) => paragraph(text),
        Block::List(items) => list(items),
        Block::Facts(pairs) => {
            let pairs: Vec<_> = pairs.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            facts(&pairs)
        }
        Block::Table(t) => table(t),
        Block::Charts(charts) => grid(charts),
        Block::Code(text) => code(text),
        Block::Folded(summary, blocks) => details(summary, &blocks_html(blocks)),
    };
    blocks.iter().map(block).collect()
}

/// The document as Markdown.
pub fn markdown(title: &str, sections: &[Section]) -> String {
    let filled = sections.iter().filter(|s| !s.blocks.is_empty());
    let section =
        |s: &Section| format!("\n## {}\n{}", plain(&s.heading), blocks_markdown(&s.blocks));
    format!("# {}\n{}", plain(title), filled.map(section).collect::<String>())
}

fn blocks_markdown(blocks: &[Block]) -> String {
    let items = |items: Vec<String>| items.iter().map(|i| format!("* {i}\n")).collect::<String>();
    let block = |block: &Block| match block {
        Block::Heading(text) => format!("\n### {}\n", plain(text)),
        Block::Text(text) => format!("\n{}\n", plain(text)),
        Block::List(all) => format!("\n{}", items(all.iter().map(|i| plain(i)).collect())),
        Block::Facts(pairs) => {
            let fact =
                |(name, value): &(String, String)| format!("{}: {}", plain(name), plain(value));
            format!("\n{}", items(pairs.iter().map(fact).collect()))
        }
        Block::Table(t) => format!("\n{}", super::markdown(t)),
        Block::Charts(_) => String::new(),
        Block::Code(text) => format!("\n```\n{}\n```\n", text.trim_end()),
        Block::Folded(summary, blocks) => format!(
            "\n<details>\n<summary>{}</summary>\n{}\n</details>\n",
            escape(summary),
            blocks_markdown(blocks)
        ),
    };
    blocks.iter().map(block).collect()
}

/// Text as Markdown shows it: on one line, with what it would read as marks behind a backslash.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\r' => out.push(' '),
            '\\' | '*' | '_' | '`' | '<' | '[' | ']' | '#' => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_document_two_forms() {
        let table = Table {
            caption: "Things".into(),
            head: vec!["name".into(), "ms".into()],
            rows: vec![vec!["a".into(), "1".into()]],
        };
        let blocks = vec![
            Block::Text("a_b <c>".into()),
            Block::List(vec!["one".into(), "two".into()]),
            Block::Charts(vec!["<figure></figure>".into()]),
            Block::Folded("more".into(), vec![Block::Table(table), Block::Code("ls\n".into())]),
        ];
        let sections = [
            Section { heading: "First".into(), blocks },
            Section { heading: "Empty".into(), blocks: Vec::new() },
        ];
        assert_eq!(
            markdown("T", &sections),
            "# T\n\n## First\n\na\\_b \\<c>\n\n* one\n* two\n\n<details>\n<summary>more</summary>\n\n**Things**\n\n\
             | name | ms |\n| --- | --- |\n| a | 1 |\n\n```\nls\n```\n\n</details>\n"
        );
        let html = html("T", &sections);
        assert!(html.contains("<p>a_b &lt;c&gt;</p>") && html.contains("<li>two</li>"), "{html}");
        assert!(html.contains("<figure></figure>") && !html.contains("Empty"), "{html}");
    }
}
