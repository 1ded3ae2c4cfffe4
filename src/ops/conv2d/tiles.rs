//! The tiles of the WGSL kernels: what an invocation and a workgroup take, as in `shaders/conv2d.wgsl` and `conv2d_wide.wgsl`.

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

/// Entry points of a pass: any channels, whole vectors, and the same for software.
pub(super) struct Entries(
    pub(super) &'static str,
    pub(super) &'static str,
    pub(super) &'static str,
    pub(super) &'static str,
);

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
        (false, false) => entries.0,
        (false, true) => entries.1,
        (true, false) => entries.2,
        (true, true) => entries.3,
    };
    let tile = LANES / lanes(pixels) * if wide && entry.contains("wide") { WIDE } else { CHANNELS };
    let blocks = pixels.div_ceil(tile_pixels(pixels)).max(1);
    let x = blocks.min(MAX_GROUPS);
    Plan { entry, grid: [x, channels.div_ceil(tile), blocks.div_ceil(x) * copies] }
}

/// The plan of the weight gradient.
pub(super) fn weight_plan(caps: &Caps, p: &Conv2dParams) -> Plan {
    let [x, y] = weight_grid(p);
    let (entry, y) = match (vectors(p), caps.broadcasts()) {
        (false, _) => ("", y),
        (true, false) => ("conv2d_wgrad_vec4_f32", y),
        (true, true) => ("conv2d_wgrad_wide_vec4_f32", p.o.div_ceil(WIDE)),
    };
    Plan { entry, grid: [x, y, p.parts] }
}

/// Workgroups over the columns and rows of the weight.
pub(super) fn weight_grid(p: &Conv2dParams) -> [u32; 2] {
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

    const ENTRIES: Entries = Entries("any", "vec4", "any_wide", "vec4_wide");

    fn caps(software: bool, subgroup: Option<(u32, u32)>) -> Caps {
        Caps { software, subgroup, ..crate::Device::cpu().caps().clone() }
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
                for (wide, own) in [(false, CHANNELS), (true, WIDE)] {
                    let caps = caps(true, wide.then_some((8, 8)));
                    let [x, y, z] = pixel_plan(&caps, [pixels, channels, 1], true, &ENTRIES).grid;
                    let tile = tile_pixels(pixels);
                    let blocks = u64::from(x) * u64::from(z);
                    assert!(x > 0 && x <= MAX_GROUPS && blocks * u64::from(tile) >= pixels.into());
                    let across = LANES * PIXELS / tile * own;
                    assert!(y * across >= channels && (y - 1) * across < channels);
                }
            }
        }
    }
}
