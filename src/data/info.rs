//! What is in a data set, in words and numbers.

use std::collections::BTreeMap;
use std::fmt::Write;

use rayon::prelude::*;

use super::{Dataset, Image, Part, Split};
use crate::Result;

/// Pictures looked at for sizes, mean and deviation; large sets are sampled evenly.
const SAMPLE: usize = 512;

/// At most [`SAMPLE`] of `indices`, evenly spread.
fn sample(indices: &[usize]) -> Vec<usize> {
    let step = indices.len().div_ceil(SAMPLE).max(1);
    indices.iter().copied().step_by(step).collect()
}

fn decode(dataset: &Dataset, indices: &[usize]) -> Result<Vec<Image>> {
    indices.par_iter().map(|&index| dataset.image(index)).collect()
}

/// Mean and standard deviation of each channel (values in 0..1) over `indices`, every pixel counting the same; of at most 512 pictures,
/// evenly spread. For [`super::Transform::mean`] and `std` instead of ImageNet's. Errors: those of [`Dataset::image`].
pub fn statistics(dataset: &Dataset, indices: &[usize]) -> Result<([f32; 3], [f32; 3])> {
    Ok(moments(&decode(dataset, &sample(indices))?))
}

fn moments(images: &[Image]) -> ([f32; 3], [f32; 3]) {
    // Whole numbers: exact, so that neither the number of threads nor the order can change the result.
    let (mut sum, mut square, mut count) = ([0u64; 3], [0u64; 3], 0u64);
    for pixel in images.iter().flat_map(|image| image.pixels.chunks_exact(3)) {
        count += 1;
        for channel in 0..3 {
            let value = u64::from(pixel[channel]);
            sum[channel] += value;
            square[channel] += value * value;
        }
    }
    let count = count.max(1) as f64;
    let mean = sum.map(|sum| sum as f64 / count);
    let variance =
        [0, 1, 2].map(|channel| square[channel] as f64 / count - mean[channel] * mean[channel]);
    // A channel that never changes must not be divided by zero: one grey level is the least deviation there is.
    (
        mean.map(|mean| (mean / 255.0) as f32),
        variance.map(|variance| (variance.max(1.0).sqrt() / 255.0) as f32),
    )
}

/// A summary to print: format, classes by part, domains, picture sizes, mean and deviation, duplicates, what was left out, licence and
/// caveats. Errors: those of [`Dataset::image`].
pub fn info(dataset: &Dataset, split: &Split) -> Result<String> {
    let mut text = String::new();
    let all: Vec<usize> = (0..dataset.len()).collect();
    let sampled = sample(&all);
    let images = decode(dataset, &sampled)?;
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "{} ({}), {} pictures, {} classes",
        dataset.name,
        dataset.format.name(),
        dataset.len(),
        dataset.classes.len()
    );
    if !dataset.root.as_os_str().is_empty() {
        let _ = writeln!(text, "read from {}", dataset.root.display());
    }
    text.push('\n');
    text.push_str(&class_table(dataset, split));
    text.push('\n');
    let _ = writeln!(
        text,
        "sizes      {}{}",
        sizes(&images),
        if sampled.len() < all.len() {
            format!(" in a sample of {}", sampled.len())
        } else {
            String::new()
        }
    );
    let (mean, std) = moments(&images);
    let three = |values: [f32; 3]| values.map(|value| format!("{value:.3}")).join(" ");
    let _ = writeln!(
        text,
        "mean, std  {} | {} (red green blue, values in 0..1)",
        three(mean),
        three(std)
    );
    let grouped = dataset
        .items
        .iter()
        .filter_map(|item| item.group.as_deref())
        .collect::<std::collections::BTreeSet<_>>()
        .len();
    if grouped > 0 {
        let _ = writeln!(
            text,
            "groups     {grouped} (patient, lesion or slide; never divided by a split)"
        );
    }
    text.push_str(&domains(dataset));
    text.push_str(&left_out(dataset, split));
    for note in &dataset.notes {
        let _ = writeln!(text, "note       {note}");
    }
    Ok(text)
}

/// Items by class (rows) and part (columns).
fn class_table(dataset: &Dataset, split: &Split) -> String {
    let parts: Vec<Part> =
        Part::ALL.into_iter().filter(|&part| !split.part(part).is_empty()).collect();
    let counts: Vec<Vec<usize>> =
        parts.iter().map(|&part| dataset.class_counts(split.part(part).iter().copied())).collect();
    let width = dataset.classes.iter().map(|class| class.chars().count()).max().unwrap_or(0).max(5);
    let mut text = format!("{:width$}", "class");
    parts.iter().for_each(|part| text.push_str(&format!(" {:>8}", part.name())));
    text.push_str("      all\n");
    for (class, name) in dataset.classes.iter().enumerate() {
        text.push_str(&format!("{name:width$}"));
        counts.iter().for_each(|counts| text.push_str(&format!(" {:>8}", counts[class])));
        text.push_str(&format!(
            " {:>8}\n",
            counts.iter().map(|counts| counts[class]).sum::<usize>()
        ));
    }
    text.push_str(&format!("{:width$}", "all"));
    let sums: Vec<usize> = counts.iter().map(|counts| counts.iter().sum()).collect();
    sums.iter().for_each(|sum| text.push_str(&format!(" {sum:>8}")));
    text.push_str(&format!(" {:>8}\n", sums.iter().sum::<usize>()));
    text
}

/// The commonest sizes, width x height.
fn sizes(images: &[Image]) -> String {
    let mut counts: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    images.iter().for_each(|image| *counts.entry((image.width, image.height)).or_default() += 1);
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|&(size, count)| (std::cmp::Reverse(count), size));
    let more = counts.len().saturating_sub(4);
    let shown: Vec<String> = counts
        .iter()
        .take(4)
        .map(|((width, height), count)| format!("{width}x{height} ({count})"))
        .collect();
    if more > 0 { format!("{} and {more} others", shown.join(", ")) } else { shown.join(", ") }
}

fn domains(dataset: &Dataset) -> String {
    let mut counts: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for item in &dataset.items {
        if let Some(domain) = item.domain.as_deref() {
            counts.entry(domain).or_insert_with(|| vec![0; dataset.classes.len()])
                [item.label as usize] += 1;
        }
    }
    let describe = |(domain, counts): (&&str, &Vec<usize>)| {
        let classes: Vec<String> = dataset
            .classes
            .iter()
            .zip(counts)
            .map(|(class, count)| format!("{class} {count}"))
            .collect();
        format!("domain     {domain}: {} ({})\n", counts.iter().sum::<usize>(), classes.join(", "))
    };
    counts.iter().map(describe).collect()
}

/// Duplicates, conflicts and bad entries: how many, and the first few by name.
fn left_out(dataset: &Dataset, split: &Split) -> String {
    let mut text = String::new();
    let dropped: Vec<String> = split
        .dropped
        .iter()
        .map(|dropped| format!("{}: {}", dataset.items[dropped.index].id, dropped.reason))
        .collect();
    for (title, lines) in [("dropped", &dropped), ("skipped", &dataset.skipped)] {
        if lines.is_empty() {
            continue;
        }
        text.push_str(&format!("{title:10} {}\n", lines.len()));
        lines.iter().take(10).for_each(|line| text.push_str(&format!("           {line}\n")));
        if lines.len() > 10 {
            text.push_str(&format!("           ... and {} more\n", lines.len() - 10));
        }
    }
    text
}
