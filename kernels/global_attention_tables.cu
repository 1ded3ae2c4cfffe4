// Gradients of global attention's tables; the formulas stand in global_attention_bwd.cu. A warp owns an offset (a, b) of a head and
// of a piece of the batch, its lanes share the pairs at that offset, whose scores they make again by dot products; a second kernel
// sums up for each table. In f32 sums for every storage.
//
// Flop: 6 T^2 d a head. Extra memory: sums by offset [pieces, G, 2h-1, 2w-1, d + 4].

#include "common.cuh"
#include "global_attention.cuh"

// partial [pieces, G, 2h-1, 2w-1, width]; a warp owns an offset of a head and of a piece of the batch.
KERNEL(256, 2) OF(global_attention_bwd_tables)(GlobalAttentionParams p, INPUTS, float *partial) {
    u32 offsets_h = table_rows(p), offsets_w = table_columns(p), i = flat_id() / 32, lane = threadIdx.x % 32;
    if (i >= p.pieces * p.g * offsets_h * offsets_w) return;
    u32 b = i % offsets_w, a = i / offsets_w % offsets_h, g = i / offsets_w / offsets_h % p.g;
    u32 piece = i / offsets_w / offsets_h / p.g, images = (p.n + p.pieces - 1) / p.pieces;
    // Queries whose key at this offset lies in the map.
    u32 top = (a > p.h - 1 ? a : p.h - 1) - a, rows = least(p.h, 2 * p.h - 1 - a) - top;
    u32 left = (b > p.w - 1 ? b : p.w - 1) - b, columns = least(p.w, 2 * p.w - 1 - b) - left;
    u32 first = least(piece * images, p.n), pairs = (least(first + images, p.n) - first) * rows * columns;
    u32 rel = rel_width(p);
    for (u32 chunk = 0; chunk == 0 || chunk < rel; chunk += OFFSET_NUMBERS) {
        u32 width = chunk < rel ? least(OFFSET_NUMBERS, rel - chunk) : 0;
        OffsetSums sums;
        for (u32 pair = lane; pair < pairs; pair += 32) {
            u32 y = top + pair / columns % rows, x = left + pair % columns;
            Head head(p, first + pair / columns / rows, g);
            u32 query = y * p.w + x, key = (y + a + 1 - p.h) * p.w + x + b + 1 - p.w;
            float ds = pair_gradient(p, GIVEN, head, query, key, true, a, b);
            sums.add(ds, q + head.base + query * head.stride + chunk, width);
        }
        sums.put(p, partial + i * partial_width(p), chunk, width);
    }
}

// The same out of sums by axis, [pieces, G, rows + columns, d], as global_attention_tables_mma.cu makes them. A thread owns an element.
DEVICE void sum_axes(const Params &p, const float *partial, float *dtables) {
    u32 i = flat_id(), second = rel_w_start(p);
    if (i >= bias_start(p)) return;
    bool columns = i >= second;
    u32 at = columns ? i - second : i, offset = at / (p.g * p.d), g = at / p.d % p.g;
    u32 line = columns ? p.has_rel_h * table_rows(p) + offset : offset;
    // The gaps between the tables are zeros.
    bool inside = offset < (columns ? table_columns(p) : table_rows(p));
    float sum = 0.0f;
    for (u32 piece = 0; inside && piece < p.pieces; piece++) {
        sum += partial[((piece * p.g + g) * axis_lines(p) + line) * p.d + at % p.d];
    }
    dtables[i] = sum;
}

KERNEL(256) global_attention_bwd_tables_sum_f32(GlobalAttentionParams p, const float *partial, float *dtables) {
    if (p.by_axis) sum_axes(p, partial, dtables);
    else sum_tables(p, partial, dtables);
}
