//! How good predictions are: accuracy, balanced accuracy, recall by class and area under the ROC curve.

use crate::{Error, Result};

/// What a model said about a set of images.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Predictions {
    /// Number of classes.
    pub classes: usize,
    /// True class of each image.
    pub labels: Vec<u32>,
    /// Probability of each class for each image, image after image: `labels.len() * classes` values.
    pub probabilities: Vec<f64>,
}

impl Predictions {
    /// No predictions yet.
    pub fn new(classes: usize) -> Self {
        Self { classes, ..Self::default() }
    }

    /// Adds a batch of logits `[labels.len(), classes]`. The softmax runs in f64, so that the order of confident
    /// predictions survives.
    pub fn push_logits(&mut self, logits: &[f32], labels: &[u32]) -> Result<()> {
        if logits.len() != labels.len() * self.classes {
            return Err(Error::shape(
                "metrics",
                format!(
                    "expected {} labels x {} classes, got {} logits",
                    labels.len(),
                    self.classes,
                    logits.len()
                ),
            ));
        }
        for row in logits.chunks_exact(self.classes) {
            let largest = row.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(f64::from(x)));
            let start = self.probabilities.len();
            self.probabilities.extend(row.iter().map(|&x| (f64::from(x) - largest).exp()));
            let sum: f64 = self.probabilities[start..].iter().sum();
            self.probabilities[start..].iter_mut().for_each(|p| *p /= sum);
        }
        self.labels.extend_from_slice(labels);
        Ok(())
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The probabilities of one image.
    pub fn row(&self, image: usize) -> &[f64] {
        &self.probabilities[image * self.classes..(image + 1) * self.classes]
    }

    /// The most probable class of one image; the lowest of several equal ones.
    pub fn predicted(&self, image: usize) -> u32 {
        argmax(self.row(image))
    }

    /// Counts of true against predicted classes.
    pub fn confusion(&self) -> Confusion {
        let mut confusion = Confusion::new(self.classes);
        for (image, &label) in self.labels.iter().enumerate() {
            confusion.add(label, self.predicted(image));
        }
        confusion
    }

    /// Area under the ROC curve: exact, by ranks. With two classes the score is the probability of class 1; with more
    /// it is the plain mean over classes of one against the rest. Classes that are absent, or that are all there is,
    /// have no curve and are left out; `None` when no class has one.
    pub fn auc(&self) -> Option<f64> {
        let one_class = |class: usize| {
            let scores: Vec<f64> =
                self.probabilities.chunks_exact(self.classes).map(|row| row[class]).collect();
            let positive: Vec<bool> = self.labels.iter().map(|&l| l as usize == class).collect();
            auc(&scores, &positive)
        };
        if self.classes == 2 {
            return one_class(1);
        }
        mean((0..self.classes).filter_map(one_class))
    }
}

/// The index of the largest value; the lowest of several equal ones.
pub fn argmax<T: PartialOrd + Copy>(row: &[T]) -> u32 {
    let mut best = 0;
    for (i, x) in row.iter().enumerate().skip(1) {
        if *x > row[best] {
            best = i;
        }
    }
    best as u32
}

/// Area under the ROC curve: the probability that a positive scores higher than a negative, ties counting half
/// (Mann-Whitney U over `positives * negatives`). `None` without positives or without negatives.
pub fn auc(scores: &[f64], positive: &[bool]) -> Option<f64> {
    let positives = positive.iter().filter(|p| **p).count();
    let negatives = positive.len() - positives;
    if positives == 0 || negatives == 0 {
        return None;
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    // Twice the rank sum of the positives, with equal scores sharing their mean rank: stays a whole number.
    let mut twice_rank_sum = 0_u64;
    let mut start = 0;
    while start < order.len() {
        let mut end = start + 1;
        while end < order.len() && scores[order[end]] == scores[order[start]] {
            end += 1;
        }
        let twice_mean_rank = (start + 1 + end) as u64;
        let hits = order[start..end].iter().filter(|&&i| positive[i]).count() as u64;
        twice_rank_sum += hits * twice_mean_rank;
        start = end;
    }
    let (p, n) = (positives as u64, negatives as u64);
    let twice_u = twice_rank_sum - p * (p + 1);
    Some(twice_u as f64 / (2 * p * n) as f64)
}

/// Counts of true against predicted classes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    counts: Vec<u64>,
}

