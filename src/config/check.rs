//! The values that a key may have.

use super::{Config, Policy, layers};
use crate::{Error, Result};

impl Config {
    /// Refuses values that no run can have, by key name.
    pub fn check(&self) -> Result<()> {
        let (data, train, optim, sched) = (&self.data, &self.train, &self.optim, &self.sched);
        let fraction = |v: f64| (0.0..1.0).contains(&v);
        let probability = |v: f64| (0.0..=1.0).contains(&v);
        let not_negative = |v: f64| v.is_finite() && v >= 0.0;
        let rules: [(&str, bool, &str); 23] = [
            ("data.path", !data.path.is_empty(), "must name a folder, a file or a synthetic set"),
            ("data.img_size", (8..=4096).contains(&data.img_size), "must lie in 8..=4096"),
            ("data.val_fraction", fraction(data.val_fraction), "must be at least 0 and below 1"),
            ("data.test_fraction", fraction(data.test_fraction), "must be at least 0 and below 1"),
            (
                "data.val_fraction",
                data.val_fraction + data.test_fraction < 1.0,
                "and data.test_fraction together leave nothing to train on",
            ),
            (
                "data.synthetic_size",
                (32..=4096).contains(&data.synthetic_size),
                "must lie in 32..=4096",
            ),
            ("data.workers", (1..=256).contains(&data.workers), "must lie in 1..=256"),
            (
                "augment.policy",
                self.augment.policy == Policy::Custom
                    || self.augment.custom == crate::data::Augment::default(),
                "ignores the keys of [augment.custom] that are set; say augment.policy = \"custom\"",
            ),
            ("model.name", !self.model.name.is_empty(), "must be a model string"),
            ("train.epochs", train.epochs >= 1, "must be at least 1"),
            ("train.batch_size", train.batch_size >= 1, "must be at least 1"),
            (
                "train.label_smoothing",
                fraction(train.label_smoothing),
                "must be at least 0 and below 1",
            ),
            (
                "train.ema",
                fraction(train.ema),
                "must be at least 0 and below 1, such as 0.999; 0 for no average",
            ),
            (
                "train.freeze",
                train.freeze.iter().all(|pattern| !pattern.trim().is_empty()),
                "must be patterns of parameter names, such as \"layer1.*\" or \"backbone\"",
            ),
            (
                "optim.clip_grad",
                not_negative(optim.clip_grad),
                "must be finite and not negative; 0 for no limit",
            ),
            ("optim.lr", optim.lr.is_finite() && optim.lr > 0.0, "must be a positive number"),
            ("optim.momentum", fraction(optim.momentum), "must be at least 0 and below 1"),
            (
                "optim.betas",
                optim.betas.iter().all(|b| fraction(*b)),
                "must both be at least 0 and below 1",
            ),
            ("optim.eps", optim.eps.is_finite() && optim.eps > 0.0, "must be a positive number"),
            (
                "optim.weight_decay",
                not_negative(optim.weight_decay),
                "must be finite and not negative",
            ),
            (
                "sched.warmup_epochs",
                not_negative(sched.warmup_epochs),
                "must be finite and not negative",
            ),
            ("sched.min_lr", (0.0..=optim.lr).contains(&sched.min_lr), "must lie in 0..=optim.lr"),
            (
                "sched.decay_epochs",
                sched.decay_epochs > 0.0 && probability(sched.decay_rate),
                "must be positive, with sched.decay_rate in 0..=1",
            ),
        ];
        let table = layers::table_of(self);
        for (key, holds, rule) in rules {
            if !holds {
                let value = layers::get(&table, key).map(ToString::to_string).unwrap_or_default();
                return Err(Error::usage(format!("config: {key} = {value} {rule}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_name_their_key() {
        let mut config = Config::default();
        config.check().expect("the defaults are valid");
        config.data.val_fraction = 0.6;
        config.data.test_fraction = 0.5;
        let message = config.check().expect_err("nothing left to train on").to_string();
        assert!(message.contains("data.val_fraction = 0.6"), "{message}");
        config = Config::default();
        config.augment.custom.hflip = false;
        let message = config.check().expect_err("set but not used").to_string();
        assert!(message.contains("augment.policy = \"auto\" ignores"), "{message}");
        config = Config::default();
        config.optim.lr = f64::NAN;
        let error = config.check().expect_err("not a number");
        assert!(error.to_string().contains("optim.lr"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
