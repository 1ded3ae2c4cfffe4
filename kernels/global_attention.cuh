// The parameter block of global attention, and its tables: one row for each of 2h-1 row and 2w-1 column offsets.

struct GlobalAttentionParams {
    u32 n, h, w, g, d, has_rel_h, has_rel_w, has_bias;
    float scale;
    u32 pieces, part, by_axis;
};

typedef GlobalAttentionParams Params;

DEVICE u32 table_rows(const Params &p) { return 2 * p.h - 1; }
DEVICE u32 table_columns(const Params &p) { return 2 * p.w - 1; }

#include "attention_tables.cuh"

// Lines of sums by axis: an offset of rel_h or rel_w each.
DEVICE u32 axis_lines(const Params &p) { return p.has_rel_h * table_rows(p) + p.has_rel_w * table_columns(p); }