impl Confusion {
    /// All zeros.
    pub fn new(classes: usize) -> Self {
        Self { classes, counts: vec![0; classes * classes] }
    }

    /// From counts, true class after true class, as [`Confusion::counts`] gives them.
    pub fn from_counts(classes: usize, counts: Vec<u64>) -> Result<Self> {
        if counts.len() != classes * classes {
            let message = format!(
                "{classes} classes need {} counts, got {}",
                classes * classes,
                counts.len()
            );
            return Err(Error::shape("confusion", message));
        }
        Ok(Self { classes, counts })
    }

    /// Counts one image. Classes beyond the matrix are a fault of the caller and are not counted.
    pub fn add(&mut self, label: u32, predicted: u32) {
        if (label as usize) < self.classes && (predicted as usize) < self.classes {
            self.counts[label as usize * self.classes + predicted as usize] += 1;
        }
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// The counts, true class after true class.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Images of `label` that were taken for `predicted`.
    pub fn get(&self, label: usize, predicted: usize) -> u64 {
        self.counts[label * self.classes + predicted]
    }

    /// Images of one true class.
    pub fn images_of(&self, label: usize) -> u64 {
        self.counts[label * self.classes..(label + 1) * self.classes].iter().sum()
    }

    /// Share of images that were right; `None` without images.
    pub fn accuracy(&self) -> Option<f64> {
        let right: u64 = (0..self.classes).map(|c| self.get(c, c)).sum();
        let all: u64 = self.counts.iter().sum();
        (all > 0).then(|| right as f64 / all as f64)
    }

    /// Share of a class's images that were recognised; `None` where the class has no image.
    pub fn recall(&self, class: usize) -> Option<f64> {
        let all = self.images_of(class);
        (all > 0).then(|| self.get(class, class) as f64 / all as f64)
    }

    /// Mean recall over the classes that have images: guessing gives `1 / classes` however uneven the classes are.
    /// `None` without images.
    ///
    /// Rounded to twelve digits: the order of a sum leaves another last bit, and what is equal must compare equal where checkpoints,
    /// settings and ranks are chosen by it.
    pub fn balanced_accuracy(&self) -> Option<f64> {
        let mean = mean((0..self.classes).filter_map(|c| self.recall(c)))?;
        Some((mean * 1e12).round() / 1e12)
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0_u32), |(s, n), v| (s + v, n + 1));
    (count > 0).then(|| sum / f64::from(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uneven_classes_by_hand() {
        // 8 of class 0 (6 right), 2 of class 1 (1 right), none of class 2.
        let confusion =
            Confusion::from_counts(3, vec![6, 2, 0, 1, 1, 0, 0, 0, 0]).expect("9 counts");
        assert_eq!(confusion.accuracy(), Some(0.7));
        assert_eq!(confusion.recall(0), Some(0.75));
        assert_eq!(confusion.recall(1), Some(0.5));
        assert_eq!(confusion.recall(2), None);
        assert_eq!(confusion.balanced_accuracy(), Some(0.625));
        assert_eq!(Confusion::new(2).balanced_accuracy(), None);
        assert_eq!(Confusion::new(2).accuracy(), None);
    }

    #[test]
    fn equal_scores_are_equal_to_the_bit() {
        // Recalls of 1/10, 2/10 and 4/10 in two orders.
        let of = |right: [u64; 3]| {
            let counts = (0..9).map(|i| match (i / 3, i % 3) {
                (label, predicted) if label == predicted => right[label],
                (label, predicted) if predicted == (label + 1) % 3 => 10 - right[label],
                _ => 0,
            });
            Confusion::from_counts(3, counts.collect()).expect("9 counts").balanced_accuracy()
        };
        assert_ne!((0.1 + 0.2 + 0.4) / 3.0, (0.4 + 0.1 + 0.2) / 3.0);
        assert_eq!(of([1, 2, 4]), of([4, 1, 2]));
    }

    #[test]
    fn auc_by_hand() {
        let p = |bits: &[u8]| bits.iter().map(|b| *b == 1).collect::<Vec<_>>();
        // Pairs (positive, negative): 0.35>0.1 yes, 0.35>0.4 no, 0.8 beats both: 3 of 4.
        assert_eq!(auc(&[0.1, 0.4, 0.35, 0.8], &p(&[0, 0, 1, 1])), Some(0.75));
        // One tie of the four pairs counts half: (1 + 0.5 + 1 + 1) / 4.
        assert_eq!(auc(&[0.1, 0.5, 0.5, 0.8], &p(&[0, 0, 1, 1])), Some(0.875));
        assert_eq!(auc(&[0.5; 5], &p(&[0, 1, 0, 1, 1])), Some(0.5));
        assert_eq!(auc(&[0.9, 0.1], &p(&[0, 1])), Some(0.0));
        assert_eq!(auc(&[0.9, 0.1], &p(&[1, 1])), None);
        assert_eq!(auc(&[], &[]), None);
    }

    #[test]
    fn auc_equals_counting_pairs() {
        // Scores with many ties, checked against the definition pair by pair.
        let scores: Vec<f64> = (0..60_u32).map(|i| f64::from(i * 37 % 11)).collect();
        let positive: Vec<bool> = (0..60_u32).map(|i| i * i % 7 < 3).collect();
        let mut wins = 0.0;
        let mut pairs = 0.0;
        for i in (0..60).filter(|&i| positive[i]) {
            for j in (0..60).filter(|&j| !positive[j]) {
                pairs += 1.0;
                wins += match scores[i].total_cmp(&scores[j]) {
                    std::cmp::Ordering::Greater => 1.0,
                    std::cmp::Ordering::Equal => 0.5,
                    std::cmp::Ordering::Less => 0.0,
                };
            }
        }
        let got = auc(&scores, &positive).expect("both kinds are there");
        assert!((got - wins / pairs).abs() < 1e-15, "{got} {}", wins / pairs);
    }

    #[test]
    fn predictions_from_logits() {
        let mut predictions = Predictions::new(3);
        let logits = [0.0, (2.0_f32).ln(), 0.0, 100.0, 90.0, -100.0, 1.0, 1.0, 1.0];
        predictions.push_logits(&logits, &[1, 1, 0]).expect("three rows");
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-7, "{a} {b}");
        close(predictions.row(0)[1], 0.5);
        close(predictions.row(0)[0], 0.25);
        close(predictions.row(1)[1], (-10.0_f64).exp() / (1.0 + (-10.0_f64).exp()));
        assert_eq!(predictions.predicted(1), 0);
        assert_eq!(predictions.predicted(2), 0, "the lowest of equal classes");
        assert_eq!(predictions.confusion().counts(), [1, 0, 0, 1, 1, 0, 0, 0, 0]);
        assert!(predictions.push_logits(&[0.0; 4], &[0]).is_err());
        // Class 2 never occurs; classes 0 and 1 have curves: image 2 (label 0) scores 1/3 for class 0 against 0.25 and
        // 0.99995, so 1 of 2 pairs; class 1: 0.5 and 4.5e-5 against 1/3, so 1 of 2.
        assert_eq!(predictions.auc(), Some(0.5));
    }

    #[test]
    fn binary_auc_uses_class_one() {
        let mut predictions = Predictions::new(2);
        predictions.push_logits(&[0.0, 3.0, 0.0, 2.0, 0.0, 1.0], &[1, 0, 0]).expect("three rows");
        assert_eq!(predictions.auc(), Some(1.0));
    }
}
