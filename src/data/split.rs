//! Which items train, which choose, which judge: stratified by class, whole groups together, no picture in two parts.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{Dataset, Draws, Format, Part};
use crate::{Error, Result};

/// How to split.
#[derive(Debug, Clone)]
pub struct SplitOptions {
    /// Seed of the random assignment.
    pub seed: u64,
    /// Share of the training items that becomes `val`, where the publishers give none.
    pub val: f64,
    /// Share of the training items that becomes `test` (`id_test` where a domain is held out), where the publishers give none.
    pub test: f64,
    /// Keep to the publishers' parts; otherwise all items are shared out anew.
    pub official: bool,
    /// Drop pictures that occur twice (same bytes in the file; same pixels for arrays). Reads all the data once.
    pub dedup: bool,
    /// Make this domain (see [`super::Item::domain`]) the test set: nothing of it is trained on. Several are separated by commas.
    pub holdout_domain: Option<String>,
}

impl Default for SplitOptions {
    fn default() -> Self {
        Self { seed: 0, val: 0.15, test: 0.15, official: true, dedup: true, holdout_domain: None }
    }
}

/// An item that is in no part, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dropped {
    /// The item.
    pub index: usize,
    /// `duplicate of ID` or `conflicting labels: ...`.
    pub reason: String,
}

/// The columns that a split file must have.
const COLUMNS: [&str; 3] = ["split", "id", "label"];

/// Item numbers by part, each list in increasing order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Split {
    /// Weights are fitted on these.
    pub train: Vec<usize>,
    /// Models are chosen on these.
    pub val: Vec<usize>,
    /// For the end; the held-out domain where there is one.
    pub test: Vec<usize>,
    /// A test from the training's own domains; mostly empty.
    pub id_test: Vec<usize>,
    /// What is in no part.
    pub dropped: Vec<Dropped>,
}

impl Split {
    /// The items of `part`.
    pub fn part(&self, part: Part) -> &[usize] {
        match part {
            Part::Train => &self.train,
            Part::Val => &self.val,
            Part::Test => &self.test,
            Part::IdTest => &self.id_test,
        }
    }

    fn part_mut(&mut self, part: Part) -> &mut Vec<usize> {
        match part {
            Part::Train => &mut self.train,
            Part::Val => &mut self.val,
            Part::Test => &mut self.test,
            Part::IdTest => &mut self.id_test,
        }
    }

    fn from_parts(parts: &[Option<Part>], dropped: Vec<Dropped>) -> Self {
        let mut split = Split { dropped, ..Split::default() };
        for (index, part) in parts.iter().enumerate() {
            if let Some(part) = part {
                split.part_mut(*part).push(index);
            }
        }
        split
    }

    /// Writes the split as CSV: `split,id,label,note`, a row an item, labels by name, `dropped` with the reason as note. Written to a
    /// temporary name first, so that the file is whole or absent. Errors: `Io`.
    pub fn write(&self, dataset: &Dataset, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut writer = csv::Writer::from_writer(Vec::new());
        let row = |split: &str, index: usize, note: &str| {
            let item = &dataset.items[index];
            [
                split.to_string(),
                item.id.clone(),
                dataset.classes[item.label as usize].clone(),
                note.to_string(),
            ]
        };
        let parts = Part::ALL
            .iter()
            .flat_map(|&part| self.part(part).iter().map(move |&index| (part.name(), index, "")));
        let dropped =
            self.dropped.iter().map(|dropped| ("dropped", dropped.index, dropped.reason.as_str()));
        let failed = |error: csv::Error| Error::io(path, std::io::Error::other(error));
        writer.write_record(["split", "id", "label", "note"]).map_err(failed)?;
        for (split, index, note) in parts.chain(dropped) {
            writer.write_record(row(split, index, note)).map_err(failed)?;
        }
        let bytes = writer
            .into_inner()
            .map_err(|error| Error::io(path, std::io::Error::other(error.to_string())))?;
        crate::io::write_atomic(path, &bytes)
    }

