//! Splits: parts, duplicates, shares, and loaders of what is left.

use super::*;

/// A data set without files: picture `i` is flat, with the colour `colours[i]`.
fn flat(colours: Vec<u8>, items: Vec<Item>) -> Dataset {
    let decode =
        move |index: usize| Ok(Image { width: 2, height: 2, pixels: vec![colours[index]; 12] });
    Dataset::new("flat", vec!["a".into(), "b".into()], items, Box::new(decode)).unwrap()
}

fn item(id: usize, label: u32, official: Option<Part>) -> Item {
    Item {
        id: format!("i{id}"),
        label,
        group: None,
        domain: None,
        official,
        file: Path::new("none").into(),
    }
}

#[test]
fn of_duplicates_one_is_kept_where_it_judges_and_conflicts_are_reported() {
    use Part::{Test, Train, Val};
    let parts = [Train, Train, Train, Val, Test, Test, Train, Train, Train];
    let labels = [0, 0, 1, 0, 1, 1, 0, 1, 1];
    //             i0 = i1;  i2 = i4 = i5 (two of them official test); i3 = i0; i6 and i7 conflict; i8 alone
    let colours = vec![10, 10, 20, 10, 20, 20, 30, 30, 40];
    let items = (0..9).map(|index| item(index, labels[index], Some(parts[index]))).collect();
    let set = flat(colours, items);
    let error = data::split(&set, &SplitOptions::default()).unwrap_err().to_string();
    assert_says(&error, &["class \"a\"", "none of them in train"]);

    let keep_all = SplitOptions { dedup: false, ..SplitOptions::default() };
    assert_eq!(data::split(&set, &keep_all).unwrap().train, [0, 1, 2, 6, 7, 8]);

    let items = (0..9)
        .map(|index| item(index, labels[index], Some(parts[index])))
        .chain([item(9, 0, Some(Train))])
        .collect();
    let set = flat(vec![10, 10, 20, 10, 20, 20, 30, 30, 40, 50], items);
    let split = data::split(&set, &SplitOptions::default()).unwrap();
    assert_eq!(
        (&split.train[..], &split.val[..], &split.test[..]),
        (&[8, 9][..], &[3][..], &[4, 5][..])
    );
    let reasons: Vec<&str> = split.dropped.iter().map(|dropped| dropped.reason.as_str()).collect();
    let conflict = "conflicting labels: i6 is a; i7 is b";
    assert_eq!(
        reasons,
        ["duplicate of i3", "duplicate of i3", "duplicate of i4", conflict, conflict]
    );
}

#[test]
fn splits_are_stratified_seeded_and_the_same_when_read_back() {
    let dir = TempDir::new().unwrap();
    two_classes(dir.path(), 40);
    let set = open(dir.path());
    let options = SplitOptions::default();
    let split = data::split(&set, &options).unwrap();
    assert_eq!(split, data::split(&set, &options).unwrap());
    assert_ne!(split, data::split(&set, &SplitOptions { seed: 1, ..options }).unwrap());
    for part in [&split.val, &split.test] {
        assert_eq!(set.class_counts(part.iter().copied()), [6, 6]);
    }
    let path = dir.path().join("split.csv");
    split.write(&set, &path).unwrap();
    assert_eq!(Split::read(&set, &path).unwrap(), split);

    let text = fs::read_to_string(&path).unwrap();
    let broken = |from: &str, to: &str| {
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        Split::read(&set, &path).unwrap_err().to_string()
    };
    assert_says(
        &broken("cat/0.png", "cat/hat.png"),
        &["split.csv", "unknown id \"cat/hat.png\"", "other data"],
    );
    assert_says(
        &broken("cat/0.png,cat", "cat/0.png,dog"),
        &["split.csv", "cat/0.png", "labels changed"],
    );
    assert_says(&broken("cat/0.png", "cat/1.png"), &["split.csv", "cat/1.png", "twice"]);
    assert_says(&broken("train,", "drain,"), &["split.csv", "line 2", "drain"]);
}

