//! The tiles of the WGSL kernels: what an invocation and a workgroup take, as in `shaders/conv2d.wgsl`, `conv2d_wide.wgsl` and
//! `conv2d_tiled.wgsl`.

use super::Conv2dParams;
use crate::Caps;
use crate::kernel::{MAX_GROUPS, Plan};

/// Output channels of an invocation, and of the variants for software.
pub(super) const CHANNELS: u32 = 8;
const WIDE: u32 = 16;
/// Pixels of an invocation.
const PIXELS: u32 = 4;
/// Invocations of a workgroup; how many of them lie along the pixels where there are few.
const LANES: u32 = 64;
const FEW: u32 = 8;
/// Pixels and channels (weight gradient: outputs and columns) of a tile that a workgroup of hardware shares.
pub(super) const SIDE: u32 = 64;

/// Entry points of a pass: for any channels and for whole vectors, the same for software, and whole vectors in tiles for hardware.
pub(super) struct Entries {
    pub(super) any: &'static str,
    pub(super) vec4: &'static str,
    pub(super) wide: &'static str,
    pub(super) wide_vec4: &'static str,
    pub(super) tiled: &'static str,
}

/// Whether a workgroup shares tiles of a product of so many rows and columns: half of each side at least has to be used.
pub(super) fn tiled(caps: &Caps, sides: [u32; 2], vectors: bool) -> bool {
    caps.tiles && vectors && sides.iter().all(|n| *n >= SIDE / 2)
}

/// Rows and columns of the weight gradient.
fn weight_sides(p: &Conv2dParams) -> [u32; 2] {
    [p.o, p.kh * p.kw * p.c]
}

/// Invocations of a workgroup along the pixels.
fn lanes(pixels: u32) -> u32 {
    if pixels <= LANES * PIXELS / 2 { FEW } else { LANES }
}

/// Pixels of a workgroup's tile.
pub(super) fn tile_pixels(pixels: u32) -> u32 {
    lanes(pixels) * PIXELS
}

/// The plan of a pass over `pixels` (of `copies` phases) and `channels`; `vectors` says whether the channel counts allow vec4 loads.
pub(super) fn pixel_plan(
    caps: &Caps,
    [pixels, channels, copies]: [u32; 3],
    vectors: bool,
    entries: &Entries,
) -> Plan {
    let wide = caps.broadcasts();
    let entry = match (wide, vectors) {
        _ if tiled(caps, [pixels, channels], vectors) => entries.tiled,
        (false, false) => entries.any,
        (false, true) => entries.vec4,
        (true, false) => entries.wide,
        (true, true) => entries.wide_vec4,
    };
    let across = LANES / lanes(pixels);
    let [rows, columns] = if entry == entries.tiled {
        [SIDE, SIDE]
    } else if wide && entry.contains("wide") {
        [tile_pixels(pixels), across * WIDE]
    } else {
        [tile_pixels(pixels), across * CHANNELS]
    };
    let blocks = pixels.div_ceil(rows).max(1);
    let x = blocks.min(MAX_GROUPS);
    Plan { entry, grid: [x, channels.div_ceil(columns), blocks.div_ceil(x) * copies] }
}

/// The plan of the weight gradient.
pub(super) fn weight_plan(caps: &Caps, p: &Conv2dParams) -> Plan {
    let [x, y] = weight_grid(caps, p);
    if tiled(caps, weight_sides(p), vectors(p)) {
        return Plan { entry: "conv2d_wgrad_tiled_f32", grid: [x, y, p.parts] };
    }
    let (entry, y) = match (vectors(p), caps.broadcasts()) {
        (false, _) => ("", y),
        (true, false) => ("conv2d_wgrad_vec4_f32", y),
        (true, true) => ("conv2d_wgrad_wide_vec4_f32", p.o.div_ceil(WIDE)),
    };
    Plan { entry, grid: [x, y, p.parts] }
}

