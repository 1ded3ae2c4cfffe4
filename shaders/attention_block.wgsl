// The fused attention block; formulas and who calls what in src/ops/attention_block.rs. T = H W is at most 64 in fwd.
//
// Every product is made of tiles of 64 x 64: a workgroup of 256 invocations owns one, an invocation 4 x 4 sums of it in registers
// (4 flop for each number read from workgroup memory). Slices of 16 along the sum lie in workgroup memory, transposed, both
// operands 68 apart so that they can be written along either side. Numbers are loaded one by one, so any count of channels will do;
// neighbouring invocations read neighbouring numbers.
//
// fwd: a workgroup owns a head of `p.images` images (their places fill the 64 rows of a tile). It makes q, k and v in tiles, writes
// them to memory, and attends image by image: scores in registers, position terms and then probabilities in workgroup memory.
// proj, dgrad, wgrad: a tile of y, dx or dW each. Sums run in a fixed order and nothing is added by two workgroups.
//
// Bytes of fwd: x once for each head (out of the cache), weights once for each workgroup of their head, q, k, v written once and
// read back, output once. Workgroup memory: 16 KiB, all of it. Heads are padded to multiples of 4 numbers with zeros.

struct AttentionBlockParams {
    n: u32, h: u32, w: u32, g: u32,
    d: u32, has_rel_h: u32, has_rel_w: u32, has_bias: u32,
    scale: f32, pieces: u32, part: u32, by_axis: u32,
    c: u32, width: u32, o: u32, residual: u32,
    save: u32, images: u32, parts: u32, weight: u32,
}

@group(0) @binding(0) var<uniform> p: AttentionBlockParams;
// fwd: x, weights, tables -> q, k, v (p.part apart), attended, lse. dgrad: grads (dq, dk, dv p.part apart), weights, dy -> dx.
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> wq: array<f32>;
@group(0) @binding(3) var<storage, read> wk: array<f32>;
@group(0) @binding(4) var<storage, read> wv: array<f32>;
@group(0) @binding(5) var<storage, read> tables: array<f32>;
@group(0) @binding(5) var<storage, read> dy: array<f32>;
@group(0) @binding(6) var<storage, read_write> qkv: array<f32>;
@group(0) @binding(6) var<storage, read_write> dx: array<f32>;
@group(0) @binding(7) var<storage, read_write> attended: array<f32>;
@group(0) @binding(8) var<storage, read_write> lse: array<f32>;
// proj: attended, wo, x -> y.
@group(0) @binding(2) var<storage, read> wo: array<f32>;
@group(0) @binding(3) var<storage, read> x: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
// wgrad: x, grads -> dw.
@group(0) @binding(2) var<storage, read> grads: array<f32>;
@group(0) @binding(3) var<storage, read_write> dw: array<f32>;

const TILE = 64u;
const SLICE = 16u;
const LINE = 68u;
const RIGHT = 1088u;

// Slices of both operands; in the attention, position terms, then probabilities.
var<workgroup> memory: array<f32, 4096>;

alias Sums = array<vec4f, 4>;

// The workgroup's number in a grid made by Plan::items with one item each.
fn group_of(wg: vec3u, groups: vec3u) -> u32 {
    return wg.y * groups.x + wg.x;
}

// sums += a slice of both operands. Invocations meet before and after.
fn multiply(sums: ptr<function, Sums>, me: u32) {
    let row = me / 16u * 4u;
    let column = me % 16u * 4u;
    workgroupBarrier();
    for (var k = 0u; k < SLICE; k++) {
        let l = k * LINE + row;
        let r = RIGHT + k * LINE + column;
        let right = vec4f(memory[r], memory[r + 1u], memory[r + 2u], memory[r + 3u]);
        (*sums)[0] += memory[l] * right;
        (*sums)[1] += memory[l + 1u] * right;
        (*sums)[2] += memory[l + 2u] * right;
        (*sums)[3] += memory[l + 3u] * right;
    }
    workgroupBarrier();
}

