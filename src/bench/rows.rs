//! The table of rows. Names say what differs: channels x map for convolutions and local attention, tokens `t` and channels
//! of a head `d` for global attention, `k` for a window; `n` and `h` (images and heads) where they are not 8.

use super::row::{Outside, Place, Position, Row, Size, Subject};

/// Everything of the suite `ops`.
pub(crate) fn ops(size: Size) -> Vec<Row> {
    let rows = match size {
        Size::Tiny => tiny_ops(),
        Size::Small => small_ops(),
        Size::Large => large_ops(),
    };
    let row = |(name, subject)| Row { name, suite: "ops".into(), place: Place::Alone, subject };
    rows.into_iter().map(row).collect()
}

/// Everything of the suite `step`. `ga` and `la7`: attention for the second 3x3 of each block of stages 3 and 4; `la7` with
/// relative positions and zero border, as the usual `unfold` formulation has it.
pub(crate) fn step(size: Size) -> Vec<Row> {
    let row = |name: &str, model: &str, size: usize, n: usize| Row {
        name: format!("{name}_step_{size}_b{n}"),
        suite: "step".into(),
        place: Place::Alone,
        subject: Subject::Step { model: model.into(), size, n },
    };
    match size {
        Size::Tiny => {
            let model = "resnet18:w8,stages=2,stem=small+ga@2:heads=2";
            vec![row("resnet18_tiny_ga", model, 8, 2)]
        }
        Size::Small => vec![
            row("resnet18", "resnet18", 64, 32),
            row("resnet18", "resnet18", 224, 8),
            row("resnet18_ga", "resnet18+ga@3,4", 64, 32),
            row("resnet18_ga", "resnet18+ga@3,4", 224, 8),
            row("resnet18_la7", "resnet18+ela7@3,4:border=zero", 64, 32),
            row("resnet18_la7", "resnet18+ela7@3,4:border=zero", 224, 8),
            row("efficientnet_b0", "efficientnet_b0", 224, 8),
            row("vit_ti_16", "vit_ti_16", 224, 8),
        ],
        Size::Large => vec![
            row("resnet18", "resnet18", 224, 128),
            row("resnet18_ga4", "resnet18+ga@4", 224, 128),
            row("resnet18_la7_mask", "resnet18+la7@3,4", 224, 128),
            row("efficientnet_b0", "efficientnet_b0", 224, 128),
            row("vit_ti_16", "vit_ti_16", 224, 128),
        ],
    }
}

type Named = (String, Subject);

/// `channels x size`, 3x3 at step 1.
fn conv(n: usize, channels: usize, size: usize) -> Named {
    let subject = Subject::Conv2d { n, size, channels, out: channels, kernel: 3, stride: 1 };
    (format!("conv2d_3x3_{channels}x{size}"), subject)
}

/// Where a stage of a ResNet begins: `kernel` at step 2 from 64 to 128 channels.
fn conv_down(n: usize, size: usize, kernel: usize) -> Named {
    let subject = Subject::Conv2d { n, size, channels: 64, out: 128, kernel, stride: 2 };
    (format!("conv2d_{kernel}x{kernel}_s2_64_128x{size}"), subject)
}

fn stem(n: usize, size: usize) -> Named {
    let subject = Subject::Conv2d { n, size, channels: 3, out: 64, kernel: 7, stride: 2 };
    ("conv2d_stem_7x7_s2".into(), subject)
}

/// `channels x size`, a kernel for each channel.
fn depthwise(n: usize, channels: usize, size: usize, kernel: usize, stride: usize) -> Named {
    let step = if stride == 1 { String::new() } else { format!("_s{stride}") };
    let subject = Subject::Depthwise { n, size, channels, kernel, stride };
    (format!("depthwise_{kernel}x{kernel}{step}_{channels}x{size}"), subject)
}

