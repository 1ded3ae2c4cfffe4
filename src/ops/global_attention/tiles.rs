//! Plans of the WGSL kernels: which entry for which device, and the tiles of `shaders/global_attention_tiled.wgsl`.

use super::GlobalAttentionParams;
use crate::Caps;
use crate::kernel::{MAX_GROUPS, Plan, params};

/// Tokens of a tile, and places along the map's short and long axis where there are tables: what workgroup memory holds terms for.
const TOKENS: u32 = 32;
const SHORT: u32 = 4;
const LONG: u32 = 16;
/// Channels of the output that a workgroup takes.
const CHANNELS: u32 = 64;

/// Variants of a kernel: for hardware, and for software without tables (none: the kernel's own).
pub(super) struct Entries {
    pub(super) tiled: &'static str,
    pub(super) wide: Option<&'static str>,
}

/// A plan of the forward or of q's, k's and v's gradients.
pub(super) fn plan(bytes: &[u8], caps: &Caps, entries: &Entries) -> Plan {
    let p: GlobalAttentionParams = params(bytes);
    if caps.tiles {
        let [short, long] = tiling(&p);
        let pieces = p.n * p.g * p.d.div_ceil(CHANNELS);
        // The kernel finds the tile's sides by the first two, and walks over more pieces than a grid holds.
        let grid = [long, short, pieces.clamp(1, MAX_GROUPS)];
        if long <= MAX_GROUPS {
            return Plan { entry: entries.tiled, grid };
        }
    }
    match entries.wide.filter(|_| caps.broadcasts() && !has_tables(&p)) {
        // Eight threads take 32 tokens of a head.
        Some(wide) => {
            let rows = (p.n * p.g) as usize * p.tokens().div_ceil(32);
            Plan::items(8 * rows, 64).entry(wide)
        }
        // A thread for each token of each head.
        None => Plan::items(p.n as usize * p.tokens() * p.g as usize, 64),
    }
}

fn has_tables(p: &GlobalAttentionParams) -> bool {
    p.has_rel_h + p.has_rel_w + p.has_bias > 0
}