// Where an operand that is contiguous along the sum is put: 16 neighbours of a row, 16 rows at once, four times.
fn along_row(me: u32, turn: u32) -> u32 {
    return turn * 16u + me / 16u;
}
fn along_slot(me: u32, turn: u32) -> u32 {
    return me % 16u * LINE + along_row(me, turn);
}
// One whose rows are the sum's index: 64 neighbours of a row, four rows at once.
fn side_slot(me: u32, turn: u32) -> u32 {
    return (turn * 4u + me / 64u) * LINE + me % 64u;
}

fn padded_depth() -> u32 {
    return p.g * p.d;
}

fn rows() -> u32 {
    return p.n * p.h * p.w;
}

// Row `row` of the weight of q, k or v in the head's padded numbers: where it starts; false where it is padding.
fn weight_row(row: u32, start: ptr<function, u32>) -> bool {
    let c = row % p.d;
    *start = (row / p.d * p.width + c) * p.c;
    return c < p.width;
}

fn weight_at(which: u32, i: u32) -> f32 {
    var v = 0.0;
    if which == 0u {
        v = wq[i];
    } else if which == 1u {
        v = wk[i];
    } else {
        v = wv[i];
    }
    return v;
}

// ------------------------------------------------------------------------------------------------ forward

// Numbers first .. first + 63 of (q, k, v) of head g for the rows row0 .. row0 + count - 1, into memory.
fn project(g: u32, row0: u32, count: u32, first: u32, me: u32) {
    var sums = Sums();
    for (var k0 = 0u; k0 < p.c; k0 += SLICE) {
        let k = k0 + me % 16u;
        for (var turn = 0u; turn < 4u; turn++) {
            let row = along_row(me, turn);
            var left = 0.0;
            if row < count && k < p.c {
                left = a[(row0 + row) * p.c + k];
            }
            memory[along_slot(me, turn)] = left;
            let column = first + row;
            var right = 0.0;
            var start: u32;
            if column < 3u * p.d && k < p.c && weight_row(g * p.d + column % p.d, &start) {
                right = weight_at(column / p.d, start + k);
            }
            memory[RIGHT + along_slot(me, turn)] = right;
        }
        multiply(&sums, me);
    }
    // Four neighbours belong to one of q, k and v: p.d is a multiple of 4.
    let column = first + me % 16u * 4u;
    for (var i = 0u; i < 4u; i++) {
        let row = me / 16u * 4u + i;
        if row < count && column < 3u * p.d {
            let at = column / p.d * p.part + ((row0 + row) * p.g + g) * p.d + column % p.d;
            for (var j = 0u; j < 4u; j++) {
                qkv[at + j] = sums[i][j];
            }
        }
    }
}

// Four neighbours of q, k or v.
fn four(i: u32) -> vec4f {
    return vec4f(qkv[i], qkv[i + 1u], qkv[i + 2u], qkv[i + 3u]);
}

fn table_four(i: u32) -> vec4f {
    return vec4f(tables[i], tables[i + 1u], tables[i + 2u], tables[i + 3u]);
}

// Where rel_w starts: parts of the packed tables start at multiples of 128 numbers (`ALIGN`).
fn rel_w_start() -> u32 {
    return (p.has_rel_h * (2u * p.h - 1u) * padded_depth() + 127u) / 128u * 128u;
}

// q . rel_h for each map row and then q . rel_w for each map column of the keys, 64 queries each, into memory. An axis without table
// has no lines: at most 64 of them in all.
fn fill_terms(base: u32, g: u32, me: u32) {
    let tokens = p.h * p.w;
    let row_lines = p.has_rel_h * p.h;
    let lines = row_lines + p.has_rel_w * p.w;
    for (var i = me; i < lines * TILE; i += 256u) {
        let query = min(i % TILE, tokens - 1u);
        let line = i / TILE;
        var row = (line + p.h - 1u - query / p.w) * padded_depth() + g * p.d;
        if line >= row_lines {
            row = rel_w_start() + (line - row_lines + p.w - 1u - query % p.w) * padded_depth() + g * p.d;
        }
        let q = base + query * padded_depth();
        var sum = 0.0;
        for (var c = 0u; c < p.d; c += 4u) {
            sum += dot(four(q + c), table_four(row + c));
        }
        memory[i] = sum;
    }
}

