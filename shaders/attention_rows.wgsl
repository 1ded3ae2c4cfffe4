// Rows of attention's tensors: other widths, and rowsum(dy * y) beside the log-sum-exp. An invocation owns an element (pad) or a
// row (delta); rows of delta are a multiple of 4 numbers. Bytes: each tensor once.

struct RowParams {
    rows: u32,
    from_width: u32,
    to_width: u32,
}

@group(0) @binding(0) var<uniform> p: RowParams;

// pad.
@group(0) @binding(1) var<storage, read> numbers: array<f32>;
@group(0) @binding(2) var<storage, read_write> result: array<f32>;
// delta.
@group(0) @binding(1) var<storage, read> y: array<vec4f>;
@group(0) @binding(2) var<storage, read> dy: array<vec4f>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read_write> stats: array<vec2f>;

// Rows of one width as rows of another: cut, or filled with zeros.
@compute @workgroup_size(64)
fn attention_rows_pad_f32(
    @builtin(global_invocation_id) gid: vec3u,
    @builtin(num_workgroups) groups: vec3u,
) {
    let i = flat_id(gid, groups, 64u);
    if i >= p.rows * p.to_width {
        return;
    }
    let c = i % p.to_width;
    var x = 0.0;
    if c < p.from_width {
        x = numbers[i / p.to_width * p.from_width + c];
    }
    result[i] = x;
}

// stats = (lse, sum over d of y * dy).
@compute @workgroup_size(64)
fn attention_rows_delta_f32(
    @builtin(global_invocation_id) gid: vec3u,
    @builtin(num_workgroups) groups: vec3u,
) {
    let row = flat_id(gid, groups, 64u);
    if row >= p.rows {
        return;
    }
    let width = p.from_width / 4u;
    var sum = 0.0;
    for (var i = row * width; i < (row + 1u) * width; i++) {
        sum += dot(y[i], dy[i]);
    }
    stats[row] = vec2f(lse[row], sum);
}
