//! Conformance of [`conv2d`]: cases and the reference.

use super::{Conv2d, conv2d, output_size};
use crate::error::Result;
use crate::ops::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};

/// Conformance of [`conv2d`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: "conv2d",
    inputs: &[
        Port::new("x", Layout::Image).stored(),
        Port::new("weight", Layout::Weight).stored(),
        Port::new("bias", Layout::Plain).optional(),
    ],
    outputs: &[Port::new("y", Layout::Image).stored()],
    attrs: &["stride", "padding", "dilation", "groups"],
    cases,
    run: |attrs: &Attrs, t: &Tensors| {
        let options = options(attrs)?;
        let (x, w) = (need("conv2d", t, "x")?, need("conv2d", t, "weight")?);
        Ok(Tensors::from([("y".into(), conv2d(x, w, t.get("bias"), options)?)]))
    },
    reference,
};

/// The options that a case's attributes mean.
pub(in crate::ops) fn options(attrs: &Attrs) -> Result<Conv2d> {
    Ok(Conv2d {
        stride: attrs.pair("stride", [1, 1])?,
        padding: attrs.pair("padding", [0, 0])?,
        dilation: attrs.pair("dilation", [1, 1])?,
        groups: attrs.usize("groups", 1)?,
    })
}

fn cases() -> Vec<Case> {
    let mut cases = dense_cases();
    cases.extend(grouped_cases());
    cases.extend(depthwise_cases());
    cases
}

fn case(
    label: &str,
    x: [usize; 4],
    w: [usize; 4],
    stride: [usize; 2],
    padding: [usize; 2],
) -> Case {
    Case::new(label)
        .attr("stride", stride.to_vec())
        .attr("padding", padding.to_vec())
        .normal("x", &x)
        .normal("weight", &w)
}

fn dense_cases() -> Vec<Case> {
    vec![
        case("one element", [1, 1, 1, 1], [1, 1, 1, 1], [1, 1], [0, 0]),
        case("3x3", [1, 5, 4, 4], [8, 3, 3, 4], [1, 1], [1, 1]),
        case("3x3 odd channels and bias", [2, 4, 7, 5], [7, 3, 3, 5], [1, 1], [1, 1])
            .normal("bias", &[7]),
        case("3x3 stride 2", [2, 5, 6, 4], [8, 3, 3, 4], [2, 2], [1, 1]).normal("bias", &[8]),
        case("1x1", [1, 7, 5, 8], [12, 1, 1, 8], [1, 1], [0, 0]),
        case("1x1 stride 2", [2, 7, 5, 4], [4, 1, 1, 4], [2, 2], [0, 0]),
        case("one-pixel map", [2, 1, 1, 33], [4, 1, 1, 33], [1, 1], [0, 0]).normal("bias", &[4]),
        case("one-pixel map under 3x3", [1, 1, 1, 4], [4, 3, 3, 4], [1, 1], [1, 1]),
        case("oblong kernel, stride and padding", [1, 7, 9, 3], [5, 2, 5, 3], [3, 1], [0, 2]),
        case("stride past the kernel", [1, 8, 7, 4], [4, 2, 1, 4], [3, 4], [1, 0]),
        case("padding past the kernel", [1, 3, 2, 1], [2, 1, 3, 1], [1, 1], [2, 4]),
        case("stem, C = 3", [1, 15, 13, 3], [10, 7, 7, 3], [2, 2], [3, 3]).no_gradcheck(),
        case("a tile and more, C = 1", [1, 33, 33, 1], [17, 3, 3, 1], [1, 1], [1, 1])
            .normal("bias", &[17])
            .no_gradcheck(),
        case("a tile and more", [2, 14, 13, 32], [36, 3, 3, 32], [1, 1], [1, 1]).no_gradcheck(),
        case("a tile and more, stride 2", [1, 27, 29, 16], [129, 3, 3, 16], [2, 2], [1, 1])
            .no_gradcheck(),
        case(
            "stride past the kernel, past a tile",
            [1, 20, 26, 32],
            [36, 2, 1, 32],
            [3, 4],
            [1, 0],
        )
        .no_gradcheck(),
        case("1x1 stride 2, few outputs of a tile", [1, 17, 16, 36], [4, 1, 1, 36], [2, 2], [0, 0])
            .no_gradcheck(),
        case("stride 2, past a tile of vectors", [1, 19, 18, 36], [68, 3, 3, 36], [2, 2], [1, 1])
            .no_gradcheck(),
        case("vectors of eight", [1, 4, 5, 8], [8, 3, 3, 8], [1, 1], [1, 1]).normal("bias", &[8]),
        case("vectors of eight, past a tile", [1, 13, 11, 40], [72, 3, 3, 40], [1, 1], [1, 1])
            .normal("bias", &[72])
            .no_gradcheck(),
        case("vectors of eight, many taps", [1, 15, 4, 8], [8, 13, 1, 8], [1, 1], [3, 0])
            .no_gradcheck(),
        case("vectors of eight, twelve rows of taps", [1, 15, 4, 8], [8, 12, 1, 8], [1, 1], [3, 1])
            .no_gradcheck(),
        case("vectors of eight, stride 2", [2, 17, 18, 16], [24, 3, 3, 16], [2, 2], [1, 1])
            .no_gradcheck(),
        case("odd channels beyond a tile", [1, 9, 7, 33], [65, 3, 3, 33], [1, 2], [1, 1])
            .no_gradcheck(),
    ]
}