// Scores of four queries with four keys, places past the last standing for the last.
fn scores(base: u32, me: u32) -> Sums {
    let last = p.h * p.w - 1u;
    var sums = Sums();
    for (var c = 0u; c < p.d; c += 4u) {
        var keys: array<vec4f, 4>;
        for (var j = 0u; j < 4u; j++) {
            keys[j] = four(p.part + base + min(me % 16u * 4u + j, last) * padded_depth() + c);
        }
        for (var i = 0u; i < 4u; i++) {
            let query = four(base + min(me / 16u * 4u + i, last) * padded_depth() + c);
            sums[i] += vec4f(dot(query, keys[0]), dot(query, keys[1]), dot(query, keys[2]), dot(query, keys[3]));
        }
    }
    return sums;
}

// Attention of one image, whose first number of q stands at `base`. All invocations call it.
fn attend(base: u32, image: u32, g: u32, me: u32) {
    let tokens = p.h * p.w;
    let row_lines = p.has_rel_h * p.h;
    var s = scores(base, me);
    workgroupBarrier();
    fill_terms(base, g, me);
    workgroupBarrier();
    for (var i = 0u; i < 4u; i++) {
        let query = me / 16u * 4u + i;
        s[i] *= p.scale;
        for (var j = 0u; j < 4u; j++) {
            let key = min(me % 16u * 4u + j, tokens - 1u);
            if p.has_rel_h != 0u {
                s[i][j] += memory[key / p.w * TILE + query];
            }
            if p.has_rel_w != 0u {
                s[i][j] += memory[(row_lines + key % p.w) * TILE + query];
            }
        }
    }
    workgroupBarrier();
    for (var i = 0u; i < 4u; i++) {
        for (var j = 0u; j < 4u; j++) {
            memory[(me / 16u * 4u + i) * TILE + me % 16u * 4u + j] = s[i][j];
        }
    }
    workgroupBarrier();
    // From here on an invocation has a query, and with three others its keys and its numbers of output.
    let query = me / 4u;
    let line = query * TILE;
    var largest = memory[line];
    for (var key = 1u; key < tokens; key++) {
        largest = max(largest, memory[line + key]);
    }
    workgroupBarrier();
    for (var key = me % 4u; key < tokens; key += 4u) {
        memory[line + key] = exp(memory[line + key] - largest);
    }
    workgroupBarrier();
    if query < tokens {
        var sum = 0.0;
        for (var key = 0u; key < tokens; key++) {
            sum += memory[line + key];
        }
        for (var c = me % 4u * 4u; c < p.d; c += 16u) {
            var out = vec4f();
            for (var key = 0u; key < tokens; key++) {
                out += memory[line + key] * four(2u * p.part + base + key * padded_depth() + c);
            }
            for (var j = 0u; j < 4u; j++) {
                attended[base + query * padded_depth() + c + j] = out[j] / sum;
            }
        }
        if me % 4u == 0u {
            lse[(image * tokens + query) * p.g + g] = largest + log(sum);
        }
    }
}

@compute @workgroup_size(256)
fn attention_block_fwd_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) me: u32) {
    let g = group_of(wg, groups) % p.g;
    let first = group_of(wg, groups) / p.g * p.images;
    if first >= p.n {
        return;
    }
    let tokens = p.h * p.w;
    let end = min(first + p.images, p.n);
    for (var column = 0u; column < 3u * p.d; column += TILE) {
        project(g, first * tokens, (end - first) * tokens, column, me);
    }
    // What the workgroup has written is there for all of it.
    storageBarrier();
    for (var image = first; image < end; image++) {
        attend((image * tokens * p.g + g) * p.d, image, g, me);
    }
}

// ------------------------------------------------------------------------------------------------ products

