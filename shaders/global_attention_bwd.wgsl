// Backward of global attention; put after global_attention.wgsl, whose bindings and helpers it uses.

// dq of a query: dS = P (dy.v - delta), dq = sum of dS (scale k + rel_h[a] + rel_w[b]).
fn dq_chunk(at: Place, chunk: u32) -> Chunk {
    let walk = walk();
    let here = at.base + at.t * at.stride;
    let stat = stats[at.stat + at.t * p.g];
    var out = Chunk();
    for (var x0 = 0u; x0 < walk.y; x0 += BLOCK) {
        let column_term = column_terms(at, x0);
        var by_column = Block();
        for (var row = 0u; row < walk.x; row++) {
            var s = logits(at, row, x0, walk.y, column_term);
            var dp = Block();
            for (var c = 0u; c < p.d / 4u; c++) {
                let upstream = dy[here + c];
                for (var j = 0u; j < BLOCK; j++) {
                    let key = row * walk.y + column(x0, j, walk.y);
                    dp[j] += dot(upstream, v[at.base + key * at.stride + c]);
                }
            }
            var by_row = 0.0;
            for (var j = 0u; j < BLOCK; j++) {
                s[j] = select(0.0, exp(s[j] - stat.x) * (dp[j] - stat.y), x0 + j < walk.y);
                by_row += s[j];
                by_column[j] += s[j];
            }
            for (var c = 0u; c < CHUNK; c++) {
                if chunk + c < p.d / 4u {
                    var o = vec4f();
                    for (var j = 0u; j < BLOCK; j++) {
                        let key = row * walk.y + column(x0, j, walk.y);
                        o += s[j] * k[at.base + key * at.stride + chunk + c];
                    }
                    out[c] += p.scale * o;
                    if p.has_rel_h != 0u {
                        out[c] += by_row * tables[rel_h_row(at.g, row + p.h - 1u - at.y) + chunk + c];
                    }
                }
            }
        }
        if p.has_rel_w != 0u {
            for (var c = 0u; c < CHUNK; c++) {
                if chunk + c < p.d / 4u {
                    for (var j = 0u; j < BLOCK; j++) {
                        let b = column(x0, j, walk.y) + p.w - 1u - at.x;
                        out[c] += by_column[j] * tables[rel_w_row(at.g, b) + chunk + c];
                    }
                }
            }
        }
    }
    return out;
}

struct KeyGradients {
    dk: Chunk,
    dv: Chunk,
}

// dk and dv of a key: dk = scale * sum of dS q, dv = sum of P dy.
fn dkv_chunk(at: Place, chunk: u32) -> KeyGradients {
    let walk = walk();
    let here = at.base + at.t * at.stride;
    var out = KeyGradients();
    for (var row = 0u; row < walk.x; row++) {
        // Only with tables do rows mean rows of the map.
        let a = select(0u, at.y + p.h - 1u - row, any_table());
        for (var x0 = 0u; x0 < walk.y; x0 += BLOCK) {
            var s = Block();
            var dp = Block();
            for (var c = 0u; c < p.d / 4u; c++) {
                var key = p.scale * k[here + c];
                if p.has_rel_h != 0u {
                    key += tables[rel_h_row(at.g, a) + c];
                }
                let value = v[here + c];
                for (var j = 0u; j < BLOCK; j++) {
                    let x = column(x0, j, walk.y);
                    let query = at.base + (row * walk.y + x) * at.stride + c;
                    var other = key;
                    if p.has_rel_w != 0u {
                        other += tables[rel_w_row(at.g, at.x + p.w - 1u - x) + c];
                    }
                    s[j] += dot(q[query], other);
                    dp[j] += dot(dy[query], value);
                }
            }
            for (var j = 0u; j < BLOCK; j++) {
                let x = column(x0, j, walk.y);
                if p.has_bias != 0u {
                    s[j] += bias_of(at.g, a, at.x + p.w - 1u - x);
                }
                let stat = stats[at.stat + (row * walk.y + x) * p.g];
                s[j] = select(0.0, exp(s[j] - stat.x), x0 + j < walk.y);
                dp[j] = s[j] * (dp[j] - stat.y);
            }
            for (var c = 0u; c < CHUNK; c++) {
                if chunk + c < p.d / 4u {
                    var dk = vec4f();
                    var dv = vec4f();
                    for (var j = 0u; j < BLOCK; j++) {
                        let query = row * walk.y + column(x0, j, walk.y);
                        let i = at.base + query * at.stride + chunk + c;
                        dk += dp[j] * q[i];
                        dv += s[j] * dy[i];
                    }
                    out.dk[c] += p.scale * dk;
                    out.dv[c] += dv;
                }
            }
        }
    }
    return out;
}

