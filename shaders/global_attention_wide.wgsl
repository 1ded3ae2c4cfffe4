// subgroups: what follows is left out where the adapter has none.
//
// Passes of global attention without tables for software, which reads memory invocation by invocation: there a read that is the same for
// a subgroup costs as much as eight different ones. Invocations come in rows of eight, a subgroup each. Each owns four queries of a head
// (of a row's 32); invocation j of a row reads what is needed of the j-th of eight keys and broadcasts it. dk and dv: the same with keys
// and queries exchanged.
//
// Tried on llvmpipe, one core, GFLOP/s forward for 196 tokens, 8 heads of 32, one image (Mesa 25 / Mesa 22): a query an
// invocation, no broadcasts 1.2 / 0.2; four queries 1.2 / 0.7; four queries and broadcasts 7.2 / 2.2 (in loops), 9.1 / 2.3 (written
// out), queries in registers too 10.4 / 4.6. With position tables only 1.4 times as fast as without broadcasts, at 18 s to compile: left to the base.

// Channels are taken in pieces of so many vec4s.
const WIDE = 8u;

alias Outputs = array<mat4x4f, WIDE>;

// Of each of eight keys, a number for each of four queries.
struct Eight { s0: vec4f, s1: vec4f, s2: vec4f, s3: vec4f, s4: vec4f, s5: vec4f, s6: vec4f, s7: vec4f }

// Four tokens of a head: where they start (vec4s) and their statistics. Those past the last are the last again, and not `inside`.
// `head` is the head's first token.
struct Four { start: vec4u, stat: vec4u, inside: vec4<bool>, head: Place }

fn four(i: u32) -> Four {
    let tokens = p.h * p.w;
    let pieces = (tokens + 31u) / 32u;
    let row = i / 8u / pieces;
    let t = vec4u(i / 8u % pieces * 32u + i % 8u) + vec4u(0u, 8u, 16u, 24u);
    let at = min(t, vec4u(tokens - 1u));
    let last = p.n * p.g - 1u;
    let head = place(min(row, last) / p.g, min(row, last) % p.g, 0u);
    return Four(at * head.stride + head.base, at * p.g + head.stat, (t < vec4u(tokens)) & vec4<bool>(row <= last), head);
}

// Where token x0 + id of a head starts; past the last the last again.
fn eighth(head: Place, x0: u32, id: u32) -> u32 {
    return head.base + min(x0 + id, p.h * p.w - 1u) * head.stride;
}

// `sums` with the products of eight rows (read by the eight invocations) and four others added.
fn products(sums: Eight, mine: vec4f, others: mat4x4f) -> Eight {
    return Eight(
        sums.s0 + subgroupBroadcast(mine, 0u) * others, sums.s1 + subgroupBroadcast(mine, 1u) * others,
        sums.s2 + subgroupBroadcast(mine, 2u) * others, sums.s3 + subgroupBroadcast(mine, 3u) * others,
        sums.s4 + subgroupBroadcast(mine, 4u) * others, sums.s5 + subgroupBroadcast(mine, 5u) * others,
        sums.s6 + subgroupBroadcast(mine, 6u) * others, sums.s7 + subgroupBroadcast(mine, 7u) * others);
}

// A row under each of four weights.
fn outer(row: vec4f, weights: vec4f) -> mat4x4f {
    return mat4x4f(weights.x * row, weights.y * row, weights.z * row, weights.w * row);
}

// The sums of eight rows (read by the eight invocations) under the weights, for each of four.
fn weighted(s: Eight, mine: vec4f) -> mat4x4f {
    var sum = outer(subgroupBroadcast(mine, 0u), s.s0);
    sum += outer(subgroupBroadcast(mine, 1u), s.s1);
    sum += outer(subgroupBroadcast(mine, 2u), s.s2);
    sum += outer(subgroupBroadcast(mine, 3u), s.s3);
    sum += outer(subgroupBroadcast(mine, 4u), s.s4);
    sum += outer(subgroupBroadcast(mine, 5u), s.s5);
    sum += outer(subgroupBroadcast(mine, 6u), s.s6);
    return sum + outer(subgroupBroadcast(mine, 7u), s.s7);
}

fn scaled(m: mat4x4f, by: vec4f) -> mat4x4f {
    return mat4x4f(by.x * m[0], by.y * m[1], by.z * m[2], by.w * m[3]);
}

// The logits of the tokens x0.. ; those past the last are so small that their exponential is 0.
fn logits_of(s: Eight, x0: u32) -> Eight {
    let none = vec4f(-3.0e38);
    let left = p.h * p.w - x0;
    return Eight(
        p.scale * s.s0, select(none, p.scale * s.s1, left > 1u), select(none, p.scale * s.s2, left > 2u),
        select(none, p.scale * s.s3, left > 3u), select(none, p.scale * s.s4, left > 4u), select(none, p.scale * s.s5, left > 5u),
        select(none, p.scale * s.s6, left > 6u), select(none, p.scale * s.s7, left > 7u));
}

