//! What a search draws from, and the drawing.

use serde::{Deserialize, Serialize};
use toml::Value;

use crate::config::{Config, Layers};
use crate::data::Draws;
use crate::{Error, Result};

/// What a key's value is drawn from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Space {
    /// One of these, each as likely.
    Choice(Vec<Value>),
    /// A number between two.
    Range(Range),
}

/// A number between two.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// The least.
    pub from: f64,
    /// The most.
    pub to: f64,
    /// Uniform in the logarithm.
    #[serde(default)]
    pub log: bool,
}

impl Space {
    /// The value at `u` in 0..1. Numbers have three significant digits: what is written down is what was used.
    fn at(&self, u: f64) -> Value {
        match self {
            Self::Choice(values) => {
                values[((u * values.len() as f64) as usize).min(values.len() - 1)].clone()
            }
            Self::Range(Range { from, to, log }) => {
                let value = if *log {
                    (from.ln() + u * (to.ln() - from.ln())).exp()
                } else {
                    from + u * (to - from)
                };
                let rounded: f64 = format!("{value:.2e}").parse().unwrap_or(value);
                Value::Float(rounded.clamp(*from, *to))
            }
        }
    }

    /// Whether there are lists to choose from.
    pub(super) fn has_lists(&self) -> bool {
        matches!(self, Self::Choice(values) if values.iter().any(|v| v.is_array() || v.is_table()))
    }

    /// Refuses a space that `key` cannot be drawn from.
    pub(super) fn check(&self, key: &str, config: &Config) -> Result<()> {
        let fail =
            |message: String| Err(Error::usage(format!("[search.space] {key:?}: {message}")));
        const FIXED: [&str; 5] =
            ["model.name", "train.epochs", "train.seed", "train.device", "output.dir"];
        if FIXED.contains(&key) || (key.starts_with("data.") && !is_a_matter_of_the_run(key)) {
            let message =
                "is not for a search to change (models are searched by a list as their spec)";
            return fail(message.into());
        }
        let values = match self {
            Self::Choice(values) if values.is_empty() => return fail("is an empty list".into()),
            Self::Choice(values) => values.clone(),
            Self::Range(Range { from, to, log }) => {
                if !(from.is_finite() && to.is_finite() && from < to && (!log || *from > 0.0)) {
                    return fail(format!(
                        "from = {from}, to = {to}: expected from below to, and with log = true above 0"
                    ));
                }
                vec![Value::Float(*from), Value::Float(*to)]
            }
        };
        values.into_iter().try_for_each(|value| set(config, key, value).map(|_| ()))
    }
}

/// Whether a key of `[data]` says how a run looks at its images, and not which images there are and in which part, which are the same for all
/// models on a data set.
pub(super) fn is_a_matter_of_the_run(key: &str) -> bool {
    ["data.img_size", "data.normalize", "data.class_weights", "data.workers", "data.cache_mib"]
        .contains(&key)
}

/// A drawn setting: keys and values, and which of its model's strings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// Keys of a run's config and their values.
    pub values: Vec<(String, Value)>,
    /// The model string.
    pub spec: String,
}

impl Setting {
    /// Keys and values on a line: `optim.lr = 0.00321, augment.policy = "flips"`.
    pub fn text(&self) -> String {
        let pairs = self.values.iter().map(|(key, value)| format!("{key} = {value}"));
        pairs.collect::<Vec<_>>().join(", ")
    }
}

/// Draws setting number `index` of a search.
///
/// It depends on seed, number and key alone: every model on every data set tries the same values, and a key more or less leaves the others as
/// they were. Model strings are drawn by turns through the list in random order, so that each is tried as often as any other.
pub(super) fn draw<'a>(
    seed: u64,
    index: usize,
    space: impl IntoIterator<Item = (&'a String, &'a Space)>,
    specs: &[String],
) -> Setting {
    let of = |key: &str, index: usize| {
        f64::from(Draws::new(&[seed, name_number(key), index as u64]).unit())
    };
    let values =
        space.into_iter().map(|(key, space)| (key.clone(), space.at(of(key, index)))).collect();
    let round = index / specs.len().max(1) * specs.len();
    let mut order: Vec<usize> = (0..specs.len()).collect();
    order.sort_by(|&a, &b| of("model.name", round + a).total_cmp(&of("model.name", round + b)));
    Setting { values, spec: specs[order[index - round]].clone() }
}

