//! MedMNIST's archives of arrays.

use super::*;

/// A `.npy` file: version 1 header, then the bytes.
fn npy(descr: &str, shape: &[usize], bytes: &[u8]) -> Vec<u8> {
    let sides: String = shape.iter().map(|side| format!("{side},")).collect();
    let mut header =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({sides}), }}");
    header.push_str(&" ".repeat(63 - (10 + header.len()) % 64));
    header.push('\n');
    [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), bytes]
        .concat()
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    };
    !bytes.iter().fold(!0, step)
}

/// Arrays of an `.npz` file by name.
type Members = Vec<(&'static str, Vec<u8>)>;

/// A zip with stored (not compressed) members, as `numpy.savez` writes it.
fn npz(path: &Path, members: &Members) {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in members {
        let name = format!("{name}.npy");
        let (offset, length) = (file.len() as u32, (bytes.len() as u32).to_le_bytes());
        let common = [
            &[20, 0, 0, 0, 0, 0, 0, 0, 0, 0][..],
            &crc32(bytes).to_le_bytes(),
            &length,
            &length,
            &(name.len() as u16).to_le_bytes(),
            &[0, 0],
        ]
        .concat();
        file.extend([b"PK\x03\x04", &common[..], name.as_bytes(), bytes].concat());
        directory.extend(
            [b"PK\x01\x02\x14\x00", &common[..], &[0; 10], &offset.to_le_bytes(), name.as_bytes()]
                .concat(),
        );
    }
    let (count, start) = ((members.len() as u16).to_le_bytes(), (file.len() as u32).to_le_bytes());
    let size = (directory.len() as u32).to_le_bytes();
    file.extend(
        [&directory[..], b"PK\x05\x06\0\0\0\0", &count, &count, &size, &start, &[0, 0]].concat(),
    );
    fs::write(path, file).unwrap();
}

/// Three parts of ten 4x4 pictures, colour or grey, with two classes.
fn medmnist(colour: bool) -> Members {
    let channels = if colour { 3 } else { 1 };
    let shape: Vec<usize> = if colour { vec![10, 4, 4, 3] } else { vec![10, 4, 4] };
    let names = [
        ("train_images", "train_labels"),
        ("val_images", "val_labels"),
        ("test_images", "test_labels"),
    ];
    let mut members = Vec::new();
    for (part, (images, labels)) in names.into_iter().enumerate() {
        let pixels: Vec<u8> =
            (0..10 * 16 * channels).map(|place| (place * 3 + part * 101) as u8).collect();
        members.push((images, npy("|u1", &shape, &pixels)));
        members.push((labels, npy("|u1", &[10, 1], &[0, 1, 0, 1, 0, 1, 0, 1, 0, 1])));
    }
    members
}

#[test]
fn medmnist_grey_and_colour() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("some.npz");
    npz(&path, &medmnist(true));
    let set = open(dir.path()); // the folder holds one .npz file
    assert_eq!((set.format, set.len()), (Format::MedMnist, 30));
    assert_eq!(set.image(1).unwrap().pixels[..4], [144, 147, 150, 153]);
    npz(&path, &medmnist(false));
    let set = open(&path);
    assert_eq!(set.image(1).unwrap().pixels[..6], [48, 48, 48, 51, 51, 51]);
    assert_eq!((set.items[29].id.as_str(), set.items[29].official), ("test/9", Some(Part::Test)));
}

/// Whatever stands in an array whose pictures are all sealed, the file opens without it.
#[test]
fn sealed_arrays_stay_in_the_npz_file() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("some.npz");
    let mut members = medmnist(false);
    members[4].1 = npy("|u1", &[10, 4, 4], &[7; 100]); // 60 bytes too few
    npz(&path, &members);
    assert_says(&refusal(&path), &["test_images", "160 bytes", "100"]);
    let split = write(
        dir.path(),
        "split.csv",
        "split,id,label,note\ntrain,train/0,class 0,\nval,val/3,class 0,\ntest,test/1,class 0,\ndropped,train/2,class 0,why\n",
    );
    let readable = Some(Split::learnt_from_ids(&split).unwrap());
    let set = data::open(&path, &Options { readable, ..skip_bad() }).unwrap();
    assert_eq!((set.len(), set.skipped.len()), (30, 0));
    for index in 0..30 {
        let readable = ["train/0", "val/3"].contains(&set.items[index].id.as_str());
        assert_eq!(set.is_sealed(index), !readable);
        match set.image(index) {
            Ok(image) => assert!(readable && image.pixels.len() == 48),
            Err(error) => assert!(!readable && error.to_string().contains("is sealed"), "{error}"),
        }
    }
}

#[test]
fn npz_files_that_are_not_medmnist() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("odd.npz");
    let with = |change: &dyn Fn(&mut Members)| {
        let mut members = medmnist(false);
        change(&mut members);
        npz(&path, &members);
        refusal(&path)
    };
    assert_says(
        &with(&|m| drop(m.remove(3))),
        &[
            "odd.npz",
            "no array \"val_labels\"",
            "found [test_images, test_labels, train_images, train_labels, val_images]",
        ],
    );
    assert_says(
        &with(&|m| m[0].1 = npy("<f4", &[10, 4, 4], &[0; 640])),
        &["odd.npz", "train_images", "<f4", "expected u8"],
    );
    assert_says(
        &with(&|m| m[0].1 = npy("<u2", &[10, 4, 4], &[0; 320])),
        &["train_images", "2 bytes", "expected u8"],
    );
    assert_says(
        &with(&|m| m[0].1 = npy("|u1", &[10, 4, 4, 4], &[0; 640])),
        &["train_images", "[10, 4, 4, 4]", "expected [N, S, S]"],
    );
    assert_says(
        &with(&|m| m[5].1 = npy("|u1", &[10, 2], &[0; 20])),
        &["test_labels", "2 labels a picture"],
    );
    assert_says(
        &with(&|m| m[5].1 = npy("|u1", &[9, 1], &[0; 9])),
        &["test_labels", "[9, 1]", "expected [10, 1]"],
    );
    assert_says(
        &with(&|m| m[4].1 = npy("|u1", &[10, 4, 4], &[0; 100])),
        &["test_images", "160 bytes", "100"],
    );
    assert_says(
        &with(&|m| m[4].1 = b"\x93NUMPY\x01\x00\x05".to_vec()),
        &["test_images", "cannot be read"],
    );
    npz(&path, &medmnist(false));
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert_says(&refusal(&path), &["odd.npz", "not a readable .npz", "fetch the file again"]);
}
