// Backward of local attention; put after local_attention.wgsl, whose helpers it uses.

// dq of a query: dS = P (dy.v - delta), dq = sum of dS (scale k + rel_h[a] + rel_w[b]).
fn dq_chunk(at: Place, chunk: u32) -> Chunk {
    let here = at.base + at.t * at.stride;
    let stat = stats[at.stat + at.t * p.g];
    var out = Chunk();
    for (var b0 = 0u; b0 < p.kw; b0 += BLOCK) {
        let column_term = column_terms(at, b0);
        var by_column = Block();
        for (var a = 0u; a < p.kh; a++) {
            let keys = keys_of(at, a, b0);
            var s = logits(at, keys, a, b0, column_term);
            var dp = Block();
            for (var c = 0u; c < p.d / 4u; c++) {
                let upstream = dy[here + c];
                for (var j = 0u; j < BLOCK; j++) {
                    dp[j] += dot(upstream, v[at.base + keys.token[j] * at.stride + c]);
                }
            }
            var by_row = 0.0;
            for (var j = 0u; j < BLOCK; j++) {
                let value = select(0.0, dp[j], keys.inside[j]);
                let ds = select(0.0, exp(s[j] - stat.x) * (value - stat.y), keys.counts[j]);
                by_row += ds;
                by_column[j] += ds;
                s[j] = select(0.0, ds, keys.inside[j]);
            }
            for (var c = 0u; c < CHUNK; c++) {
                if chunk + c < p.d / 4u {
                    var o = vec4f();
                    for (var j = 0u; j < BLOCK; j++) {
                        o += s[j] * k[at.base + keys.token[j] * at.stride + chunk + c];
                    }
                    out[c] += p.scale * o;
                    if p.has_rel_h != 0u {
                        out[c] += by_row * tables[rel_h_row(at.g, a) + chunk + c];
                    }
                }
            }
        }
        if p.has_rel_w != 0u {
            for (var c = 0u; c < CHUNK; c++) {
                if chunk + c < p.d / 4u {
                    for (var j = 0u; j < BLOCK; j++) {
                        let row = rel_w_row(at.g, window_column(b0, j));
                        out[c] += by_column[j] * tables[row + chunk + c];
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

// dk and dv of a key: dk = scale * sum of dS q, dv = sum of P dy, over the queries whose window holds it. The key lies at offset
// (a, b) of the query that lies at offset (kh-1-a, kw-1-b) of the key.
fn dkv_chunk(at: Place, chunk: u32) -> KeyGradients {
    let here = at.base + at.t * at.stride;
    var out = KeyGradients();
    for (var a = 0u; a < p.kh; a++) {
        for (var b0 = 0u; b0 < p.kw; b0 += BLOCK) {
            // Queries, not keys: only those inside the map are there.
            let queries = keys_of(at, p.kh - 1u - a, b0);
            var s = Block();
            var dp = Block();
            for (var c = 0u; c < p.d / 4u; c++) {
                var key = p.scale * k[here + c];
                if p.has_rel_h != 0u {
                    key += tables[rel_h_row(at.g, a) + c];
                }
                let value = v[here + c];
                for (var j = 0u; j < BLOCK; j++) {
                    let query = at.base + queries.token[j] * at.stride + c;
                    var other = key;
                    if p.has_rel_w != 0u {
                        other += tables[rel_w_row(at.g, p.kw - 1u - window_column(b0, j)) + c];
                    }
                    s[j] += dot(q[query], other);
                    dp[j] += dot(dy[query], value);
                }
            }
            for (var j = 0u; j < BLOCK; j++) {
                s[j] += bias_of(at.g, a, p.kw - 1u - window_column(b0, j));
                let stat = stats[at.stat + queries.token[j] * p.g];
                s[j] = select(0.0, exp(s[j] - stat.x), queries.inside[j]);
                dp[j] = s[j] * (dp[j] - stat.y);
            }
            for (var c = 0u; c < CHUNK; c++) {
                if chunk + c < p.d / 4u {
                    var dk = vec4f();
                    var dv = vec4f();
                    for (var j = 0u; j < BLOCK; j++) {
                        let i = at.base + queries.token[j] * at.stride + chunk + c;
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
fn local_attention_bwd_dq_f32(
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
fn local_attention_bwd_dkv_f32(
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
fn local_attention_bwd_f32(
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

// The sums of head g at offset (a, b) over a piece of the batch's rows.
fn offset_sums(piece: u32, g: u32, a: u32, b: u32, chunk: u32) -> OffsetSums {
    let rows = (p.n * p.h + p.pieces - 1u) / p.pieces;
    var out = OffsetSums();
    for (var row = piece * rows; row < min(p.n * p.h, (piece + 1u) * rows); row++) {
        let y = row % p.h;
        let key_y = moved_row(y, a);
        for (var x = 0u; x < p.w; x++) {
            let key_x = moved_column(x, b);
            let inside = key_y < p.h && key_x < p.w;
            if !inside && p.zero_border == 0u {
                continue;
            }
            let at = place(row / p.h, g, y * p.w + x);
            let query = at.base + at.t * at.stride;
            let key = at.base + select(at.t, key_y * p.w + key_x, inside) * at.stride;
            let here = select(0.0, 1.0, inside);
            var s = bias_of(g, a, b);
            var dp = 0.0;
            for (var c = 0u; c < p.d / 4u; c++) {
                var other = here * p.scale * k[key + c];
                if p.has_rel_h != 0u {
                    other += tables[rel_h_row(g, a) + c];
                }
                if p.has_rel_w != 0u {
                    other += tables[rel_w_row(g, b) + c];
                }
                s += dot(q[query + c], other);
                dp += here * dot(dy[query + c], v[key + c]);
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
    return out;
}

// partial [pieces, G, kh, kw, width].
@compute @workgroup_size(64)
fn local_attention_bwd_tables_f32(
    @builtin(global_invocation_id) gid: vec3u,
    @builtin(num_workgroups) groups: vec3u,
) {
    let i = flat_id(gid, groups, 64u);
    if i >= p.pieces * p.g * p.kh * p.kw {
        return;
    }
    let b = i % p.kw;
    let a = i / p.kw % p.kh;
    let g = i / p.kw / p.kh % p.g;
    let piece = i / p.kw / p.kh / p.g;
    for (var chunk = 0u; chunk < p.d / 4u; chunk += CHUNK) {
        store_sums(i, chunk, offset_sums(piece, g, a, b, chunk));
    }
}

@compute @workgroup_size(64)
fn local_attention_bwd_tables_sum_f32(
    @builtin(global_invocation_id) gid: vec3u,
    @builtin(num_workgroups) groups: vec3u,
) {
    sum_tables(flat_id(gid, groups, 64u));
}
