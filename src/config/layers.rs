//! Layers of settings, put on top of each other as TOML tables and checked against the keys that exist.

use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use super::Config;
use crate::{Error, Result};

/// One value from a flag: the dotted key, the value, and the words of the command line to blame.
pub type Setting = (&'static str, Value, &'static str);

/// Defaults, then whatever is laid over them.
#[derive(Debug, Clone)]
pub struct Layers {
    table: Table,
}

impl Default for Layers {
    fn default() -> Self {
        Self::new()
    }
}

impl Layers {
    /// The defaults.
    pub fn new() -> Self {
        Self { table: table_of(&Config::default()) }
    }

    /// Starts from a config that stands already (a run to resume).
    pub fn from_config(config: &Config) -> Self {
        Self { table: table_of(config) }
    }

    /// Lays a file over what is there. Errors name the file, the line, and for an unknown key the nearest known one.
    pub fn file(&mut self, path: &Path) -> Result<()> {
        let text = read(path)?;
        let document =
            DeTable::parse(&text).map_err(|e| blame(path, &text, e.span(), e.message()))?;
        if let Some((key, span)) = unknown_key(document.get_ref(), &self.table, "") {
            return Err(blame(path, &text, Some(span), &unknown(&key, &self.table)));
        }
        // Read on its own first, because only this reader knows on which line a value of the wrong type stands.
        parse::<Config>(path, &text)?;
        merge(&mut self.table, parse(path, &text)?);
        Ok(())
    }

    /// Lays a table of a run's sections over what is there; `what` names it in errors.
    pub fn table(&mut self, what: &str, over: &Table) -> Result<()> {
        for key in keys(over) {
            // A key whose name has a dot is two keys in TOML; as one it is nothing that is known here.
            let value = get(over, &key)
                .ok_or_else(|| Error::usage(format!("{what}: unknown key `{key}`")))?;
            self.value(&key, value.clone(), what)?;
        }
        Ok(())
    }

    /// Lays the value of one key over what is there; `blame` names in errors where it comes from.
    pub fn value(&mut self, key: &str, value: Value, blame: &str) -> Result<()> {
        self.assign(key, value, blame)
    }

    /// Lays the value of a flag over what is there.
    pub fn flag(&mut self, (key, value, flag): Setting) -> Result<()> {
        self.assign(key, value, flag)
    }

    /// Lays `a.b=c` over what is there. The value takes the type of the key: `lr=1e-2`, `name=resnet18`, `betas=[0.9,0.99]`.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let blame = format!("--set {assignment}");
        let Some((key, text)) = assignment.split_once('=') else {
            return Err(Error::usage(format!("{blame}: expected key=value, as in optim.lr=0.01")));
        };
        let (key, text) = (key.trim(), text.trim());
        let value = match get(&self.table, key) {
            None | Some(Value::Table(_)) => {
                return Err(Error::usage(format!("{blame}: {}", unknown(key, &self.table))));
            }
            // A string needs no quotes, but may have them.
            Some(Value::String(_)) => Value::String(unquote(text).to_owned()),
            Some(_) => parse_value(text).ok_or_else(|| {
                Error::usage(format!(
                    "{blame}: {text:?} is not a TOML value (a number, true, false or a list)"
                ))
            })?,
        };
        self.assign(key, value, &blame)
    }

    /// The finished, checked config.
    pub fn finish(self) -> Result<Config> {
        let config = Config::deserialize(self.table)
            .map_err(|e| Error::usage(format!("config: {}", e.message().trim_end())))?;
        config.check()?;
        Ok(config)
    }

    fn assign(&mut self, key: &str, value: Value, blame: &str) -> Result<()> {
        let mut trial = self.table.clone();
        *slot(&mut trial, key)
            .ok_or_else(|| Error::usage(format!("{blame}: {}", unknown(key, &self.table))))? =
            value;
        Config::deserialize(trial.clone())
            .map_err(|e| Error::usage(format!("{blame}: {key}: {}", e.message().trim_end())))?;
        self.table = trial;
        Ok(())
    }
}

/// Reads a TOML file into anything. Errors (exit code 2) name the file and the line.
pub fn parse_file<T: DeserializeOwned>(path: &Path) -> Result<T> {
    parse(path, &read(path)?)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::io(path, e))
}

fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    toml::from_str(text).map_err(|e| blame(path, text, e.span(), e.message()))
}

