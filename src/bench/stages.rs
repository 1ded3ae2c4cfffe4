//! Attention against convolution: at each stage of a net, everything that could stand there and give an output of the same
//! shape. Names are `<net>_<channels>x<map>_<unit>`, with `n` where there are not 8 images.

use super::row::{Outside, Place, Position, Row, Size, Subject};

/// Net, channels and map of its stages at 224 x 224: a ResNet's 3x3 convolutions, and the depthwise convolutions of
/// EfficientNet-B0 at stride 1, whose place attention takes in a block.
const STAGES: [(&str, usize, usize); 10] = [
    ("resnet18", 64, 56),
    ("resnet18", 128, 28),
    ("resnet18", 256, 14),
    ("resnet18", 512, 7),
    ("efficientnet_b0", 32, 112),
    ("efficientnet_b0", 144, 56),
    ("efficientnet_b0", 240, 28),
    ("efficientnet_b0", 480, 14),
    ("efficientnet_b0", 672, 14),
    ("efficientnet_b0", 1152, 7),
];
/// Heads, as the models have them unless they are told otherwise.
const HEADS: usize = 8;
/// Maps up to this size have a row for the whole block: projections and attention together.
const BLOCK_MAP: usize = 14;
/// Global attention over more than 10,000 places takes seconds an image.
const LARGE_MAP: usize = 112;

/// The suite `attention-vs-conv`.
pub(crate) fn rows(size: Size) -> Vec<Row> {
    if size == Size::Tiny {
        return stage("tiny", [2, 16, 6], "");
    }
    let images = |map| match (size, map == LARGE_MAP) {
        (Size::Large, true) => 8,
        (Size::Large, false) => 64,
        (_, true) => 1,
        (_, false) => 8,
    };
    let rows = |&(net, channels, map): &(&str, usize, usize)| {
        let n = images(map);
        let end = if n == 8 { String::new() } else { format!("_n{n}") };
        stage(net, [n, channels, map], &end)
    };
    STAGES.iter().flat_map(rows).collect()
}

/// The rows of a stage, convolutions first.
fn stage(net: &str, sizes: [usize; 3], end: &str) -> Vec<Row> {
    let [_, channels, map] = sizes;
    let shape = format!("{channels}x{map}");
    let row = |(unit, subject): (String, Subject)| Row {
        name: format!("{net}_{shape}_{unit}{end}"),
        suite: "attention-vs-conv".into(),
        place: Place::Stage { net: net.into(), shape: shape.clone(), unit },
        subject,
    };
    units(sizes).into_iter().map(row).collect()
}

/// What can stand at a place: local windows without positions (`la`), with them (`ela`), and global attention with them (`ga`).
fn units([n, channels, size]: [usize; 3]) -> Vec<(String, Subject)> {
    let (heads, d) = (HEADS, channels / HEADS);
    let conv = |kernel| Subject::Conv2d { n, size, channels, out: channels, kernel, stride: 1 };
    let depthwise = |kernel| Subject::Depthwise { n, size, channels, kernel, stride: 1 };
    let local = |window, position| Subject::LocalAttention {
        n,
        size,
        heads,
        d,
        window,
        border: Outside::Mask,
        position,
    };
    let mut units = vec![
        ("conv_3x3".into(), conv(3)),
        ("conv_1x1".into(), conv(1)),
        ("depthwise_3x3".into(), depthwise(3)),
        ("depthwise_5x5".into(), depthwise(5)),
    ];
    for window in [3, 5, 7, 9, 11, 13] {
        units.push((format!("local_k{window}"), local(window, Position::None)));
    }
    units.push(("embedded_k7".into(), local(7, Position::Rel)));
    let position = Position::Rel;
    units.push(("global".into(), Subject::GlobalAttention { n, size, heads, d, position }));
    if size <= BLOCK_MAP {
        units.push(("block".into(), Subject::AttentionBlock { n, size, heads, d }));
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::prepare;
    use crate::{DType, Device};

    #[test]
    fn everything_at_a_stage_gives_the_same_output() {
        let device = Device::cpu();
        for row in rows(Size::Tiny) {
            let calls = prepare(&row, &device, DType::F32).unwrap();
            let y = (calls.taped.unwrap().output)().unwrap();
            assert_eq!((y.numel(), y.shape()[..3].to_vec()), (2 * 6 * 6 * 16, vec![2, 6, 6]));
        }
        let small = rows(Size::Small);
        assert_eq!(small.len(), 10 * 12 + 5, "five stages are small enough for a block");
        assert!(small.iter().all(|r| r.name.starts_with("resnet18") || r.name.contains("_b0_")));
    }
}
