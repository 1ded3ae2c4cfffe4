//! Plans of the CUDA kernels of convolutions: tiles in f32 (`kernels/conv2d.cu`, `kernels/conv2d_ends.cu`) and on tensor cores
//! (`kernels/conv2d_mma.cu`, `kernels/conv2d_ends_mma.cu`, `kernels/conv2d_bwd_mma.cu`).

use super::{Conv2dParams, SumParams, phase_pixels, vectors};
use crate::Caps;
use crate::kernel::{Cuda, CudaPlan, CudaText, MAX_GROUPS, cuda_text, params};
use crate::ops::reduce::column_plan;

const SINGLE: CudaText = cuda_text!("conv2d");
const FORWARD: CudaText = cuda_text!("conv2d_mma");
const ENDS: CudaText = cuda_text!("conv2d_ends");
const HALF_ENDS: CudaText = cuda_text!("conv2d_ends_mma");
const BACKWARD: CudaText = cuda_text!("conv2d_bwd_mma");

const fn single(plan: fn(&[u8], &Caps) -> CudaPlan) -> Option<Cuda> {
    Some(Cuda { text: SINGLE, half: None, plan })
}

const fn both(
    plan: fn(&[u8], &Caps) -> CudaPlan,
    half: fn(&[u8], &Caps) -> CudaPlan,
) -> Option<Cuda> {
    Some(Cuda { text: SINGLE, half: Some(half), plan })
}

const fn ends(
    plan: fn(&[u8], &Caps) -> CudaPlan,
    half: fn(&[u8], &Caps) -> CudaPlan,
) -> Option<Cuda> {
    Some(Cuda { text: ENDS, half: Some(half), plan })
}