/// What a study judges by: a test from elsewhere, one from the training's own domains, and a validation part that knows nothing of the
/// domain held out, whatever the publishers gave.
#[test]
fn a_domain_held_out_is_the_test_and_nothing_else() {
    use Part::{Test, Train, Val};
    let domains = ["a", "b", "c", "d, e"];
    let items = |official: &dyn Fn(usize) -> Option<Part>| {
        let one = |index: usize| Item {
            domain: Some(domains[index % 4].into()),
            ..item(index, (index / 4 % 2) as u32, official(index))
        };
        (0..160).map(one).collect::<Vec<_>>()
    };
    let set = |items: Vec<Item>| flat((0..160).map(|index| index as u8).collect(), items);
    let published = [Train, Train, Train, Val, Test];
    let shapes: [&dyn Fn(usize) -> Option<Part>; 4] = [
        &|_| None,
        &|index| Some(published[index / 8 % 5]),
        &|index| Some(if index % 4 == 1 { Val } else { Train }), // all validation pictures are of domain b
        &|index| Some(if index % 4 == 1 { Test } else { Train }),
    ];
    for official in shapes {
        let set = set(items(official));
        for (asked, held_out) in [("b", &["b"][..]), ("c, b", &["b", "c"]), ("d, e", &["d, e"])] {
            let options =
                SplitOptions { holdout_domain: Some(asked.into()), ..SplitOptions::default() };
            let split = data::split(&set, &options).unwrap();
            let away =
                |index: &usize| held_out.contains(&set.items[*index].domain.as_deref().unwrap());
            assert!(split.test.iter().all(away), "{asked}: {:?}", split.test);
            assert_eq!(split.test.len(), 40 * held_out.len());
            assert!(!split.learnt_from().iter().chain(&split.id_test).any(away), "{asked}");
            for part in [Train, Val, Part::IdTest] {
                let counts = set.class_counts(split.part(part).iter().copied());
                assert!(counts.iter().all(|&count| count > 0), "{asked}: {}", part.name());
            }
            assert_eq!(split.learnt_from().len() + split.id_test.len() + split.test.len(), 160);
        }
    }
}

#[test]
fn shares_classes_and_domains_that_do_not_fit() {
    let dir = TempDir::new().unwrap();
    two_classes(dir.path(), 5);
    picture(dir.path(), "rare/only.png", 77);
    let set = open(dir.path());
    let refused = |options: SplitOptions| data::split(&set, &options).unwrap_err().to_string();
    assert_says(&refused(SplitOptions::default()), &["class \"rare\"", "too few", "at least 3"]);
    assert_says(
        &refused(SplitOptions { val: 0.7, test: 0.5, ..SplitOptions::default() }),
        &["val = 0.7", "less than 1"],
    );
    assert_says(
        &refused(SplitOptions { holdout_domain: Some("moon".into()), ..SplitOptions::default() }),
        &["\"moon\"", "has none"],
    );
    let none = data::split(&set, &SplitOptions { val: 0.0, test: 0.0, ..SplitOptions::default() })
        .unwrap();
    assert_eq!((none.train.len(), none.val.len()), (11, 0));
}

#[test]
fn loaders_that_cannot_work_say_why() {
    let set = Arc::new(flat(vec![0; 4], (0..4).map(|index| item(index, 0, None)).collect()));
    let refused = |indices: Vec<usize>, transform: Transform, options: LoaderOptions| {
        Loader::new(set.clone(), indices, transform, options).err().unwrap().to_string()
    };
    let options = LoaderOptions::default;
    assert_says(&refused(vec![], Transform::eval(8), options()), &["no items"]);
    assert_says(&refused(vec![9], Transform::eval(8), options()), &["no item 9"]);
    assert_says(&refused(vec![0], Transform::eval(0), options()), &["image size 0"]);
    assert_says(
        &refused(vec![0], Transform::eval(8), LoaderOptions { batch_size: 0, ..options() }),
        &["batch size 0"],
    );
    assert_says(
        &refused(vec![0], Transform::eval(8), LoaderOptions { drop_last: true, ..options() }),
        &["fewer than one batch"],
    );
    let loader = Loader::new(
        set.clone(),
        vec![0, 1, 2],
        Transform::train(8, &Augment::default()),
        LoaderOptions { batch_size: 2, drop_last: true, ..options() },
    )
    .unwrap();
    assert_eq!(
        (
            loader.batches(),
            loader.epoch(0, 0).unwrap().count(),
            loader.epoch(0, 5).unwrap().count()
        ),
        (1, 1, 0)
    );
}
