//! How many images of each class each part of a study's data has, from the split's file.

use std::path::Path;

use crate::{Error, Result};

/// Images by part and class, in the order of the split's file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Parts(Vec<(String, Vec<(String, usize)>)>);

impl Parts {
    /// Counts the rows of a split's file.
    pub(super) fn read(split: &Path) -> Result<Self> {
        let wrong = |e: csv::Error| Error::file(split, format!("{e}; delete it to split anew"));
        let mut parts = Self::default();
        for record in csv::Reader::from_path(split).map_err(wrong)?.records() {
            let record = record.map_err(wrong)?;
            let cell = |i| record.get(i).unwrap_or_default();
            parts.add(cell(0), cell(2));
        }
        Ok(parts)
    }

    fn add(&mut self, part: &str, class: &str) {
        let at = self.0.iter().position(|(name, _)| name == part).unwrap_or_else(|| {
            self.0.push((part.to_owned(), Vec::new()));
            self.0.len() - 1
        });
        let classes = &mut self.0[at].1;
        match classes.iter_mut().find(|(name, _)| name == class) {
            Some((_, count)) => *count += 1,
            None => classes.push((class.to_owned(), 1)),
        }
    }

    /// All rows, those of images that were left out too.
    pub(super) fn rows(&self) -> usize {
        self.0.iter().flat_map(|(_, classes)| classes).map(|(_, n)| n).sum()
    }

    /// Images of a part.
    pub(super) fn count(&self, part: &str) -> usize {
        let of = self.0.iter().find(|(name, _)| name == part);
        of.map_or(0, |(_, classes)| classes.iter().map(|(_, n)| n).sum())
    }

    /// Images by part, parts without images left out.
    pub(super) fn counts(&self) -> Vec<(String, usize)> {
        self.0.iter().map(|(part, _)| (part.clone(), self.count(part))).collect()
    }

    /// Classes that are trained on and have no image in a part by which models are chosen or judged.
    pub(super) fn absent(&self) -> Vec<(String, Vec<String>)> {
        let classes = |part: &str| self.0.iter().find(|(name, _)| name == part).map(|(_, c)| c);
        let trained = classes("train").map_or(&[][..], Vec::as_slice);
        let missing = |(part, has): &(String, Vec<(String, usize)>)| {
            let lacks = |name: &String| !has.iter().any(|(other, _)| other == name);
            let names: Vec<String> =
                trained.iter().map(|(name, _)| name).filter(|n| lacks(n)).cloned().collect();
            let counts = ["val", "test", "id_test"].contains(&part.as_str());
            (counts && !names.is_empty()).then(|| (part.clone(), names))
        };
        self.0.iter().filter_map(missing).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_a_split() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("split.csv");
        let rows =
            "train,a,x,\ntrain,b,y,\nval,c,x,\ntest,d,y,\ntest,e,x,\ndropped,f,y,duplicate of e\n";
        std::fs::write(&path, format!("split,id,label,note\n{rows}")).unwrap();
        let parts = Parts::read(&path).unwrap();
        assert_eq!((parts.rows(), parts.count("test"), parts.count("id_test")), (6, 2, 0));
        assert_eq!(parts.absent(), [("val".to_owned(), vec!["y".to_owned()])]);
        std::fs::write(&path, format!("split,id,label,note\n{rows}train,g")).unwrap();
        let error = Parts::read(&path).unwrap_err().to_string();
        assert!(
            error.contains("split.csv") && error.contains("delete it to split anew"),
            "{error}"
        );
    }
}