/// `channels x size`, with a quarter of the channels before the block's expansion by 6 between the layers, as EfficientNet has it.
fn squeeze_excite(n: usize, channels: usize, size: usize) -> Named {
    let subject = Subject::SqueezeExcite { n, size, channels, squeezed: channels / 24 };
    (format!("squeeze_excite_{channels}x{size}"), subject)
}

fn linear(rows: usize, inputs: usize, outputs: usize) -> Named {
    (format!("linear_{rows}x{inputs}_{outputs}"), Subject::Linear { rows, inputs, outputs })
}

/// The two norms of a ResNet block: with ReLU, and with a residual too.
fn batch_norm(n: usize, channels: usize, size: usize, residual: bool) -> Named {
    let add = if residual { "_add" } else { "" };
    let subject = Subject::BatchNorm { n, size, channels, residual };
    (format!("batch_norm{add}_relu_{channels}x{size}"), subject)
}

fn max_pool(n: usize, channels: usize, size: usize) -> Named {
    (format!("max_pool2d_3x3_s2_{channels}x{size}"), Subject::MaxPool2d { n, size, channels })
}

fn global(n: usize, heads: usize, size: usize, d: usize, position: Position) -> Named {
    let kind = match position {
        Position::None => "",
        Position::Rel => "_rel",
        Position::Bias => "_bias",
    };
    let subject = Subject::GlobalAttention { n, size, heads, d, position };
    (format!("global_attention{kind}_t{}_d{d}", size * size), subject)
}

/// Zero border as the peers' `unfold` has it, or masked; `rel` tables, which get gradients too.
fn local(n: usize, heads: usize, d: usize, size: usize, window: usize, border: Outside) -> Named {
    let position = Position::Rel;
    let subject = Subject::LocalAttention { n, size, heads, d, window, border, position };
    (format!("local_attention_k{window}_{}x{size}", heads * d), subject)
}

/// As wide as `heads` of `d`.
fn block(n: usize, heads: usize, size: usize, d: usize) -> Named {
    let subject = Subject::AttentionBlock { n, size, heads, d };
    (format!("attention_block_{}x{size}", heads * d), subject)
}

/// The same under a longer name.
fn named((name, subject): Named, more: &str) -> Named {
    (name + more, subject)
}

/// The depthwise convolutions of EfficientNet-B0 at 224 x 224.
fn depthwise_rows(n: usize) -> Vec<Named> {
    let shapes = [
        (32, 112, 3, 1),
        (96, 112, 3, 2),
        (144, 56, 3, 1),
        (144, 56, 5, 2),
        (240, 28, 5, 1),
        (240, 28, 3, 2),
        (480, 14, 3, 1),
        (480, 14, 5, 1),
        (672, 14, 5, 1),
        (672, 14, 5, 2),
        (1152, 7, 5, 1),
        (1152, 7, 3, 1),
    ];
    shapes.map(|(channels, size, kernel, step)| depthwise(n, channels, size, kernel, step)).into()
}

/// N = 8: the shapes of ResNet18 at 224 x 224, 8 heads; the depthwise convolutions of EfficientNet-B0.
fn small_ops() -> Vec<Named> {
    let n = 8;
    let local =
        |channels: usize, size, window| local(n, 8, channels / 8, size, window, Outside::Zero);
    let global = |size, d, position| global(n, 8, size, d, position);
    let mut rows = vec![
        conv(n, 64, 56),
        conv(n, 128, 28),
        conv(n, 256, 14),
        conv(n, 512, 7),
        conv_down(n, 56, 3),
        conv_down(n, 56, 1),
        stem(n, 224),
        linear(32, 512, 1000),
        batch_norm(n, 64, 56, false),
        batch_norm(n, 256, 14, false),
        batch_norm(n, 64, 56, true),
        max_pool(n, 64, 112),
        max_pool(n, 64, 56),
        global(7, 64, Position::None),
        global(14, 32, Position::None),
        global(14, 64, Position::None),
        global(28, 32, Position::None),
        global(28, 64, Position::None),
        global(14, 32, Position::Rel),
        global(28, 32, Position::Rel),
        local(128, 28, 7),
        local(128, 28, 3),
        local(128, 28, 13),
        local(64, 56, 7),
        local(256, 14, 7),
        local(512, 7, 7),
        block(n, 8, 7, 64),
        block(n, 8, 14, 32),
    ];
    rows.extend(depthwise_rows(n));
    rows.extend([(144, 56), (672, 14)].map(|(channels, size)| squeeze_excite(n, channels, size)));
    rows
}

