//! Made-up results for the tests of comparisons and reports.

use std::fs;
use std::path::Path;

use toml::Value;

use super::results::{DataResults, ModelResults, Results, Run, Scores, Tried};
use super::space::Setting;
use crate::data::Draws;
use crate::train::PartMetrics;
use crate::train::log::EpochRow;
use crate::train::metrics::Confusion;

/// A model of an example: name, baseline, and how often it is right on a test part from the same and from another domain.
pub(super) type Made<'a> = (&'a str, Option<usize>, f64, f64);

/// A data set of an example.
pub(super) struct Example<'a> {
    pub name: &'a str,
    pub classes: usize,
    pub models: &'a [Made<'a>],
    pub seeds: usize,
    /// Whether a domain is held out.
    pub holdout: bool,
    /// Test images of a class.
    pub images: usize,
    /// Spread of the seeds.
    pub spread: f64,
    /// Where predictions are written; none where not given.
    pub dir: Option<&'a Path>,
    /// Of the random numbers.
    pub seed: u64,
}

impl Example<'_> {
    /// A study of this data set alone.
    pub(super) fn results(&self) -> Results {
        Results {
            left_out: Vec::new(),
            asked: false,
            name: "example".into(),
            about: "Whether attention helps on made-up numbers.".into(),
            alpha: 0.05,
            seeds: self.seeds,
            open: 0,
            space: vec![
                ("optim.lr".into(), "0.0001 to 0.1, uniform in the logarithm".into()),
                ("augment.policy".into(), "\"none\", \"flips\"".into()),
            ],
            search: (9, vec![2, 4, 12]),
            environment: vec![
                ("program".into(), "attn2d 0.1.0".into()),
                ("device".into(), "cpu (made up)".into()),
                ("command".into(), "attn2d study configs/example.toml".into()),
            ],
            datasets: vec![self.data()],
        }
    }

    pub(super) fn data(&self) -> DataResults {
        let classes: Vec<String> = (0..self.classes).map(|c| format!("class {c}")).collect();
        let count = self.images * self.classes;
        let parts = self.parts().iter().map(|part| (part.to_string(), count));
        let models = (0..self.models.len()).map(|i| self.model(i, &classes)).collect();
        DataResults {
            absent: Vec::new(),
            name: self.name.into(),
            path: "synthetic:dermoscopy".into(),
            holdout_domain: self.holdout.then(|| "hospital 2".into()),
            images: std::iter::once(("train".to_string(), 8 * count)).chain(parts).collect(),
            classes,
            models,
        }
    }

    fn parts(&self) -> &'static [&'static str] {
        if self.holdout { &["val", "test", "id_test"] } else { &["val", "test"] }
    }

    fn model(&self, place: usize, classes: &[String]) -> ModelResults {
        let (name, baseline, ..) = self.models[place];
        let spec = if baseline.is_some() { "resnet18+ga@4:heads=4" } else { "resnet18" };
        let setting = |number: usize| Setting {
            values: vec![
                ("optim.lr".into(), Value::Float(0.001 * (1 + number) as f64)),
                ("augment.policy".into(), Value::String("flips".into())),
            ],
            spec: spec.into(),
        };
        let mut tried = Vec::new();
        for (rung, (epochs, numbers)) in [(2, 0..9), (4, 3..6), (12, 4..5)].into_iter().enumerate()
        {
            tried.extend(numbers.map(|number| Tried {
                rung,
                epochs,
                number,
                setting: setting(number),
                val: match (rung, number) {
                    (0, 8) => Err("the loss is not finite (inf) in epoch 1".into()),
                    _ => Ok(0.6 + 0.05 * rung as f64 + 0.01 * number as f64),
                },
                seconds: 10.0 * epochs as f64,
                dir: format!("trials/{rung}-{number}").into(),
            }));
        }
        ModelResults {
            name: name.into(),
            baseline,
            tried,
            winner: Some(setting(4)),
            parameters: 11_177_538 + 400_000 * place,
            flop: 3.6e9 * (1.0 + 0.2 * place as f64),
            runs: (0..self.seeds).map(|seed| self.run(place, seed, classes)).collect(),
        }
    }

    fn run(&self, place: usize, seed: usize, classes: &[String]) -> Run {
        let (name, _, same, other) = self.models[place];
        let mut draws = Draws::new(&[self.seed, place as u64, seed as u64]);
        let luck = self.spread * f64::from(draws.normal());
        let dir =
            self.dir.map(|d| d.join(self.name).join(format!("{name}-{seed}"))).unwrap_or_default();
        let part = |part: &&str| {
            let right = if *part == "test" && self.holdout { other } else { same };
            let right = (right + luck).clamp(0.0, 1.0);
            let (confusion, rows) = self.answers(right, classes, &mut draws, part);
            if self.dir.is_some() {
                fs::create_dir_all(&dir).expect("a directory");
                fs::write(dir.join(format!("predictions_{part}.csv")), rows).expect("written");
            }
            metrics(part, &confusion, classes)
        };
        let parts: Vec<PartMetrics> = self.parts().iter().map(part).collect();
        let epochs = 12;
        let curve = |epoch: u64| EpochRow {
            epoch,
            train_loss: 1.0 / epoch as f64,
            val_balanced_accuracy: Some((same + luck) * (1.0 - 0.5 * (-0.4 * epoch as f64).exp())),
            ..EpochRow::default()
        };
        Run {
            seed: 1000 + seed as u64,
            dir,
            scores: Ok(Scores {
                best_epoch: 9,
                parts,
                curve: (1..=epochs).map(curve).collect(),
                step_ms: 40.0 * (1.0 + 0.3 * place as f64) + seed as f64,
                seconds: 120.0 + 7.0 * seed as f64,
                peak_bytes: (900 + 100 * place as u64) << 20,
            }),
        }
    }

    /// Predictions of a part: counts, and the text of their file. A wrong answer is another class by chance.
    fn answers(
        &self,
        right: f64,
        classes: &[String],
        draws: &mut Draws,
        part: &str,
    ) -> (Confusion, String) {
        let mut confusion = Confusion::new(self.classes);
        let mut rows = format!(
            "id,label,predicted,{}\n",
            classes.iter().map(|c| format!("p_{c}")).collect::<Vec<_>>().join(",")
        );
        for image in 0..self.images * self.classes {
            let label = image % self.classes;
            let hit = f64::from(draws.unit()) < right;
            let wrong = (label + 1 + draws.below(self.classes - 1)) % self.classes;
            let predicted = if hit { label } else { wrong };
            confusion.add(label as u32, predicted as u32);
            if self.dir.is_some() {
                let rest = 0.2 / (self.classes - 1) as f64;
                let p = (0..self.classes)
                    .map(|c| if c == predicted { "0.800000".into() } else { format!("{rest:.6}") });
                rows += &format!(
                    "{part}-{image},{},{},{}\n",
                    classes[label],
                    classes[predicted],
                    p.collect::<Vec<_>>().join(",")
                );
            }
        }
        (confusion, rows)
    }
}

fn metrics(part: &str, confusion: &Confusion, classes: &[String]) -> PartMetrics {
    let k = confusion.classes();
    PartMetrics {
        part: part.into(),
        images: confusion.counts().iter().sum::<u64>() as usize,
        loss: 0.5,
        accuracy: confusion.accuracy(),
        balanced_accuracy: confusion.balanced_accuracy(),
        auc: None,
        classes: classes.to_vec(),
        recall: (0..k).map(|c| confusion.recall(c)).collect(),
        confusion: confusion.counts().chunks_exact(k).map(<[u64]>::to_vec).collect(),
    }
}
