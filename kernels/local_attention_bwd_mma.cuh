// What the gradients of the queries and of the tables share on tensor cores: dS of a patch of queries, and its sums by offset.

#include "local_attention_mma.cuh"

// Log-sum-exp (of powers of two) and rowsum(dy * y) of a lane's two rows; 0 outside the map.
struct Statistics {
    float lse[2], delta[2];
    template <int D> DEVICE Statistics(const Params &p, const Patch<D> &at, const float *stats) {
        UNROLL for (int i = 0; i < 2; i++) {
            u32 row = at.g + 8 * i;
            bool in = at.inside(p, row);
            u32 stat = at.head.stat + (in ? at.place(p, row) : 0) * p.g;
            lse[i] = in ? LOG2E * stats[2 * stat] : 0.0f;
            delta[i] = in ? stats[2 * stat + 1] : 0.0f;
        }
    }
};

// dS summed over the columns of the halo, [16, 16] for its rows, and over the rows, [16, 16] for its columns.
struct Margins {
    float sums[4][4];

    DEVICE Margins() {
        UNROLL for (int i = 0; i < 16; i++) sums[i / 4][i % 4] = 0.0f;
    }
    // The right operand has a row for each place of the chunk, with a 1 at its row or column of the halo.
    DEVICE void add(const u32 (&ds)[4], const Chunk &chunk, u32 g) {
        u32 one = pair_of<Real>(1.0f, 0.0f);
        UNROLL for (int i = 0; i < 4; i++) {
            const u32 (&at)[4] = i < 2 ? chunk.row : chunk.column;
            u32 owner = i % 2 * 8 + g, ones[2];
            UNROLL for (int j = 0; j < 2; j++) {
                ones[j] = (at[2 * j] == owner ? one : 0) | (at[2 * j + 1] == owner ? one << 16 : 0);
            }
            mma16(sums[i], ds, ones, Real{});
        }
    }
    // The sums in scratch of the warp's own, [16, TERMS].
    DEVICE void put(float *scratch, u32 g, u32 t) const {
        __syncwarp();
        UNROLL for (int i = 0; i < 16; i++) scratch[(g + i % 4 / 2 * 8) * TERMS + i / 4 * 8 + 2 * t + i % 2] = sums[i / 4][i % 4];
        __syncwarp();
    }
    // The sum of row offset `offset`, or of column offset `offset - kh`.
    static DEVICE float of(const Params &p, const float *scratch, u32 query, u32 offset) {
        if (offset < p.kh) return scratch[query * TERMS + query / 4 + offset];
        if (offset < p.kh + p.kw) return scratch[query * TERMS + 16 + query % 4 + offset - p.kh];
        return 0.0f;
    }
};

// dS of the warp's patch of queries, rounded, as fragment a for 16 places of its halo at a time: `each(ds, chunk)`. The tables must be on
// their way. All threads of a block must call it; it leaves the patch's rows of q in m.own.
template <int D, class Each> DEVICE void score_gradients(const Params &p, const Patch<D> &at, const Memory<D> &m, const Given &in, Each each) {
    at.stage_own(p, in.q, m.own);
    at.stage_own(p, in.dy, m.other);
    Left<D> query, dy;
    Statistics of(p, at, in.stats);
    Window seen(p, at, !p.zero_border);
    Terms<D> terms(p, at, m);
    auto stage = [&](u32 from, u32 rows) { at.stage_band(p, in.k, in.v, from, rows, m.a, m.b); };
    auto begin = [&]() {
        query.take(m.own, at.lane);
        dy.take(m.other, at.lane);
        position_terms<D>(p, at, query, m);
    };
    walk(p, at, stage, begin, [&](const Chunk &chunk) {
        float s[2][4] = {}, dp[2][4] = {};
        multiply<D>(s, query, m.a + chunk.as_rows);
        multiply<D>(dp, dy, m.b + chunk.as_rows);
        UNROLL for (int i = 0; i < 8; i++) {
            int k = i / 4 * 2 + i % 2, r = i / 2 % 2;
            float &x = s[i / 4][i % 4];
            if (seen.column(chunk.column[k]) && seen.row(r, chunk.row[k])) {
                x = LOG2E * p.scale * x + terms.at(p, r, chunk.row[k], chunk.column[k]);
                x = exp2_fast(x - of.lse[r]) * (dp[i / 4][i % 4] - of.delta[r]);
            } else {
                x = 0.0f;
            }
        }
        u32 ds[4];
        as_left(s, ds);
        each(ds, chunk);
    });
}