@compute @workgroup_size(64)
fn global_attention_bwd_dq_f32(
    @builtin(global_invocation_id) gid: vec3u,
    @builtin(num_workgroups) groups: vec3u,
) {
    let i = flat_id(gid, groups, 64u);
    if i >= p.n * p.g * p.h * p.w {
        return;
    }
    let at = place_of(i);
    for (var chunk = 0u; chunk < p.d / 4u; chunk += CHUNK) {
        let done = dq_chunk(at, chunk);
        for (var c = 0u; c < min(CHUNK, p.d / 4u - chunk); c++) {
            grad[at.base + at.t * at.stride + chunk + c] = done[c];
        }
    }
}

@compute @workgroup_size(64)
fn global_attention_bwd_dkv_f32(
    @builtin(global_invocation_id) gid: vec3u,
    @builtin(num_workgroups) groups: vec3u,
) {
    let i = flat_id(gid, groups, 64u);
    if i >= p.n * p.g * p.h * p.w {
        return;
    }
    let at = place_of(i);
    for (var chunk = 0u; chunk < p.d / 4u; chunk += CHUNK) {
        let done = dkv_chunk(at, chunk);
        for (var c = 0u; c < min(CHUNK, p.d / 4u - chunk); c++) {
            let to = at.base + at.t * at.stride + chunk + c;
            grad[to] = done.dk[c];
            grad_v[to] = done.dv[c];
        }
    }
}

// Small maps: dq of a token as query, then dk and dv of the same token as key, into one buffer: dq, dk, dv `p.part` apart.
@compute @workgroup_size(64)
fn global_attention_bwd_f32(
    @builtin(global_invocation_id) gid: vec3u,
    @builtin(num_workgroups) groups: vec3u,
) {
    let i = flat_id(gid, groups, 64u);
    if i >= p.n * p.g * p.h * p.w {
        return;
    }
    let at = place_of(i);
    for (var chunk = 0u; chunk < p.d / 4u; chunk += CHUNK) {
        let dq = dq_chunk(at, chunk);
        let dkv = dkv_chunk(at, chunk);
        for (var c = 0u; c < min(CHUNK, p.d / 4u - chunk); c++) {
            let to = at.base + at.t * at.stride + chunk + c;
            grad[to] = dq[c];
            grad[p.part / 4u + to] = dkv.dk[c];
            grad[p.part / 2u + to] = dkv.dv[c];
        }
    }
}

// The sums of head g at offset (a, b) over a piece of the batch.
fn offset_sums(piece: u32, g: u32, a: u32, b: u32, chunk: u32) -> OffsetSums {
    let images = (p.n + p.pieces - 1u) / p.pieces;
    // Queries whose key at this offset lies in the map.
    let rows = vec2u(max(a, p.h - 1u) - a, min(p.h, 2u * p.h - 1u - a));
    let columns = vec2u(max(b, p.w - 1u) - b, min(p.w, 2u * p.w - 1u - b));
    var out = OffsetSums();
    for (var n = piece * images; n < min(p.n, (piece + 1u) * images); n++) {
        for (var y = rows.x; y < rows.y; y++) {
            for (var x = columns.x; x < columns.y; x++) {
                let at = place(n, g, y * p.w + x);
                let query = at.base + at.t * at.stride;
                let key = at.base + ((y + a + 1u - p.h) * p.w + x + b + 1u - p.w) * at.stride;
                var s = bias_of(g, a, b);
                var dp = 0.0;
                for (var c = 0u; c < p.d / 4u; c++) {
                    var other = p.scale * k[key + c];
                    if p.has_rel_h != 0u {
                        other += tables[rel_h_row(g, a) + c];
                    }
                    if p.has_rel_w != 0u {
                        other += tables[rel_w_row(g, b) + c];
                    }
                    s += dot(q[query + c], other);
                    dp += dot(dy[query + c], v[key + c]);
                }
                let stat = stats[at.stat + at.t * p.g];
                let ds = exp(s - stat.x) * (dp - stat.y);
                out.ds += ds;
                for (var c = 0u; c < CHUNK; c++) {
                    if chunk + c < p.d / 4u {
                        out.dsq[c] += ds * q[query + chunk + c];
                    }
                }
            }
        }
    }
    return out;
}

// partial [pieces, G, 2H-1, 2W-1, width].
@compute @workgroup_size(64)
fn global_attention_bwd_tables_f32(
    @builtin(global_invocation_id) gid: vec3u,
    @builtin(num_workgroups) groups: vec3u,
) {
    let i = flat_id(gid, groups, 64u);
    let sizes = vec2u(table_rows(), table_columns());
    if i >= p.pieces * p.g * sizes.x * sizes.y {
        return;
    }
    let b = i % sizes.y;
    let a = i / sizes.y % sizes.x;
    let g = i / sizes.y / sizes.x % p.g;
    let piece = i / sizes.y / sizes.x / p.g;
    for (var chunk = 0u; chunk < p.d / 4u; chunk += CHUNK) {
        store_sums(i, chunk, offset_sums(piece, g, a, b, chunk));
    }
}

@compute @workgroup_size(64)
fn global_attention_bwd_tables_sum_f32(
    @builtin(global_invocation_id) gid: vec3u,
    @builtin(num_workgroups) groups: vec3u,
) {
    sum_tables(flat_id(gid, groups, 64u));
}