    /// The items that a run looks at before it is judged: `train`, then `val`.
    pub fn learnt_from(&self) -> Vec<usize> {
        [&self.train[..], &self.val].concat()
    }

    /// The ids of [`Split::learnt_from`] in a file that [`Split::write`] wrote, for [`super::Options::readable`]: known before the data
    /// set is opened. Errors: `Io`; `File` for something that is no such table.
    pub fn learnt_from_ids(path: impl AsRef<Path>) -> Result<HashSet<String>> {
        let table = super::files::Table::read(path.as_ref(), &COLUMNS)?;
        let parts = [Part::Train.name(), Part::Val.name()];
        let rows = (0..table.len()).filter(|&row| parts.contains(&table.cell(row, "split")));
        Ok(rows.map(|row| table.cell(row, "id").to_string()).collect())
    }

    /// Reads what [`Split::write`] wrote, for the same data set. Items that the file does not list are in no part. Errors: `Io`; `File`
    /// for an id that the data set does not have or has under another label.
    pub fn read(dataset: &Dataset, path: impl AsRef<Path>) -> Result<Self> {
        let table = super::files::Table::read(path.as_ref(), &COLUMNS)?;
        let by_id: HashMap<&str, usize> = dataset
            .items
            .iter()
            .enumerate()
            .map(|(index, item)| (item.id.as_str(), index))
            .collect();
        let mut parts = vec![None; dataset.len()];
        let mut dropped = Vec::new();
        let mut seen = vec![false; dataset.len()];
        for row in 0..table.len() {
            let (id, label) = (table.cell(row, "id"), table.cell(row, "label"));
            let Some(&index) = by_id.get(id) else {
                let message = format!(
                    "unknown id {id:?}: it is not in {} ({}); the split belongs to other data",
                    dataset.name,
                    dataset.root.display()
                );
                return Err(table.error(row, message));
            };
            let class = &dataset.classes[dataset.items[index].label as usize];
            if class != label {
                return Err(table.error(row, format!("{id} is {label:?} here but {class:?} in the data; the labels changed since the split was made")));
            }
            if std::mem::replace(&mut seen[index], true) {
                return Err(table.error(row, format!("{id} is listed twice")));
            }
            let name = table.cell(row, "split");
            match Part::ALL.iter().find(|part| part.name() == name) {
                Some(part) => parts[index] = Some(*part),
                None if name == "dropped" => {
                    dropped.push(Dropped { index, reason: table.cell(row, "note").to_string() })
                }
                None => {
                    return Err(table.error(
                        row,
                        format!("split is {name:?}, expected train, val, test, id_test or dropped"),
                    ));
                }
            }
        }
        Ok(Self::from_parts(&parts, dropped))
    }
}

/// Splits a data set.
///
/// Official parts keep their meaning. A part that the publishers did not give (`val`, `test`) is taken out of `train`, stratified by class
/// and without dividing a group. Where nothing is official everything starts as `train`. With [`SplitOptions::holdout_domain`], that
/// domain is `test` and the in-distribution test is `id_test`.
///
/// Of identical pictures one is kept, in the part that judges most (`test`, then `id_test`, `val`, `train`); official `val` and `test`
/// parts stay as published, so that results can be compared. Copies in `train` whose labels conflict are all dropped: nobody
/// knows which is right.
///
/// Errors: `Usage` for shares that make no sense, an unknown domain, or a class with too few items to be in every part.
pub fn split(dataset: &Dataset, options: &SplitOptions) -> Result<Split> {
    check(options)?;
    let mut parts: Vec<Option<Part>> = dataset
        .items
        .iter()
        .map(|item| {
            Some(if options.official { item.official.unwrap_or(Part::Train) } else { Part::Train })
        })
        .collect();
    let test = match &options.holdout_domain {
        Some(domains) => {
            hold_out(dataset, &domains_of(dataset, domains)?, &mut parts);
            Part::IdTest
        }
        None => Part::Test,
    };
    let dropped = if options.dedup { drop_duplicates(dataset, &mut parts)? } else { Vec::new() };
    // Shares are of what training has now, before anything is taken from it.
    let mut left = 1.0;
    for (part, share) in [(test, options.test), (Part::Val, options.val)] {
        if share > 0.0 && !parts.contains(&Some(part)) {
            carve(dataset, options.seed, &mut parts, part, share / left)?;
            left -= share;
        }
    }
    let split = Split::from_parts(&parts, dropped);
    let counts = dataset.class_counts(split.train.iter().copied());
    if let Some(class) = counts.iter().position(|&count| count == 0) {
        let published = dataset.class_counts(0..dataset.len())[class];
        // Publishers list classes that have no pictures at all; that is worth knowing, not an obstacle.
        if published > 0 {
            return Err(Error::usage(format!(
                "{}: the class {:?} has {published} items, none of them in train",
                dataset.name, dataset.classes[class]
            )));
        }
    }
    Ok(split)
}