/// Batches that fill a large GPU; the most telling rows first, since a run may be cut.
fn large_ops() -> Vec<Named> {
    let n128 = |row| named(row, "_n128");
    let attention = |n, heads, size, d, position| {
        named(global(n, heads, size, d, position), &format!("_n{n}_h{heads}"))
    };
    let window = |k| named(local(64, 2, 32, 56, k, Outside::Mask), "_n64_h2");
    vec![
        window(7),
        attention(128, 8, 14, 64, Position::None),
        attention(256, 8, 7, 64, Position::None),
        n128(conv(128, 64, 56)),
        attention(32, 8, 28, 32, Position::Bias),
        attention(8, 4, 56, 32, Position::None),
        n128(batch_norm(128, 64, 56, false)),
        n128(conv(128, 128, 28)),
        n128(conv(128, 256, 14)),
        n128(conv(128, 512, 7)),
        n128(stem(128, 224)),
        n128(conv_down(128, 56, 1)),
        n128(conv_down(128, 56, 3)),
        attention(4, 16, 24, 64, Position::None),
        attention(32, 8, 24, 32, Position::Bias),
        attention(32, 8, 28, 32, Position::Rel),
        attention(32, 8, 28, 32, Position::None),
        attention(8, 4, 56, 32, Position::Bias),
        window(3),
        window(5),
        window(13),
        named(block(256, 8, 7, 64), "_n256"),
        n128(batch_norm(128, 64, 56, true)),
        n128(max_pool(128, 64, 112)),
        n128(depthwise(128, 32, 112, 3, 1)),
        n128(depthwise(128, 96, 112, 3, 2)),
        n128(depthwise(128, 144, 56, 5, 2)),
        n128(depthwise(128, 240, 28, 5, 1)),
        n128(depthwise(128, 1152, 7, 5, 1)),
        n128(squeeze_excite(128, 144, 56)),
        n128(squeeze_excite(128, 672, 14)),
        named(adamw(11_689_512), "_11m"),
        linear(128, 512, 1000),
    ]
}

fn adamw(len: usize) -> Named {
    ("adamw".into(), Subject::Adamw { len })
}

/// One row of each kind, small enough for an emulated device.
fn tiny_ops() -> Vec<Named> {
    let tiny = |row| named(row, "_tiny");
    vec![
        tiny(conv(2, 8, 6)),
        tiny(stem(1, 16)),
        tiny(depthwise(2, 16, 7, 3, 1)),
        tiny(depthwise(2, 16, 7, 5, 2)),
        tiny(squeeze_excite(2, 48, 5)),
        linear(4, 16, 10),
        tiny(batch_norm(2, 8, 6, false)),
        tiny(batch_norm(2, 8, 6, true)),
        tiny(max_pool(2, 8, 6)),
        tiny(global(2, 2, 5, 8, Position::None)),
        tiny(global(2, 2, 5, 8, Position::Rel)),
        tiny(global(2, 2, 5, 8, Position::Bias)),
        tiny(local(2, 2, 8, 6, 3, Outside::Mask)),
        named(local(2, 2, 8, 6, 3, Outside::Zero), "_zero_tiny"),
        tiny(block(2, 2, 5, 8)),
        named(adamw(1000), "_tiny"),
    ]
}
