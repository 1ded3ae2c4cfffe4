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

KERNEL(256) global_attention_bwd_tables_sum_f32(GlobalAttentionParams p, const float *partial, float *dtables) {
    sum_tables(p, partial, dtables);
}