fn check(options: &SplitOptions) -> Result<()> {
    let valid = |share: f64| (0.0..1.0).contains(&share);
    if !valid(options.val) || !valid(options.test) || options.val + options.test >= 1.0 {
        let (val, test) = (options.val, options.test);
        return Err(Error::usage(format!(
            "split shares val = {val}, test = {test}: expected 0 or more each, and less than 1 together"
        )));
    }
    Ok(())
}

/// The domains that `holdout_domain` names: one, even if its name has commas, or several between commas. Errors: `Usage` for one that
/// the data set does not have.
fn domains_of<'a>(dataset: &Dataset, holdout_domain: &'a str) -> Result<Vec<&'a str>> {
    let known: BTreeSet<&str> =
        dataset.items.iter().filter_map(|item| item.domain.as_deref()).collect();
    if known.contains(holdout_domain) {
        return Ok(vec![holdout_domain]);
    }
    let asked: Vec<&str> = holdout_domain.split(',').map(str::trim).collect();
    let Some(unknown) = asked.iter().find(|domain| !known.contains(*domain)) else {
        return Ok(asked);
    };
    let known = match known.is_empty() {
        true => "this data set has none".to_string(),
        false => known.into_iter().collect::<Vec<_>>().join(", "),
    };
    let name = &dataset.name;
    Err(Error::usage(format!("{name}: unknown domain {unknown:?} to hold out; known: {known}")))
}

/// Puts `domains` into `test`, and what the publishers had there from other domains into `id_test`.
fn hold_out(dataset: &Dataset, domains: &[&str], parts: &mut [Option<Part>]) {
    for (item, part) in dataset.items.iter().zip(parts) {
        if item.domain.as_deref().is_some_and(|domain| domains.contains(&domain)) {
            *part = Some(Part::Test);
        } else if *part == Some(Part::Test) {
            *part = Some(Part::IdTest);
        }
    }
}

/// The SHA-256 of item `index`: of its file's bytes, or of its pixels where one file holds many.
fn fingerprint(dataset: &Dataset, index: usize) -> Result<[u8; 32]> {
    dataset.check_readable(index)?;
    let arrays = matches!(
        dataset.format,
        Format::MedMnist | Format::PcamH5 | Format::Synthetic | Format::Custom
    );
    if !arrays {
        let path = &dataset.items[index].file;
        let bytes = fs::read(path).map_err(|source| Error::io(path, source))?;
        return Ok(Sha256::digest(bytes).into());
    }
    let image = dataset.image(index)?;
    let mut hash = Sha256::new();
    hash.update((image.width as u64).to_le_bytes());
    hash.update(image.pixels);
    Ok(hash.finalize().into())
}

/// Groups of identical items, each in increasing order, ordered by their first.
pub(super) fn duplicates(dataset: &Dataset) -> Result<Vec<Vec<usize>>> {
    if dataset.format == Format::Synthetic {
        return Ok(Vec::new()); // generated from different keys: drawing them all only to compare them would be waste
    }
    let prints = (0..dataset.len())
        .into_par_iter()
        .map(|index| fingerprint(dataset, index))
        .collect::<Result<Vec<_>>>()?;
    let mut same: HashMap<[u8; 32], Vec<usize>> = HashMap::new();
    for (index, print) in prints.into_iter().enumerate() {
        same.entry(print).or_default().push(index);
    }
    let mut groups: Vec<_> = same.into_values().filter(|group| group.len() > 1).collect();
    groups.sort();
    Ok(groups)
}