/// Tiles along the short and the long axis of the map: as few as there can be. Without tables the map is one long row.
fn tiling(p: &GlobalAttentionParams) -> [u32; 2] {
    if !has_tables(p) {
        return [1, (p.tokens() as u32).div_ceil(TOKENS).max(1)];
    }
    let [short, long] = [p.h.min(p.w), p.h.max(p.w)];
    let mut best = [short, long];
    for side in 1..=SHORT {
        let tiles = [short.div_ceil(side), long.div_ceil(LONG.min(TOKENS / side))];
        if tiles[0] * tiles[1] <= best[0] * best[1] {
            best = tiles;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::global_attention::{BWD, BWD_DKV, BWD_DQ, BWD_TABLES, FWD};

    fn caps(software: bool, subgroup: Option<(u32, u32)>, tiles: bool) -> Caps {
        Caps { software, subgroup, tiles, ..crate::Device::cpu().caps().clone() }
    }

    fn problem(h: u32, w: u32, tables: u32) -> GlobalAttentionParams {
        GlobalAttentionParams {
            n: 2,
            h,
            w,
            g: 3,
            d: 64,
            has_rel_h: tables & 1,
            has_rel_w: tables >> 1 & 1,
            has_bias: tables >> 2,
            scale: 1.0,
            pieces: 1,
            part: 0,
            by_axis: 0,
        }
    }

    #[test]
    fn devices_get_the_entries_made_for_them() {
        let (plain, all) = (problem(7, 7, 0), problem(7, 7, 7));
        let entries = |p: &GlobalAttentionParams, caps: &Caps| {
            [&FWD, &BWD, &BWD_DQ, &BWD_DKV].map(|kernel| {
                let plan = (kernel.plan)(bytemuck::bytes_of(p), caps);
                kernel.entry_of(plan.entry)
            })
        };
        let base = [
            "global_attention_fwd_f32",
            "global_attention_bwd_f32",
            "global_attention_bwd_dq_f32",
            "global_attention_bwd_dkv_f32",
        ];
        let tiled = base.map(|name| name.replace("_f32", "_tiled_f32"));
        let wide = base.map(|name| name.replace("_f32", "_wide_f32"));
        for subgroup in [None, Some((8, 8)), Some((32, 32))] {
            for p in [&plain, &all] {
                assert_eq!(entries(p, &caps(false, subgroup, true)), tiled);
                assert_eq!(entries(p, &caps(false, subgroup, false)), base);
            }
        }
        let software = caps(true, Some((8, 8)), false);
        assert_eq!(entries(&all, &software), base);
        assert_eq!(entries(&plain, &software), [&*wide[0], base[1], &*wide[2], &*wide[3]]);
        // The tables' gradients have no tiles.
        let plan = (BWD_TABLES.plan)(bytemuck::bytes_of(&all), &caps(false, None, true));
        assert_eq!(plan.entry, "");
    }

    /// What the shader takes for granted: tiles that fit its arrays, none of them empty, all places in one.
    #[test]
    fn tiles_cover_the_map_and_fit_workgroup_memory() {
        for tables in 0..8 {
            for h in (1..40).chain([56, 59, 71, 129, 1000]) {
                for w in (1..40).chain([56, 67, 1000]) {
                    let p = problem(h, w, tables);
                    let [short, long] = tiling(&p);
                    let size = match tables {
                        0 => [1, h * w],
                        _ => [h.min(w), h.max(w)],
                    };
                    // As in map_of() of the shader.
                    let side = [size[0].div_ceil(short), size[1].div_ceil(long)];
                    assert_eq!(
                        [short, long],
                        [size[0].div_ceil(side[0]), size[1].div_ceil(side[1])]
                    );
                    assert!(side[0] * side[1] <= TOKENS, "{h}x{w}: {side:?}");
                    if tables > 0 {
                        let lines = side.map(|s| 2 * s - 1);
                        assert!(lines[0] < 8 && lines[1] < 32 && lines[0] * lines[1] <= 105);
                    }
                }
            }
        }
    }

    #[test]
    fn maps_are_cut_into_few_tiles() {
        let cut = |h, w, tables| tiling(&problem(h, w, tables));
        assert_eq!(cut(7, 7, 0), [1, 2]);
        assert_eq!(cut(7, 7, 1), [2, 1]);
        assert_eq!(cut(14, 14, 7), [7, 1]);
        assert_eq!(cut(56, 56, 2), [14, 7]);
        assert_eq!(cut(59, 3, 4), [1, 6]);
        assert_eq!(cut(1, 1, 7), [1, 1]);
    }

    #[test]
    fn heads_past_the_grid_are_walked_over() {
        let plan =
            |p: &GlobalAttentionParams| (FWD.plan)(bytemuck::bytes_of(p), &caps(false, None, true));
        let p = GlobalAttentionParams { n: 70_000, d: 68, ..problem(7, 7, 1) };
        assert_eq!(plan(&p).grid, [1, 2, MAX_GROUPS]);
        assert_eq!(plan(&GlobalAttentionParams { d: 132, ..problem(7, 7, 1) }).grid, [1, 2, 18]);
        // A row of more tiles than a grid holds.
        assert_eq!(plan(&problem(1500, 1500, 0)).entry, "");
    }

    /// WebGPU's default limit, which `Caps::tiles` stands for.
    #[test]
    fn workgroup_memory_fits_every_adapter() {
        let text = include_str!("../../../shaders/global_attention_tiled.wgsl");
        let arrays = text.lines().filter_map(|line| line.strip_prefix("var<workgroup> "));
        let bytes = arrays.map(|line| {
            let (_, array) = line.split_once("array<").unwrap();
            let (of, count) = array.trim_end_matches(">;").split_once(", ").unwrap();
            let bytes = if of == "vec4f" { 16 } else { 4 };
            bytes * count.parse::<usize>().unwrap()
        });
        assert_eq!(
            bytes.sum::<usize>(),
            16_292,
            "the shader's head tells the bytes, at most 16,384"
        );
    }
}
