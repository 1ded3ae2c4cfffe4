// What the backward kernels of global attention on tensor cores share: dS of 16 queries, and its sums for each map row and column of
// the keys, through which the position tables act.

#include "global_attention_mma.cuh"

// Tiles that are there at a time: one of heads of 128, whose two would leave no room for terms.
template <int D> constexpr u32 STAGES = D == 128 ? 1 : 2;
// Columns of a tile whose scores are in registers at a time.
constexpr int COLUMNS = 32;
constexpr int LINE = Terms<1>::LINE;

// ------------------------------------------------------------------------------------------------ sums by position

// sums[line][row] += the weights of the keys in each line, for lines `from` .. `to`: a product with a matrix of zeros and ones.
// `half` is 0 for the lines of rows, 16 for those of columns.
template <int LINE, int J> DEVICE void add_sums(const uint2 *keys, u32 half, u32 from, u32 to, const Weights<J> &weights, float *sums) {
    u32 ones = pair_of<Real>(1.0f, 1.0f);
    for (u32 line = from / 8 * 8; line <= to; line += 8) {
        u32 wanted = (line + lane_row()) * LINE;
        float c[4] = {};
        UNROLL for (int k = 0; k < J / 2; k++) {
            u32 b[2];
            UNROLL for (int i = 0; i < 2; i++) {
                const uint2 *key = keys + k * 16 + i * 8 + lane_column();
                b[i] = ((key[0].x >> half & 0xffff) == wanted ? ones & 0xffff : 0) | ((key[1].x >> half & 0xffff) == wanted ? ones & 0xffff0000 : 0);
            }
            mma16(c, weights.a[k], b, Real{});
        }
        UNROLL for (int i = 0; i < 4; i++) {
            u32 at = line + lane_column() + i % 2;
            if (at >= from && at <= to) sums[at * LINE + lane_row() + i / 2 * 8] += c[i];
        }
    }
}

// out += for each of 16 queries from `first` on, the sums of the lines times the table's rows at their offsets.
template <int LINE, int D> DEVICE void apply_axis(const Params &p, const Axis &axis, bool rows, const float *table, const float *sums,
    u32 first, float (&out)[D / 8][4]) {
    Offsets offsets(p, axis, rows, first);
    for (u32 o = offsets.low; o <= offsets.high; o += 16) {
        u32 a[4];
        UNROLL for (int i = 0; i < 4; i++) {
            float x[2];
            UNROLL for (int j = 0; j < 2; j++) {
                u32 offset = o + i / 2 * 8 + lane_column() + j, line = offsets.line(axis, i % 2, offset);
                x[j] = offset <= offsets.high && line < axis.lines ? sums[line * LINE + lane_row() + i % 2 * 8] : 0.0f;
            }
            a[i] = pair_of<Real>(x[0], x[1]);
        }
        UNROLL for (int n = 0; n < D / 8; n++) {
            u32 b[2], c = n * 8 + lane_row();
            UNROLL for (int i = 0; i < 2; i++) {
                float x[2];
                UNROLL for (int j = 0; j < 2; j++) {
                    u32 offset = least(o + i * 8 + lane_column() + j, offsets.high);
                    x[j] = c < p.d ? table[offset * p.g * p.d + c] : 0.0f;
                }
                b[i] = pair_of<Real>(x[0], x[1]);
            }
            mma16(out[n], a, b, Real{});
        }
    }
}

// ------------------------------------------------------------------------------------------------ dS of queries

// Lines of sums that one warp's 16 queries have, zeroed.
DEVICE void clear_lines(u32 lines, float *sums) {
    for (u32 i = threadIdx.x % 32; i < lines * 16; i += 32) sums[i / 16 * LINE + i % 16] = 0.0f;
}

// 16 queries of a warp: what they are, and the sums of dS for each map row and column of the keys.
template <int D> struct QueryRows {
    Rows<D> q[1], dy[1];
    float lse[2], delta[2];
    u32 bias[2], first;
    float *row_sums;

    DEVICE float *column_sums(const Params &p) const { return row_sums + row_lines(p) * LINE; }

    DEVICE void load(const Params &p, const Given &in, const Head &head) {
        q[0].load(p, head, in.q, first);
        dy[0].load(p, head, in.dy, first);
        UNROLL for (int i = 0; i < 2; i++) {
            u32 t = first + lane_row() + 8 * i, query = least(t, head.tokens - 1), stat = 2 * (head.stat + query * p.g);
            // No probability is left of a row past the last query.
            lse[i] = t < head.tokens ? in.stats[stat] * LOG2E : INFINITY;
            delta[i] = in.stats[stat + 1];
            bias[i] = bias_at(p, head.g, query);
        }
    }
    // dS with COLUMNS keys from k0 + `from` on of a tile of k and v.
    DEVICE void weights(const Params &p, const Given &in, const Head &head, const Terms<1> &terms, const uint2 *keys, const Real *k,
        u32 k0, u32 from, Weights<COLUMNS / 8> (&ds)[1]) const {
        float s[1][COLUMNS / 8][4], dp[1][COLUMNS / 8][4];
        multiply(q, k, from, s);
        multiply(dy, k + TILE * D, from, dp);
        finish_scores(p, in.tables, terms, keys + from, threadIdx.x / 32 * 16, bias, s[0]);
        UNROLL for (int j = 0; j < COLUMNS / 8; j++) {
            UNROLL for (int i = 0; i < 4; i++) {
                float prob = exp2_fast(s[0][j][i] - lse[i / 2]);
                if (k0 + from + j * 8 + lane_column() + i % 2 >= head.tokens) prob = 0.0f;
                s[0][j][i] = prob * (dp[0][j][i] - delta[i / 2]);
            }
        }
        ds[0].round(s[0]);
    }
    // Adds dS to the sums of the lines that the keys from k0 on have.
    DEVICE void add(const Params &p, const Head &head, const uint2 *keys, u32 k0, u32 from, const Weights<COLUMNS / 8> &ds) {
        if (p.has_rel_h) {
            Axis axis = row_axis(p, k0);
            u32 last = least(k0 + from + COLUMNS, head.tokens) - 1;
            add_sums<LINE>(keys + from, 0, axis.line((k0 + from) / p.w), axis.line(last / p.w), ds, row_sums);
        }
        if (p.has_rel_w) add_sums<LINE>(keys + from, 16, 0, column_axis(p, k0).lines - 1, ds, column_sums(p));
    }
    // The tables' share of dq: the sums, which begin again, times the tables' rows.
    DEVICE void flush(const Params &p, const Given &in, const Head &head, u32 k0, float (&out)[D / 8][4]) {
        __syncwarp();
        if (p.has_rel_h) apply_axis<LINE, D>(p, row_axis(p, k0), true, rel_h_row(p, in.tables, head.g, 0), row_sums, first, out);
        if (p.has_rel_w) apply_axis<LINE, D>(p, column_axis(p, k0), false, rel_w_row(p, in.tables, head.g, 0), column_sums(p), first, out);
        __syncwarp();
        clear_lines(row_lines(p) + column_lines(p), row_sums);
        __syncwarp();
    }
};