fn exponentials(s: Eight, less: vec4f) -> Eight {
    return Eight(
        exp(s.s0 - less), exp(s.s1 - less), exp(s.s2 - less), exp(s.s3 - less),
        exp(s.s4 - less), exp(s.s5 - less), exp(s.s6 - less), exp(s.s7 - less));
}

fn sum_of(s: Eight) -> vec4f {
    return (s.s0 + s.s1) + (s.s2 + s.s3) + ((s.s4 + s.s5) + (s.s6 + s.s7));
}

fn largest_of(s: Eight, least: vec4f) -> vec4f {
    return max(max(max(max(s.s0, s.s1), max(s.s2, s.s3)), max(max(s.s4, s.s5), max(s.s6, s.s7))), least);
}

@compute @workgroup_size(64)
fn global_attention_fwd_wide_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u,
    @builtin(subgroup_invocation_id) id: u32) {
    let at = four(flat_id(gid, groups, 64u));
    let d4 = p.d / 4u;
    // Written out below and not in loops, so that compilers keep these arrays in registers.
    var queries = Outputs();
    for (var c = 0u; c < WIDE; c++) {
        if c < d4 {
            queries[c] = mat4x4f(q[at.start.x + c], q[at.start.y + c], q[at.start.z + c], q[at.start.w + c]);
        }
    }
    for (var chunk = 0u; chunk < d4; chunk += WIDE) {
        var out = Outputs();
        var largest = vec4f(-3.0e38);
        var sum = vec4f(0.0);
        for (var x0 = 0u; x0 < p.h * p.w; x0 += 8u) {
            let mine = eighth(at.head, x0, id);
            var s = Eight();
            s = products(s, k[mine], queries[0]);
            if 1u < d4 { s = products(s, k[mine + 1u], queries[1]); }
            if 2u < d4 { s = products(s, k[mine + 2u], queries[2]); }
            if 3u < d4 { s = products(s, k[mine + 3u], queries[3]); }
            if 4u < d4 { s = products(s, k[mine + 4u], queries[4]); }
            if 5u < d4 { s = products(s, k[mine + 5u], queries[5]); }
            if 6u < d4 { s = products(s, k[mine + 6u], queries[6]); }
            if 7u < d4 { s = products(s, k[mine + 7u], queries[7]); }
            for (var c = WIDE; c < d4; c++) {
                s = products(s, k[mine + c], mat4x4f(q[at.start.x + c], q[at.start.y + c], q[at.start.z + c], q[at.start.w + c]));
            }
            s = logits_of(s, x0);
            let next = largest_of(s, largest);
            let factor = exp(largest - next);
            largest = next;
            s = exponentials(s, next);
            sum = sum * factor + sum_of(s);
            let from_v = mine + chunk;
            if chunk + 0u < d4 { out[0] = scaled(out[0], factor) + weighted(s, v[from_v + 0u]); }
            if chunk + 1u < d4 { out[1] = scaled(out[1], factor) + weighted(s, v[from_v + 1u]); }
            if chunk + 2u < d4 { out[2] = scaled(out[2], factor) + weighted(s, v[from_v + 2u]); }
            if chunk + 3u < d4 { out[3] = scaled(out[3], factor) + weighted(s, v[from_v + 3u]); }
            if chunk + 4u < d4 { out[4] = scaled(out[4], factor) + weighted(s, v[from_v + 4u]); }
            if chunk + 5u < d4 { out[5] = scaled(out[5], factor) + weighted(s, v[from_v + 5u]); }
            if chunk + 6u < d4 { out[6] = scaled(out[6], factor) + weighted(s, v[from_v + 6u]); }
            if chunk + 7u < d4 { out[7] = scaled(out[7], factor) + weighted(s, v[from_v + 7u]); }
        }
        let share = 1.0 / sum;
        for (var i = 0u; i < 4u; i++) {
            if at.inside[i] {
                for (var c = 0u; c < min(WIDE, d4 - chunk); c++) {
                    y[at.start[i] + chunk + c] = share[i] * out[c][i];
                }
                lse[at.stat[i]] = largest[i] + log(sum[i]);
            }
        }
    }
}

