// The halves of LESA; formulas and layouts in src/ops/lesa.rs. e = p.size numbers of a query or key, 2 e of a value; row i + L - 1 - j of
// the table belongs to the offset i - j.
//
// Logits: one invocation a pair of pixels and a head. Context: one workgroup a query of a head, with a number for each key in
// workgroup memory. Gradients of qkv and of the tables, one for each image: one invocation an element, which asks every pair that it has
// a share in, in order.

struct LesaParams { images: u32, pixels: u32, heads: u32, size: u32 }

@group(0) @binding(0) var<uniform> p: LesaParams;
@group(0) @binding(1) var<storage, read> qkv: array<f32>;
@group(0) @binding(2) var<storage, read> table: array<f32>;
@group(0) @binding(3) var<storage, read_write> logits_out: array<f32>;

// Of qkv: pixel i of an image, its head and a number of it.
fn at(image: u32, i: u32, head: u32, c: u32) -> u32 { return ((image * p.pixels + i) * p.heads + head) * 4u * p.size + c; }
// Of the table: the offset i - j.
fn row_of(i: u32, j: u32, c: u32) -> u32 { return (i + p.pixels - 1u - j) * 4u * p.size + c; }
// Of the logits, first kind; the next ones are p.heads further.
fn logit(image: u32, i: u32, j: u32, head: u32) -> u32 { return ((image * p.pixels + i) * p.pixels + j) * 3u * p.heads + head; }
// Of the weights.
fn weight(image: u32, head: u32, i: u32, j: u32) -> u32 { return ((image * p.heads + head) * p.pixels + i) * p.pixels + j; }
// Of the context: of values (0) or places (1).
fn context(image: u32, i: u32, kind: u32, head: u32, c: u32) -> u32 {
    return (((image * p.pixels + i) * 2u + kind) * p.heads + head) * 2u * p.size + c;
}

@compute @workgroup_size(256)
fn lesa_logits_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let id = flat_id(gid, groups, 256u);
    if id >= p.images * p.pixels * p.pixels * p.heads { return; }
    let head = id % p.heads;
    let j = (id / p.heads) % p.pixels;
    let i = (id / (p.heads * p.pixels)) % p.pixels;
    let image = id / (p.heads * p.pixels * p.pixels);
    let q = at(image, i, head, 0u);
    let k = at(image, j, head, p.size);
    let place_q = row_of(i, j, 0u);
    let place_k = row_of(j, i, p.size);
    var same = 0.0;
    var by_q = 0.0;
    var by_k = 0.0;
    for (var c = 0u; c < p.size; c++) {
        same += qkv[q + c] * qkv[k + c];
        by_q += qkv[q + c] * table[place_q + c];
        by_k += qkv[k + c] * table[place_k + c];
    }
    let out = logit(image, i, j, head);
    logits_out[out] = same;
    logits_out[out + p.heads] = by_q;
    logits_out[out + 2u * p.heads] = by_k;
}

@group(0) @binding(3) var<storage, read> dlogits: array<f32>;
@group(0) @binding(4) var<storage, read_write> dqkv: array<f32>;
@group(0) @binding(5) var<storage, read_write> dtables: array<f32>;

// The gradient of number c of q (c < e) or k (c - e) of pixel i.
fn of_pixel(image: u32, i: u32, head: u32, c: u32) -> f32 {
    let is_q = c < p.size;
    let other = select(c - p.size, c + p.size, is_q);
    let kind = select(2u, 1u, is_q) * p.heads;
    var sum = 0.0;
    for (var j = 0u; j < p.pixels; j++) {
        let pair = select(logit(image, j, i, head), logit(image, i, j, head), is_q);
        sum += dlogits[pair] * qkv[at(image, j, head, other)];
        sum += dlogits[pair + kind] * table[row_of(i, j, c)];
    }
    return sum;
}

// One image's gradient of number c of the table's row: the pairs with this offset, of all heads.
fn of_row(image: u32, row: u32, c: u32) -> f32 {
    let is_q = c < p.size;
    let kind = select(2u, 1u, is_q) * p.heads;
    var sum = 0.0;
    for (var head = 0u; head < p.heads; head++) {
        for (var i = row - min(row, p.pixels - 1u); i < min(row + 1u, p.pixels); i++) {
            let j = i + p.pixels - 1u - row;
            let pair = select(logit(image, j, i, head), logit(image, i, j, head), is_q);
            sum += dlogits[pair + kind] * qkv[at(image, i, head, c)];
        }
    }
    return sum;
}

@compute @workgroup_size(256)
fn lesa_logits_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let id = flat_id(gid, groups, 256u);
    let width = 4u * p.size;
    let len = p.images * p.pixels * p.heads * width;
    let rows = 2u * p.pixels - 1u;
    let c = id % width;
    if id < len {
        var d = 0.0;
        if c < 2u * p.size {
            d = of_pixel(id / (width * p.heads * p.pixels), (id / (width * p.heads)) % p.pixels, (id / width) % p.heads, c);
        }
        dqkv[id] = d;
    } else if id - len < p.images * rows * width {
        var d = 0.0;
        if c < 2u * p.size { d = of_row((id - len) / (width * rows), ((id - len) / width) % rows, c); }
        dtables[id - len] = d;
    }
}