/// An error that names the file and the line in it.
fn blame(path: &Path, text: &str, span: Option<Range<usize>>, message: &str) -> Error {
    let at = span.map_or(0, |s| s.start).min(text.len());
    let line = text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1;
    Error::usage(format!("{}:{line}: {}", path.display(), message.trim_end()))
}

/// A config as a table with every key present.
pub(super) fn table_of(config: &Config) -> Table {
    Table::try_from(config).expect("a plain struct of numbers and strings is always a table")
}

/// All dotted keys of a table.
pub(super) fn keys(table: &Table) -> Vec<String> {
    let mut out = Vec::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) => out.extend(keys(inner).iter().map(|k| format!("{key}.{k}"))),
            _ => out.push(key.clone()),
        }
    }
    out
}

/// The value at a dotted key.
pub(super) fn get<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        None => table.get(key),
        Some((section, rest)) => get(table.get(section)?.as_table()?, rest),
    }
}

/// Takes a dotted key out, if it is there.
pub(super) fn remove(table: &mut Table, key: &str) {
    match key.split_once('.') {
        None => {
            table.remove(key);
        }
        Some((section, rest)) => {
            if let Some(inner) = table.get_mut(section).and_then(Value::as_table_mut) {
                remove(inner, rest);
            }
        }
    }
}

fn slot<'a>(table: &'a mut Table, key: &str) -> Option<&'a mut Value> {
    match key.split_once('.') {
        None => table.get_mut(key),
        Some((section, rest)) => slot(table.get_mut(section)?.as_table_mut()?, rest),
    }
}

fn merge(under: &mut Table, over: Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(value)) => merge(inner, value),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

/// The first key of a document that the known table does not have, with its place in the text.
fn unknown_key(
    document: &DeTable<'_>,
    known: &Table,
    prefix: &str,
) -> Option<(String, Range<usize>)> {
    let mut first: Option<(String, Range<usize>)> = None;
    for (key, value) in document {
        let name = format!("{prefix}{}", key.get_ref());
        let found = match (known.get(key.get_ref().as_ref()), Spanned::get_ref(value)) {
            (None, _) => Some((name, key.span())),
            (Some(Value::Table(inner)), DeValue::Table(table)) => {
                unknown_key(table, inner, &format!("{name}."))
            }
            _ => None,
        };
        // Tables are sorted by name; the reader wants the first in the file.
        if let Some(found) = found
            && first.as_ref().is_none_or(|f| found.1.start < f.1.start)
        {
            first = Some(found);
        }
    }
    first
}

/// "unknown key `optim.lrr`; did you mean `optim.lr`?"
fn unknown(key: &str, known: &Table) -> String {
    if let Some(Value::Table(section)) = get(known, key) {
        let inside = keys(section).join("`, `");
        return format!("`{key}` is a section, set one of its keys: `{inside}`");
    }
    let last = |k: &str| k.rsplit('.').next().unwrap_or_default().to_owned();
    // Compare whole names, and also last parts, so that `lr` and `train.lr` both find `optim.lr`.
    let score = |candidate: &str| {
        let whole = strsim::normalized_damerau_levenshtein(key, candidate);
        let parts = strsim::normalized_damerau_levenshtein(&last(key), &last(candidate));
        whole.max(parts - 0.05)
    };
    let mut candidates = keys(known);
    candidates.extend(known.keys().filter(|_| !key.contains('.')).cloned());
    let best = candidates.iter().max_by(|a, b| score(a).total_cmp(&score(b)));
    match best {
        Some(best) if score(best) > 0.4 => format!("unknown key `{key}`; did you mean `{best}`?"),
        _ => {
            let sections: Vec<_> = known.keys().cloned().collect();
            format!("unknown key `{key}`; the sections are `{}`", sections.join("`, `"))
        }
    }
}

/// A TOML value on its own; `None` where it is none.
pub fn parse_value(text: &str) -> Option<Value> {
    format!("value = {text}").parse::<Table>().ok()?.remove("value")
}