/// Workgroups over the columns and rows of the weight.
pub(super) fn weight_grid(caps: &Caps, p: &Conv2dParams) -> [u32; 2] {
    if tiled(caps, weight_sides(p), vectors(p)) {
        let [rows, columns] = weight_sides(p).map(|n| n.div_ceil(SIDE));
        return [columns, rows];
    }
    let columns = p.kh * p.kw * if vectors(p) { p.c / 4 } else { p.c };
    [columns.div_ceil(LANES), p.o.div_ceil(CHANNELS)]
}

/// Whether both channel counts allow vec4 loads.
pub(super) fn vectors(p: &Conv2dParams) -> bool {
    p.c.is_multiple_of(4) && p.o.is_multiple_of(4)
}

/// Pixels of the largest phase of the input gradient.
pub(super) fn phase_pixels(p: &Conv2dParams) -> u32 {
    p.n * p.h.div_ceil(p.stride_h) * p.w.div_ceil(p.stride_w)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRIES: Entries = Entries {
        any: "any",
        vec4: "vec4",
        wide: "any_wide",
        wide_vec4: "vec4_wide",
        tiled: "tiled",
    };

    fn caps(software: bool, subgroup: Option<(u32, u32)>) -> Caps {
        Caps { software, subgroup, ..crate::Device::cpu().caps().clone() }
    }

    fn hardware() -> Caps {
        Caps { tiles: true, ..caps(false, Some((32, 32))) }
    }

    #[test]
    fn hardware_shares_tiles_where_half_of_each_side_is_used() {
        let of = |sides: [u32; 2], vectors| {
            pixel_plan(&hardware(), [sides[0], sides[1], 1], vectors, &ENTRIES)
        };
        let plan = |pixels, vectors| of([pixels, 48], vectors);
        assert_eq!((of([99, 31], true).entry, of([99, 32], true).entry), ("vec4", "tiled"));
        assert_eq!(plan(33, true), Plan { entry: "tiled", grid: [1, 1, 1] });
        assert_eq!(plan(65, true), Plan { entry: "tiled", grid: [2, 1, 1] });
        assert_eq!((plan(31, true).entry, plan(33, false).entry), ("vec4", "any"));
        let p = |o, c| {
            let p = Conv2dParams::from_counts([1, 9, 9, c], [o, 3, 3], [9, 9], (1, 1), (1, 1));
            weight_plan(&hardware(), &p)
        };
        assert_eq!(p(68, 20), Plan { entry: "conv2d_wgrad_tiled_f32", grid: [3, 2, 1] });
        assert_eq!((p(28, 20).entry, p(68, 21).entry), ("conv2d_wgrad_vec4_f32", ""));
    }

    #[test]
    fn variants_for_software_need_subgroups_of_eight() {
        let plan = |caps: Caps, vectors| pixel_plan(&caps, [256, 48, 1], vectors, &ENTRIES);
        assert_eq!(plan(caps(true, Some((8, 8))), true).entry, "vec4_wide");
        assert_eq!(plan(caps(true, Some((8, 8))), false).entry, "any_wide");
        for other in [caps(true, None), caps(true, Some((4, 8))), caps(false, Some((8, 8)))] {
            assert_eq!(plan(other, true).entry, "vec4");
        }
    }

    #[test]
    fn tiles_cover_pixels_and_channels() {
        for pixels in [0, 1, 31, 33, 128, 129, 256, 257, 20_000_000] {
            for channels in [1, 8, 33, 64, 65, 1000] {
                let few = LANES * PIXELS / tile_pixels(pixels);
                let tiles = [
                    (caps(true, None), tile_pixels(pixels), few * CHANNELS),
                    (caps(true, Some((8, 8))), tile_pixels(pixels), few * WIDE),
                    (hardware(), SIDE, SIDE),
                ];
                for (caps, tile, across) in tiles {
                    let plan = pixel_plan(&caps, [pixels, channels, 1], true, &ENTRIES);
                    let [x, y, z] = plan.grid;
                    if caps.tiles && plan.entry != ENTRIES.tiled {
                        continue;
                    }
                    let blocks = u64::from(x) * u64::from(z);
                    assert!(x > 0 && x <= MAX_GROUPS && blocks * u64::from(tile) >= pixels.into());
                    assert!(y * across >= channels && (y - 1) * across < channels);
                }
            }
        }
    }
}