// y = attended wo^T (+ x).
@compute @workgroup_size(256)
fn attention_block_proj_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) me: u32) {
    let depth = p.g * p.width;
    let across = (p.o + TILE - 1u) / TILE;
    let row0 = group_of(wg, groups) / across * TILE;
    let column0 = group_of(wg, groups) % across * TILE;
    if row0 >= rows() {
        return;
    }
    var sums = Sums();
    for (var k0 = 0u; k0 < depth; k0 += SLICE) {
        let k = k0 + me % 16u;
        for (var turn = 0u; turn < 4u; turn++) {
            let row = row0 + along_row(me, turn);
            let column = column0 + along_row(me, turn);
            var left = 0.0;
            if row < rows() && k < depth {
                left = a[row * depth + k];
            }
            var right = 0.0;
            if column < p.o && k < depth {
                right = wo[column * depth + k];
            }
            memory[along_slot(me, turn)] = left;
            memory[RIGHT + along_slot(me, turn)] = right;
        }
        multiply(&sums, me);
    }
    for (var i = 0u; i < 4u; i++) {
        for (var j = 0u; j < 4u; j++) {
            let row = row0 + me / 16u * 4u + i;
            let column = column0 + me % 16u * 4u + j;
            if row < rows() && column < p.o {
                let at = row * p.o + column;
                var sum = sums[i][j];
                if p.residual == 1u {
                    sum += x[at];
                }
                y[at] = sum;
            }
        }
    }
}

// dx = dq wq + dk wk + dv wv (+ dy): one sum over the padded numbers of all three.
@compute @workgroup_size(256)
fn attention_block_dgrad_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) me: u32) {
    let depth = padded_depth();
    let across = (p.c + TILE - 1u) / TILE;
    let row0 = group_of(wg, groups) / across * TILE;
    let column0 = group_of(wg, groups) % across * TILE;
    if row0 >= rows() {
        return;
    }
    var sums = Sums();
    for (var k0 = 0u; k0 < 3u * depth; k0 += SLICE) {
        for (var turn = 0u; turn < 4u; turn++) {
            let k = k0 + me % 16u;
            let row = row0 + along_row(me, turn);
            var left = 0.0;
            if row < rows() && k < 3u * depth {
                left = a[k / depth * p.part + row * depth + k % depth];
            }
            memory[along_slot(me, turn)] = left;
            let l = k0 + turn * 4u + me / 64u;
            let column = column0 + me % 64u;
            var right = 0.0;
            var start: u32;
            if l < 3u * depth && column < p.c && weight_row(l % depth, &start) {
                right = weight_at(l / depth, start + column);
            }
            memory[RIGHT + side_slot(me, turn)] = right;
        }
        multiply(&sums, me);
    }
    for (var i = 0u; i < 4u; i++) {
        for (var j = 0u; j < 4u; j++) {
            let row = row0 + me / 16u * 4u + i;
            let column = column0 + me % 16u * 4u + j;
            if row < rows() && column < p.c {
                let at = row * p.c + column;
                var sum = sums[i][j];
                if p.residual == 1u {
                    sum += dy[at];
                }
                dx[at] = sum;
            }
        }
    }
}

// dw [parts][3][depth, c]: along z which of q, k and v, then the part of the rows.
@compute @workgroup_size(256)
fn attention_block_wgrad_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) me: u32) {
    let depth = padded_depth();
    let across = (p.c + TILE - 1u) / TILE;
    let row0 = group_of(wg, groups) / across * TILE;
    let column0 = group_of(wg, groups) % across * TILE;
    if row0 >= depth {
        return;
    }
    let which = wg.z % 3u;
    let length = (rows() + p.parts - 1u) / p.parts;
    let end = min((wg.z / 3u + 1u) * length, rows());
    var sums = Sums();
    for (var k0 = wg.z / 3u * length; k0 < end; k0 += SLICE) {
        for (var turn = 0u; turn < 4u; turn++) {
            let k = k0 + turn * 4u + me / 64u;
            let row = row0 + me % 64u;
            let column = column0 + me % 64u;
            var left = 0.0;
            if k < end && row < depth {
                left = grads[which * p.part + k * depth + row];
            }
            var right = 0.0;
            if k < end && column < p.c {
                right = a[k * p.c + column];
            }
            memory[side_slot(me, turn)] = left;
            memory[RIGHT + side_slot(me, turn)] = right;
        }
        multiply(&sums, me);
    }
    for (var i = 0u; i < 4u; i++) {
        let row = row0 + me / 16u * 4u + i;
        var start: u32;
        if row < depth && weight_row(row, &start) {
            for (var j = 0u; j < 4u; j++) {
                let column = column0 + me % 16u * 4u + j;
                if column < p.c {
                    dw[(wg.z / 3u * 3u + which) * p.weight + start + column] = sums[i][j];
                }
            }
        }
    }
}