/// A product of `rows` x `columns`, `copies` of them, in tiles of 64 x 64 or, where both sides and the number of tiles
/// are worth it, of 128 x 128. `entries`: for any channels, for multiples of 4, and the same in large tiles.
fn tiles(rows: u32, columns: u32, copies: u32, vec4: bool, entries: [&'static str; 3]) -> CudaPlan {
    // Tiles that keep a large GPU busy.
    const MANY: u64 = 256;
    let grid = |tile: u32| [rows.div_ceil(tile).max(1), columns.div_ceil(tile), copies];
    let large = grid(128);
    let enough = large.iter().map(|&v| u64::from(v)).product::<u64>() >= MANY;
    match (vec4, enough && columns >= 96 && rows >= 96) {
        (false, _) => CudaPlan::grid(grid(64), 256).entry(entries[0]),
        (true, false) => CudaPlan::grid(grid(64), 256).entry(entries[1]),
        (true, true) => CudaPlan::grid(large, 256).entry(entries[2]),
    }
}

/// A tile of a product on tensor cores: rows and columns.
pub(super) type Tile = (u32, u32);

/// Blocks of a product of `rows` x `columns` in such tiles. They are counted along x alone, columns first.
pub(super) fn tile_grid(rows: u32, columns: u32, copies: u32, tile: Tile) -> CudaPlan {
    // Four warps.
    const THREADS: u32 = 128;
    let blocks = rows.div_ceil(tile.0).max(1) * columns.div_ceil(tile.1);
    CudaPlan::grid([blocks, 1, copies], THREADS)
}

/// The largest tile of which there are `many` and which does not pad the columns by much; with its place in the lists of entries.
fn tile_of(rows: u32, columns: u32, copies: u32, many: u32) -> (usize, Tile) {
    let enough = |tile: Tile| {
        let blocks = tile_grid(rows, columns, copies, tile).grid[0];
        u64::from(blocks) * u64::from(copies) >= u64::from(many)
    };
    let padded = |tile: u32| u64::from(columns.next_multiple_of(tile));
    let wide = padded(128) * 8 <= padded(64) * 9;
    match (enough((128, 128)) && wide, enough((128, 64)) && rows > 64) {
        (true, _) => (3, (128, 128)),
        (false, true) => (2, (128, 64)),
        (false, false) => (1, (64, 64)),
    }
}

/// The tile of a product on tensor cores, with its place in the lists of entries.
fn half_tile(rows: u32, columns: u32, copies: u32, vec8: bool) -> (usize, Tile) {
    // Blocks that give each multiprocessor of a large GPU one.
    const MANY: u32 = 128;
    if vec8 { tile_of(rows, columns, copies, MANY) } else { (0, (64, 64)) }
}

/// `entries`: for any channels, and for multiples of 8 in tiles of 64 x 64, 128 x 64 and 128 x 128.
fn half_tiles(
    rows: u32,
    columns: u32,
    copies: u32,
    vec8: bool,
    entries: [&'static str; 4],
) -> CudaPlan {
    let (place, tile) = half_tile(rows, columns, copies, vec8);
    tile_grid(rows, columns, copies, tile).entry(entries[place])
}

/// Whether accesses of eight numbers are possible: channels that all of `counts` hold in eights, and a kernel whose taps fit the masks
/// of the vec8 kernels.
fn vec8(p: &Conv2dParams, counts: &[u32]) -> bool {
    const MOST_TAPS: u32 = 12;
    p.kh.max(p.kw) <= MOST_TAPS && counts.iter().all(|count| count.is_multiple_of(8))
}

/// The forward in f32, by the entries of [`tiles`].
fn forward_tiles(bytes: &[u8], entries: [&'static str; 3]) -> CudaPlan {
    let p: Conv2dParams = params(bytes);
    tiles(p.n * p.p * p.q, p.o, 1, p.c.is_multiple_of(4), entries)
}

/// The forward on tensor cores: its tile, with the place in the lists of entries.
fn forward_tile(p: &Conv2dParams) -> (usize, Tile) {
    half_tile(p.n * p.p * p.q, p.o, 1, vec8(p, &[p.c]))
}

fn half_forward_tiles(bytes: &[u8], entries: [&'static str; 4]) -> CudaPlan {
    let p: Conv2dParams = params(bytes);
    let (place, tile) = forward_tile(&p);
    tile_grid(p.n * p.p * p.q, p.o, 1, tile).entry(entries[place]).text(FORWARD)
}

pub(super) const FWD: Option<Cuda> = both(
    |bytes, _| forward_tiles(bytes, ["", "conv2d_fwd_vec4_f32", "conv2d_fwd_vec4_large_f32"]),
    |bytes, _| {
        let entries =
            ["", "conv2d_fwd_vec8_f32", "conv2d_fwd_vec8_tall_f32", "conv2d_fwd_vec8_large_f32"];
        half_forward_tiles(bytes, entries)
    },
);

pub(super) const STATS: Option<Cuda> = ends(
    |bytes, _| forward_tiles(bytes, ["", "conv2d_stats_vec4_f32", "conv2d_stats_vec4_large_f32"]),
    |bytes, _| {
        let entries = [
            "",
            "conv2d_stats_vec8_f32",
            "conv2d_stats_vec8_tall_f32",
            "conv2d_stats_vec8_large_f32",
        ];
        half_forward_tiles(bytes, entries).text(HALF_ENDS)
    },
);

/// Rows of y whose statistics [`STATS`] puts together: 64 of a tile in f32, on tensor cores a warp's, which are half of its tile's.
pub(super) fn stats_rows(p: &Conv2dParams, half: bool) -> u32 {
    if half { forward_tile(p).1.0 / 2 } else { 64 }
}

pub(super) const NORM: Option<Cuda> = ends(
    |bytes, _| forward_tiles(bytes, ["", "conv2d_norm_vec4_f32", "conv2d_norm_vec4_large_f32"]),
    |bytes, _| {
        let entries =
            ["", "conv2d_norm_vec8_f32", "conv2d_norm_vec8_tall_f32", "conv2d_norm_vec8_large_f32"];
        half_forward_tiles(bytes, entries).text(HALF_ENDS)
    },
);

pub(super) const DGRAD: Option<Cuda> = both(
    |bytes, _| {
        let p: Conv2dParams = params(bytes);
        let entries = ["", "conv2d_dgrad_vec4_f32", "conv2d_dgrad_vec4_large_f32"];
        tiles(phase_pixels(&p), p.c, p.stride_h * p.stride_w, vectors(&p), entries)
    },
    |bytes, _| {
        let p: Conv2dParams = params(bytes);
        let entries = [
            "",
            "conv2d_dgrad_vec8_f32",
            "conv2d_dgrad_vec8_tall_f32",
            "conv2d_dgrad_vec8_large_f32",
        ];
        let phases = p.stride_h * p.stride_w;
        half_tiles(phase_pixels(&p), p.c, phases, vec8(&p, &[p.c, p.o]), entries).text(BACKWARD)
    },
);

pub(super) const WGRAD: Option<Cuda> = both(
    |bytes, _| {
        let p: Conv2dParams = params(bytes);
        let entries = ["", "conv2d_wgrad_vec4_f32", "conv2d_wgrad_vec4_large_f32"];
        tiles(p.o, p.kh * p.kw * p.c, p.parts, vectors(&p), entries)
    },
    |bytes, _| {
        let p: Conv2dParams = params(bytes);
        let entries = [
            "",
            "conv2d_wgrad_vec8_f32",
            "conv2d_wgrad_vec8_tall_f32",
            "conv2d_wgrad_vec8_large_f32",
        ];
        let (place, tile) = weight_tile(&p);
        let rows = p.kh * p.kw * p.c;
        tile_grid(rows, p.o, p.parts, tile).entry(entries[place]).text(BACKWARD)
    },
);

/// The tile of a weight gradient: the parts see to it that there are enough.
fn weight_tile(p: &Conv2dParams) -> (usize, Tile) {
    if vec8(p, &[p.c, p.o]) { tile_of(p.kh * p.kw * p.c, p.o, 1, 1) } else { (0, (64, 64)) }
}

/// Into how many parts a weight gradient on tensor cores cuts the pixels: so that there are two blocks for each multiprocessor
/// of a large GPU and none is shorter than eight steps of the product. None is so long that its sum could lose what a 16-bit
/// number has, even if each of its additions (one in 16 pixels) cut off a unit in the last place.
pub(super) fn half_parts(p: &Conv2dParams) -> u32 {
    const BLOCKS: u32 = 256;
    const LONGEST: u32 = 16384;
    const SHORTEST: u32 = 256;
    let pixels = p.n * p.p * p.q;
    let blocks = tile_grid(p.kh * p.kw * p.c, p.o, 1, weight_tile(p).1).grid[0];
    BLOCKS
        .div_ceil(blocks)
        .max(pixels.div_ceil(LONGEST))
        .clamp(1, pixels.div_ceil(SHORTEST).min(MAX_GROUPS))
}

pub(super) const DBIAS: Option<Cuda> = single(|bytes, _| {
    let p: Conv2dParams = params(bytes);
    column_plan(p.o, p.parts)
});

pub(super) const SUM: Option<Cuda> =
    single(|bytes, _| CudaPlan::items(params::<SumParams>(bytes).len as usize, 4, 256));