// ------------------------------------------------------------------------------------------------ context

const GROUP = 64u;
const MAX_PIXELS = 1024u;
var<workgroup> numbers: array<f32, MAX_PIXELS>;

@group(0) @binding(3) var<storage, read> logits: array<f32>;
@group(0) @binding(4) var<storage, read_write> weights_out: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn lesa_context_fwd_f32(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) me: u32) {
    let id = group.y * groups.x + group.x;
    if id >= p.images * p.pixels * p.heads { return; }
    let head = id % p.heads;
    let i = (id / p.heads) % p.pixels;
    let image = id / (p.heads * p.pixels);
    var top = -3.0e38;
    for (var j = me; j < p.pixels; j += GROUP) {
        let source = logit(image, i, j, head);
        let sum = logits[source] + logits[source + p.heads] + logits[source + 2u * p.heads];
        numbers[j] = sum;
        top = max(top, sum);
    }
    top = group_max(me, top);
    var sum = 0.0;
    for (var j = me; j < p.pixels; j += GROUP) {
        let power = exp(numbers[j] - top);
        numbers[j] = power;
        sum += power;
    }
    let scale = 1.0 / group_sum(me, sum);
    for (var j = me; j < p.pixels; j += GROUP) {
        let share = numbers[j] * scale;
        numbers[j] = share;
        weights_out[weight(image, head, i, j)] = share;
    }
    workgroupBarrier();
    for (var c = me; c < 2u * p.size; c += GROUP) {
        var of_values = 0.0;
        var of_places = 0.0;
        for (var j = 0u; j < p.pixels; j++) {
            of_values += numbers[j] * qkv[at(image, j, head, 2u * p.size + c)];
            of_places += numbers[j] * table[row_of(i, j, 2u * p.size + c)];
        }
        y[context(image, i, 0u, head, c)] = of_values;
        y[context(image, i, 1u, head, c)] = of_places;
    }
}

@group(0) @binding(3) var<storage, read> weights: array<f32>;
@group(0) @binding(4) var<storage, read> dy: array<f32>;
@group(0) @binding(5) var<storage, read_write> dlogits_out: array<f32>;

@compute @workgroup_size(64)
fn lesa_context_bwd_f32(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) me: u32) {
    let id = group.y * groups.x + group.x;
    if id >= p.images * p.pixels * p.heads { return; }
    let head = id % p.heads;
    let i = (id / p.heads) % p.pixels;
    let image = id / (p.heads * p.pixels);
    let of_values = context(image, i, 0u, head, 0u);
    let of_places = context(image, i, 1u, head, 0u);
    var sum = 0.0;
    for (var j = me; j < p.pixels; j += GROUP) {
        let v = at(image, j, head, 2u * p.size);
        let place = row_of(i, j, 2u * p.size);
        var d = 0.0;
        for (var c = 0u; c < 2u * p.size; c++) {
            d += dy[of_values + c] * qkv[v + c];
            d += dy[of_places + c] * table[place + c];
        }
        numbers[j] = d;
        sum += weights[weight(image, head, i, j)] * d;
    }
    sum = group_sum(me, sum);
    for (var j = me; j < p.pixels; j += GROUP) {
        let d = weights[weight(image, head, i, j)] * (numbers[j] - sum);
        let out = logit(image, i, j, head);
        dlogits_out[out] = d;
        dlogits_out[out + p.heads] = d;
        dlogits_out[out + 2u * p.heads] = d;
    }
}

@group(0) @binding(1) var<storage, read> v_weights: array<f32>;
@group(0) @binding(2) var<storage, read> v_dy: array<f32>;
@group(0) @binding(3) var<storage, read_write> v_dqkv: array<f32>;
@group(0) @binding(4) var<storage, read_write> v_dtables: array<f32>;

@compute @workgroup_size(256)
fn lesa_context_bwd_values_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let id = flat_id(gid, groups, 256u);
    let width = 4u * p.size;
    let len = p.images * p.pixels * p.heads * width;
    let rows = 2u * p.pixels - 1u;
    let c = id % width;
    var sum = 0.0;
    if id < len {
        let head = (id / width) % p.heads;
        let j = (id / (width * p.heads)) % p.pixels;
        let image = id / (width * p.heads * p.pixels);
        if c >= 2u * p.size {
            for (var i = 0u; i < p.pixels; i++) {
                sum += v_weights[weight(image, head, i, j)] * v_dy[context(image, i, 0u, head, c - 2u * p.size)];
            }
        }
        v_dqkv[id] = sum;
    } else if id - len < p.images * rows * width {
        let row = ((id - len) / width) % rows;
        let image = (id - len) / (width * rows);
        if c >= 2u * p.size {
            for (var head = 0u; head < p.heads; head++) {
                for (var i = row - min(row, p.pixels - 1u); i < min(row + 1u, p.pixels); i++) {
                    let share = v_weights[weight(image, head, i, i + p.pixels - 1u - row)];
                    sum += share * v_dy[context(image, i, 1u, head, c - 2u * p.size)];
                }
            }
        }
        v_dtables[id - len] = sum;
    }
}