/// Takes superfluous copies out of their parts.
fn drop_duplicates(dataset: &Dataset, parts: &mut [Option<Part>]) -> Result<Vec<Dropped>> {
    let rank = |part: Option<Part>| {
        [Some(Part::Test), Some(Part::IdTest), Some(Part::Val), Some(Part::Train)]
            .iter()
            .position(|&other| other == part)
    };
    let mut dropped = Vec::new();
    for group in duplicates(dataset)? {
        let label = |index: usize| &dataset.classes[dataset.items[index].label as usize];
        let conflict = group.iter().any(|&index| label(index) != label(group[0]));
        let Some(&keeper) = group.iter().min_by_key(|&&index| (rank(parts[index]), index)) else {
            continue;
        };
        for &index in &group {
            // Copies inside an official test or validation part stay; one that judges more is never in a part that judges less.
            let stays = parts[index] == parts[keeper] && parts[index] != Some(Part::Train);
            if stays || (index == keeper && !conflict) {
                continue;
            }
            let reason = if conflict {
                let all = group
                    .iter()
                    .map(|&index| format!("{} is {}", dataset.items[index].id, label(index)))
                    .collect::<Vec<_>>();
                format!("conflicting labels: {}", all.join("; "))
            } else {
                format!("duplicate of {}", dataset.items[keeper].id)
            };
            parts[index] = None;
            dropped.push(Dropped { index, reason });
        }
    }
    dropped.sort_by_key(|dropped| dropped.index);
    Ok(dropped)
}

/// Moves a share of the training items to `part`: for each class the same share, whole groups.
fn carve(
    dataset: &Dataset,
    seed: u64,
    parts: &mut [Option<Part>],
    part: Part,
    share: f64,
) -> Result<()> {
    let mut counts = vec![0usize; dataset.classes.len()];
    let mut groups: BTreeMap<(Option<&str>, usize), Vec<usize>> = BTreeMap::new();
    for (index, item) in
        dataset.items.iter().enumerate().filter(|(index, _)| parts[*index] == Some(Part::Train))
    {
        counts[item.label as usize] += 1;
        // An item without a group is a group of its own, told apart by its number.
        let key = (item.group.as_deref(), if item.group.is_some() { 0 } else { index });
        groups.entry(key).or_default().push(index);
    }
    let mut strata = vec![Vec::new(); dataset.classes.len()];
    for group in groups.into_values() {
        strata[stratum(dataset, &counts, &group)].push(group);
    }
    for (class, mut groups) in strata.into_iter().enumerate() {
        if groups.is_empty() {
            continue;
        }
        if groups.len() < 2 {
            let (name, items) = (&dataset.classes[class], groups[0].len());
            return Err(Error::usage(format!(
                "{}: the class {name:?} has too few items to split: {items} in one group left for train and {}; expected at least 3 groups or items a class. \
                 Add some, leave the class out, or set the share of {} to 0",
                dataset.name,
                part.name(),
                part.name()
            )));
        }
        Draws::new(&[seed, part as u64, class as u64]).shuffle(&mut groups);
        let total: usize = groups.iter().map(Vec::len).sum();
        let wanted = ((total as f64 * share).round() as usize).max(1);
        let (mut taken, last) = (0, groups.len() - 1);
        for group in &groups[..last] {
            // Stop where taking one more group would miss the target by more than not taking it.
            if taken > 0 && 2 * taken + group.len() > 2 * wanted {
                break;
            }
            taken += group.len();
            group.iter().for_each(|&index| parts[index] = Some(part));
        }
    }
    Ok(())
}

/// The class under which a group is shared out: the rarest of those it has, so that rare classes reach every part.
fn stratum(dataset: &Dataset, counts: &[usize], group: &[usize]) -> usize {
    group
        .iter()
        .map(|&index| dataset.items[index].label as usize)
        .min_by_key(|&class| (counts[class], class))
        .unwrap_or(0)
}
