//! A study changed from the command line: `--set KEY=VALUE`, `--only MODEL`.

use serde::Deserialize;
use toml::{Table, Value};

use super::config::Study;
use crate::config::parse_value;
use crate::{Error, Result};

impl Study {
    /// The study with these models alone, and the baselines that they name; with all of them where none are given.
    ///
    /// Errors: `Usage` for a name that no model has.
    pub fn only(mut self, names: &[String]) -> Result<Self> {
        for name in names {
            if !self.models.iter().any(|m| m.name == *name) {
                let known: Vec<&str> = self.models.iter().map(|m| m.name.as_str()).collect();
                return Err(Error::usage(format!(
                    "--only {name:?}: the study's models are {}",
                    known.join(", ")
                )));
            }
        }
        if names.is_empty() {
            return Ok(self);
        }
        let mut kept: Vec<bool> = self.models.iter().map(|m| names.contains(&m.name)).collect();
        for cell in self.cells() {
            if let Some(baseline) =
                self.baseline(cell).filter(|_| names.contains(&self.models[cell.model].name))
            {
                kept[baseline.model] = true;
            }
        }
        let (kept, left): (Vec<_>, Vec<_>) = self.models.into_iter().zip(kept).partition(|m| m.1);
        self.models = kept.into_iter().map(|m| m.0).collect();
        self.left_out = left.into_iter().map(|m| m.0.name).collect();
        // Those whose baseline was the first of all still have it, as the first of those that are left.
        Ok(self)
    }

    /// The study with one value changed.
    pub(super) fn with(&self, assignment: &str) -> Result<Self> {
        let blame =
            |message: &str| Error::usage(format!("--set {assignment}: {}", message.trim_end()));
        let (key, text) =
            assignment.split_once('=').ok_or_else(|| blame("expected key=value, as in seeds=3"))?;
        let mut value = Value::try_from(self).map_err(|e| blame(&e.to_string()))?;
        *slot(&mut value, key.trim()).map_err(|message| blame(&message))? =
            parse_value(text.trim()).unwrap_or_else(|| Value::String(text.trim().to_owned()));
        Self::deserialize(value).map_err(|e| blame(e.message()))
    }
}

/// The place in a study of a dotted key; an entry of a list goes by its name.
fn slot<'a>(value: &'a mut Value, key: &str) -> Result<&'a mut Value, String> {
    match value {
        Value::Table(table) => match key.split_once('.') {
            // Its keys are a run's, dots and all.
            Some(("space", rest)) => {
                match table.entry("space").or_insert_with(|| Value::Table(Table::new())) {
                    Value::Table(space) => Ok(space.entry(rest).or_insert(Value::Boolean(false))),
                    _ => Err("space is no table".into()),
                }
            }
            Some((first, rest)) if !table.contains_key(key) => {
                slot(table.entry(first).or_insert_with(|| Value::Table(Table::new())), rest)
            }
            _ => Ok(table.entry(key).or_insert(Value::Boolean(false))),
        },
        Value::Array(entries) => {
            let name = |entry: &Value| {
                entry.get("name").and_then(Value::as_str).unwrap_or_default().to_owned()
            };
            let names: Vec<String> = entries.iter().map(name).collect();
            let rest_of =
                |name: &String| Some(key.strip_prefix(name.as_str())?.strip_prefix('.')?.len());
            let found = names.iter().position(|name| rest_of(name).is_some());
            let index = found.ok_or_else(|| {
                format!("{key:?} begins with none of the names {}", names.join(", "))
            })?;
            slot(&mut entries[index], &key[names[index].len() + 1..])
        }
        _ => Err(format!("there is no key {key:?} below a value")),
    }
}
