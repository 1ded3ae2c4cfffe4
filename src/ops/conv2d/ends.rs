//! Convolutions that end in more than a bias: with the statistics that a batch norm needs of y, or with a whole norm. For
//! [`crate::ops::conv_block`]; they have no bias of their own.

use super::tiles::{Entries, SIDE, pixel_plan, tile_pixels, tiled};
use super::{Conv2dParams, WGSL, cuda, recorded};
use crate::cpu::conv2d as cpu;
use crate::error::Result;
use crate::kernel::{Access, F32, Kernel, Stored, params};
use crate::tensor::Tensor;

/// Also mean and sum of squared deviations of each channel over blocks of pixels, see [`block_rows`].
pub(super) static CONV2D_STATS: Kernel = Kernel {
    name: "conv2d_stats_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("w", Access::Read, Stored),
        ("part", Access::Write, F32),
        ("y", Access::Write, Stored),
    ],
    cpu: cpu::fwd_stats,
    wgsl: WGSL,
    cuda: cuda::STATS,
    plan: |bytes, caps| {
        const ENTRIES: Entries = Entries {
            any: "conv2d_stats_f32",
            vec4: "conv2d_stats_vec4_f32",
            wide: "conv2d_stats_wide_f32",
            wide_vec4: "conv2d_stats_wide_vec4_f32",
            tiled: "conv2d_stats_tiled_f32",
        };
        let p: Conv2dParams = params(bytes);
        pixel_plan(caps, [p.n * p.p * p.q, p.o, 1], p.c.is_multiple_of(4), &ENTRIES)
    },
};

/// `y = act((x * w - mean) * scale + bias + residual)` by a norm's table `[4, O]`, see [`crate::ops::batch_norm()`].
pub(super) static CONV2D_NORM: Kernel = Kernel {
    name: "conv2d_norm_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("w", Access::Read, Stored),
        ("table", Access::Read, F32),
        ("residual", Access::Read, Stored),
        ("y", Access::Write, Stored),
    ],
    cpu: cpu::fwd_norm,
    wgsl: WGSL,
    cuda: cuda::NORM,
    plan: |bytes, caps| {
        const ENTRIES: Entries = Entries {
            any: "conv2d_norm_f32",
            vec4: "conv2d_norm_vec4_f32",
            wide: "conv2d_norm_wide_f32",
            wide_vec4: "conv2d_norm_wide_vec4_f32",
            tiled: "conv2d_norm_tiled_f32",
        };
        let p: Conv2dParams = params(bytes);
        pixel_plan(caps, [p.n * p.p * p.q, p.o, 1], p.c.is_multiple_of(4), &ENTRIES)
    },
};

/// Rows of y (pixels) whose statistics one block, workgroup or task gathers on the device of x: the kernels' own tiles, a whole number of
/// them, so that no statistics wait for another's.
fn block_rows(p: &Conv2dParams, x: &Tensor) -> u32 {
    match x.device().name() {
        "cpu" => cpu::block_pixels(p),
        name if name.starts_with("cuda") => cuda::stats_rows(p, x.dtype().is_half()),
        _ => {
            let pixels = p.n * p.p * p.q;
            let tiled = tiled(x.device().caps(), [pixels, p.o], p.c.is_multiple_of(4));
            if tiled { SIDE } else { tile_pixels(pixels) }
        }
    }
}

/// y, on the tape, with its statistics `[blocks, 2, O]` (mean, sum of squared deviations from it) over blocks of so many pixels. y is made by the
/// caller, `[N, P, Q, O]`, stored as x is.
pub(in crate::ops) fn with_statistics(
    p: Conv2dParams,
    x: &Tensor,
    w: &Tensor,
    y: Tensor,
) -> Result<(Tensor, Tensor, u32)> {
    let rows = block_rows(&p, x);
    let blocks = (p.n * p.p * p.q).div_ceil(rows) as usize;
    let part = Tensor::empty(x.device(), &[blocks, 2, p.o as usize])?;
    CONV2D_STATS.launch(&p, &[x, w, &part, &y])?;
    Ok((recorded("conv2d", p, x, w, None, y), part, rows))
}

/// Fills y, off the tape, with the convolution of x under a norm's table, residual and activation (its number).
pub(in crate::ops) fn normalised(
    p: Conv2dParams,
    x: &Tensor,
    w: &Tensor,
    table: &Tensor,
    (residual, act): (Option<&Tensor>, u32),
    y: &Tensor,
) -> Result<()> {
    let p = Conv2dParams { act, residual: u32::from(residual.is_some()), ..p };
    CONV2D_NORM.launch(&p, &[x, w, table, residual.unwrap_or(x), y])
}