/// Channels or outputs of a group are more than one.
fn grouped_cases() -> Vec<Case> {
    let groups = |case: Case, groups: usize| case.attr("groups", groups);
    vec![
        groups(case("2 groups", [2, 4, 5, 6], [4, 3, 3, 3], [1, 1], [1, 1]), 2),
        groups(case("3 groups, bias, stride 2", [1, 7, 6, 6], [9, 3, 2, 2], [2, 2], [1, 0]), 3)
            .normal("bias", &[9]),
        groups(
            case(
                "groups of one channel, 2 outputs each",
                [2, 5, 4, 7],
                [14, 3, 3, 1],
                [1, 1],
                [1, 1],
            ),
            7,
        )
        .normal("bias", &[14]),
        groups(
            case(
                "groups of 3 channels, one output each",
                [1, 4, 4, 15],
                [5, 1, 1, 3],
                [1, 1],
                [0, 0],
            ),
            5,
        ),
        groups(
            case("4 groups, more than a block", [2, 11, 9, 32], [36, 3, 3, 8], [1, 2], [1, 1]),
            4,
        )
        .no_gradcheck(),
    ]
}

/// A kernel for each channel.
fn depthwise_cases() -> Vec<Case> {
    let case =
        |label: &str, n: usize, [h, w, c]: [usize; 3], [kh, kw]: [usize; 2], stride, padding| {
            case(label, [n, h, w, c], [c, kh, kw, 1], stride, padding).attr("groups", c)
        };
    vec![
        case("depthwise 3x3", 2, [5, 6, 8], [3, 3], [1, 1], [1, 1]),
        case("depthwise 3x3, 7 channels, bias", 2, [4, 9, 7], [3, 3], [1, 1], [1, 1])
            .normal("bias", &[7]),
        case("depthwise 3x3 stride 2", 1, [8, 7, 4], [3, 3], [2, 2], [1, 1]).normal("bias", &[4]),
        case("depthwise 5x5", 1, [6, 7, 8], [5, 5], [1, 1], [2, 2]),
        case("depthwise 5x5 stride 2, 3 channels", 1, [7, 8, 3], [5, 5], [2, 2], [2, 2]),
        case("depthwise one pixel", 2, [1, 1, 33], [3, 3], [1, 1], [1, 1]),
        case("depthwise oblong", 1, [9, 7, 5], [2, 4], [3, 1], [0, 2]).normal("bias", &[5]),
        case("depthwise stride past the kernel", 1, [8, 7, 2], [2, 1], [3, 4], [1, 0]),
        case("depthwise padding past the kernel", 1, [3, 2, 4], [3, 3], [1, 1], [4, 5]),
        case("depthwise 5x5 stride 2, no padding", 1, [9, 12, 6], [5, 5], [2, 2], [0, 0]),
        case("depthwise 3x3, past a tile", 2, [17, 19, 33], [3, 3], [1, 1], [1, 1]).no_gradcheck(),
        case("depthwise 3x3 stride 2, past a tile", 1, [34, 33, 24], [3, 3], [2, 2], [1, 1])
            .no_gradcheck(),
        case("depthwise 5x5, past a tile", 1, [18, 23, 40], [5, 5], [1, 1], [2, 2]).no_gradcheck(),
        case("depthwise 5x5 stride 2, past a tile", 2, [19, 35, 16], [5, 5], [2, 2], [2, 2])
            .normal("bias", &[16])
            .no_gradcheck(),
        case("depthwise 7x7", 1, [15, 14, 12], [7, 7], [1, 1], [3, 3]).no_gradcheck(),
    ]
}

fn reference(attrs: &Attrs, a: &Arrays) -> Result<Arrays> {
    let options = options(attrs)?;
    let (x, w) = (need("conv2d", a, "x")?, need("conv2d", a, "weight")?);
    let (out, (kh, kw)) = (w.shape[0], (w.shape[1], w.shape[2]));
    let [n, h, width] = [0, 1, 2].map(|i| x.shape[i]);
    // Channels of a group.
    let c = w.shape[3];
    let p = output_size("height", h, kh, options.stride.0, options.padding.0)?;
    let q = output_size("width", width, kw, options.stride.1, options.padding.1)?;
    let mut y = Array::zeros(&[n, p, q, out]);
    for i in 0..y.data.len() {
        let (o, col, row, image) = (i % out, i / out % q, i / out / q % p, i / out / q / p);
        let first = o / (out / options.groups) * c;
        let mut sum = a.get("bias").map_or(0.0, |b| b.get(&[o]));
        for tap in 0..kh * kw {
            let (r, s) = (tap / kw, tap % kw);
            let (y, x_) = (row * options.stride.0 + r, col * options.stride.1 + s);
            // In the padded image; the border is zero.
            if y < options.padding.0 || x_ < options.padding.1 {
                continue;
            }
            let (y, x_) = (y - options.padding.0, x_ - options.padding.1);
            if y >= h || x_ >= width {
                continue;
            }
            sum += (0..c)
                .map(|k| x.get(&[image, y, x_, first + k]) * w.get(&[o, r, s, k]))
                .sum::<f64>();
        }
        y.data[i] = sum;
    }
    Ok(Arrays::from([("y".into(), y)]))
}