// dq of four queries.
@compute @workgroup_size(64)
fn global_attention_bwd_dq_wide_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u,
    @builtin(subgroup_invocation_id) id: u32) {
    let at = four(flat_id(gid, groups, 64u));
    let d4 = p.d / 4u;
    let stat = transpose(mat4x2f(stats[at.stat.x], stats[at.stat.y], stats[at.stat.z], stats[at.stat.w]));
    for (var chunk = 0u; chunk < d4; chunk += WIDE) {
        var out = Outputs();
        for (var x0 = 0u; x0 < p.h * p.w; x0 += 8u) {
            let mine = eighth(at.head, x0, id);
            var s = Eight();
            var dp = Eight();
            for (var c = 0u; c < d4; c++) {
                s = products(s, k[mine + c], mat4x4f(q[at.start.x + c], q[at.start.y + c], q[at.start.z + c], q[at.start.w + c]));
                dp = products(dp, v[mine + c], mat4x4f(dy[at.start.x + c], dy[at.start.y + c], dy[at.start.z + c], dy[at.start.w + c]));
            }
            s = exponentials(logits_of(s, x0), stat[0]);
            let ds = Eight(
                s.s0 * (dp.s0 - stat[1]), s.s1 * (dp.s1 - stat[1]), s.s2 * (dp.s2 - stat[1]), s.s3 * (dp.s3 - stat[1]),
                s.s4 * (dp.s4 - stat[1]), s.s5 * (dp.s5 - stat[1]), s.s6 * (dp.s6 - stat[1]), s.s7 * (dp.s7 - stat[1]));
            for (var c = 0u; c < WIDE; c++) {
                if chunk + c < d4 {
                    out[c] += weighted(ds, k[mine + chunk + c]);
                }
            }
        }
        for (var i = 0u; i < 4u; i++) {
            if at.inside[i] {
                for (var c = 0u; c < min(WIDE, d4 - chunk); c++) {
                    grad[at.start[i] + chunk + c] = p.scale * out[c][i];
                }
            }
        }
    }
}

// dk and dv of four keys.
@compute @workgroup_size(64)
fn global_attention_bwd_dkv_wide_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u,
    @builtin(subgroup_invocation_id) id: u32) {
    let at = four(flat_id(gid, groups, 64u));
    let d4 = p.d / 4u;
    let last = p.h * p.w - 1u;
    for (var chunk = 0u; chunk < d4; chunk += WIDE) {
        var dk = Outputs();
        var dv = Outputs();
        for (var x0 = 0u; x0 <= last; x0 += 8u) {
            let mine = eighth(at.head, x0, id);
            let stat = stats[at.head.stat + min(x0 + id, last) * p.g];
            var s = Eight();
            var dp = Eight();
            for (var c = 0u; c < d4; c++) {
                s = products(s, q[mine + c], mat4x4f(k[at.start.x + c], k[at.start.y + c], k[at.start.z + c], k[at.start.w + c]));
                dp = products(dp, dy[mine + c], mat4x4f(v[at.start.x + c], v[at.start.y + c], v[at.start.z + c], v[at.start.w + c]));
            }
            s = logits_of(s, x0);
            let l = stat.x;
            s = Eight(
                exp(s.s0 - subgroupBroadcast(l, 0u)), exp(s.s1 - subgroupBroadcast(l, 1u)), exp(s.s2 - subgroupBroadcast(l, 2u)),
                exp(s.s3 - subgroupBroadcast(l, 3u)), exp(s.s4 - subgroupBroadcast(l, 4u)), exp(s.s5 - subgroupBroadcast(l, 5u)),
                exp(s.s6 - subgroupBroadcast(l, 6u)), exp(s.s7 - subgroupBroadcast(l, 7u)));
            let e = stat.y;
            let ds = Eight(
                s.s0 * (dp.s0 - subgroupBroadcast(e, 0u)), s.s1 * (dp.s1 - subgroupBroadcast(e, 1u)),
                s.s2 * (dp.s2 - subgroupBroadcast(e, 2u)), s.s3 * (dp.s3 - subgroupBroadcast(e, 3u)),
                s.s4 * (dp.s4 - subgroupBroadcast(e, 4u)), s.s5 * (dp.s5 - subgroupBroadcast(e, 5u)),
                s.s6 * (dp.s6 - subgroupBroadcast(e, 6u)), s.s7 * (dp.s7 - subgroupBroadcast(e, 7u)));
            for (var c = 0u; c < WIDE; c++) {
                if chunk + c < d4 {
                    dk[c] += weighted(ds, q[mine + chunk + c]);
                    dv[c] += weighted(s, dy[mine + chunk + c]);
                }
            }
        }
        for (var i = 0u; i < 4u; i++) {
            if at.inside[i] {
                for (var c = 0u; c < min(WIDE, d4 - chunk); c++) {
                    grad[at.start[i] + chunk + c] = p.scale * dk[c][i];
                    grad_v[at.start[i] + chunk + c] = dv[c][i];
                }
            }
        }
    }
}