fn unquote(text: &str) -> &str {
    let quoted = |q: char| text.strip_prefix(q).and_then(|t| t.strip_suffix(q));
    quoted('"').or_else(|| quoted('\'')).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::OptimName;

    fn from_file(text: &str) -> Result<Config> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("run.toml");
        std::fs::write(&path, text).expect("a file");
        Config::load(&path)
    }

    fn set(assignment: &str) -> Result<Config> {
        let mut layers = Layers::new();
        layers.set(assignment)?;
        layers.finish()
    }

    #[test]
    fn later_layers_win() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("run.toml");
        std::fs::write(&path, "[optim]\nlr = 1\nmomentum = 0.5\n[augment]\npolicy = \"custom\"\n[augment.custom]\nhflip = false\n")
            .expect("a file");
        let mut layers = Layers::new();
        layers.file(&path).expect("a good file");
        layers.flag(("optim.lr", Value::Float(2.0), "--lr 2")).expect("a good flag");
        layers.flag(("train.epochs", Value::Integer(9), "--epochs 9")).expect("a good flag");
        layers.set("optim.lr=3").expect("a good assignment");
        let config = layers.finish().expect("a good config");
        assert_eq!(config.optim.lr, 3.0);
        assert_eq!(config.optim.momentum, 0.5);
        assert_eq!(config.train.epochs, 9);
        assert!(!config.augment.custom.hflip);
        assert!(config.augment.custom.vflip, "keys that the file leaves out keep their default");
    }

    #[test]
    fn unknown_keys_name_file_line_and_the_nearest_key() {
        let error = from_file("[train]\nepochs = 3\n\n[optim]\nlearn_rate = 1\nweight_dcay = 2\n")
            .expect_err("two unknown keys");
        assert!(
            error.to_string().contains("run.toml:5: unknown key `optim.learn_rate`"),
            "{error}"
        );
        let error = from_file("[optim]\nweight_dcay = 2\n").expect_err("an unknown key");
        assert!(
            error.to_string().ends_with(
                "run.toml:2: unknown key `optim.weight_dcay`; did you mean `optim.weight_decay`?"
            ),
            "{error}"
        );
        assert_eq!(error.exit_code(), 2);
        let error = from_file("[optm]\nlr = 2\n").expect_err("an unknown section");
        assert!(error.to_string().contains("did you mean `optim`?"), "{error}");
    }

    #[test]
    fn wrong_types_and_syntax_name_file_and_line() {
        let error = from_file("[train]\nepochs = \"ten\"\n").expect_err("a string for a number");
        assert!(error.to_string().contains("run.toml:2: invalid type: string \"ten\""), "{error}");
        let error = from_file("[optim]\n\nname = \"sdg\"\n").expect_err("no such optimiser");
        assert!(error.to_string().contains("run.toml:3: unknown variant `sdg`"), "{error}");
        let error = from_file("[optim\nlr = 1\n").expect_err("an open bracket");
        assert!(error.to_string().contains("run.toml:1: "), "{error}");
        assert!(!error.to_string().contains('\n'), "one line: {error}");
        let error = Config::load(Path::new("no/such.toml")).expect_err("no file");
        assert!(error.to_string().starts_with("no/such.toml: "), "{error}");
    }

    #[test]
    fn assignments_take_the_type_of_their_key() {
        assert_eq!(set("optim.lr=1").expect("an integer will do").optim.lr, 1.0);
        assert_eq!(set("optim.betas=[0.8, 0.99]").expect("a list").optim.betas, [0.8, 0.99]);
        assert_eq!(set("model.name=resnet34").expect("a bare word").model.name, "resnet34");
        assert_eq!(set("model.name=\"18\"").expect("quotes").model.name, "18");
        assert_eq!(set("data.path=a=b").expect("a path with =").data.path, "a=b");
        assert_eq!(set("optim.name=sgd").expect("a choice").optim.name, OptimName::Sgd);
        assert!(set("data.skip_bad=true").expect("a boolean").data.skip_bad);
    }

    #[test]
    fn bad_assignments_say_what_is_wrong() {
        let cases = [
            ("optim.lrr=1", "--set optim.lrr=1: unknown key `optim.lrr`; did you mean `optim.lr`?"),
            ("lr=1", "did you mean `optim.lr`?"),
            ("train.lr=1", "did you mean `optim.lr`?"),
            ("optim.lr", "expected key=value"),
            ("optim=1", "`optim` is a section, set one of its keys: `"),
            ("optim.lr=fast", "\"fast\" is not a TOML value"),
            ("train.epochs=2.5", "train.epochs: invalid type: floating point"),
            ("train.epochs=-1", "--set train.epochs=-1: train.epochs: "),
            ("optim.name=sdg", "unknown variant `sdg`"),
            ("zzzzzz=1", "the sections are `augment`, `data`, `model`"),
        ];
        for (assignment, expected) in cases {
            let error = set(assignment).expect_err(assignment);
            assert!(error.to_string().contains(expected), "{assignment}: {error}");
            assert!(!error.to_string().contains('\n'), "one line: {error}");
            assert_eq!(error.exit_code(), 2, "{error}");
        }
    }
}