/// A number for a name: the first bytes of its SHA-256.
pub(super) fn name_number(name: &str) -> u64 {
    use sha2::{Digest, Sha256};
    Sha256::digest(name).iter().take(8).fold(0, |n, &byte| n << 8 | u64::from(byte))
}

/// A config with one key set.
pub(super) fn set(config: &Config, key: &str, value: Value) -> Result<Config> {
    let mut layers = Layers::from_config(config);
    layers.value(key, value, "[search.space]")?;
    layers.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(text: &str) -> Space {
        toml::from_str::<std::collections::BTreeMap<String, Space>>(text)
            .unwrap()
            .remove("x")
            .unwrap()
    }

    #[test]
    fn numbers_lie_in_their_range_and_choices_are_even() {
        let (log, plain) = (
            space("x = { from = 1e-4, to = 0.1, log = true }"),
            space("x = { from = 0.0, to = 0.1 }"),
        );
        assert_eq!(log.at(0.0), Value::Float(1e-4));
        assert_eq!(log.at(1.0), Value::Float(0.1));
        assert_eq!(log.at(1.0 / 3.0), Value::Float(1e-3));
        assert_eq!(plain.at(0.25), Value::Float(0.025));
        let choice = space("x = [\"a\", \"b\", \"c\"]");
        let at = |u: f64| choice.at(u).as_str().unwrap().to_owned();
        assert_eq!([at(0.0), at(0.34), at(0.99), at(1.0)], ["a", "b", "c", "c"]);
    }

    #[test]
    fn draws_depend_on_seed_number_and_key_alone() {
        let keys = ["optim.lr".to_owned(), "optim.weight_decay".to_owned()];
        let range = space("x = { from = 1e-4, to = 0.1, log = true }");
        let both = |seed, index| draw(seed, index, keys.iter().map(|k| (k, &range)), &["m".into()]);
        let one = draw(0, 5, keys[1..].iter().map(|k| (k, &range)), &["m".into()]);
        assert_eq!(both(0, 5).values[1], one.values[0], "a key less changes nothing for the other");
        assert_ne!(both(0, 5).values[0].1, both(0, 5).values[1].1);
        assert_ne!(both(0, 5), both(0, 6));
        assert_ne!(both(0, 5), both(1, 5));
        let logs: Vec<f64> =
            (0..400).map(|i| both(0, i).values[0].1.as_float().unwrap().log10()).collect();
        let mean = logs.iter().sum::<f64>() / 400.0;
        assert!((mean + 2.5).abs() < 0.15, "uniform in the logarithm over -4..-1: {mean}");
        let least = logs.iter().copied().fold(0.0, f64::min);
        assert!(least < -3.9, "{least}");
    }

    #[test]
    fn every_model_string_is_tried_as_often() {
        let specs = ["a", "b", "c"].map(String::from);
        let drawn: Vec<String> = (0..300).map(|i| draw(3, i, [], &specs).spec).collect();
        for round in drawn.chunks(3) {
            let mut sorted = round.to_vec();
            sorted.sort();
            assert_eq!(sorted, specs);
        }
        assert!(drawn.chunks(3).any(|round| round[0] != drawn[0]), "orders differ");
    }

    #[test]
    fn spaces_that_cannot_be_are_refused() {
        let config = Config::default();
        for (key, text, expected) in [
            ("optim.lrr", "x = [1.0]", "did you mean `optim.lr`?"),
            ("optim.lr", "x = []", "is an empty list"),
            ("optim.lr", "x = [\"fast\"]", "optim.lr: "),
            ("optim.lr", "x = { from = 1.0, to = 0.1 }", "from = 1, to = 0.1"),
            ("optim.lr", "x = { from = 0.0, to = 0.1, log = true }", "above 0"),
            ("optim.lr", "x = [-1.0]", "optim.lr"),
            ("train.seed", "x = [1, 2]", "is not for a search to change"),
            ("data.seal_test", "x = [true]", "is not for a search to change"),
            ("data.val_fraction", "x = [0.1, 0.2]", "is not for a search to change"),
            ("model.name", "x = [\"resnet18\"]", "by a list as their spec"),
        ] {
            let error = space(text).check(key, &config).expect_err(text);
            assert!(error.to_string().contains(expected), "{text}: {error}");
            assert_eq!(error.exit_code(), 2);
        }
        space("x = { from = 1e-4, to = 0.1, log = true }").check("optim.lr", &config).unwrap();
    }
}
