// Softmax along rows: x [rows, columns]. One workgroup a row; sums are taken in a fixed tree.

struct SoftmaxParams { rows: u32, columns: u32 }

@group(0) @binding(0) var<uniform> p: SoftmaxParams;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;

const GROUP = 64u;

@compute @workgroup_size(64)
fn softmax_fwd_f32(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) me: u32) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows { return; }
    let first = row * p.columns;
    var top = a[first];
    for (var k = me; k < p.columns; k += GROUP) { top = max(top, a[first + k]); }
    top = group_max(me, top);
    var sum = 0.0;
    for (var k = me; k < p.columns; k += GROUP) { sum += exp(a[first + k] - top); }
    let scale = 1.0 / group_sum(me, sum);
    for (var k = me; k < p.columns; k += GROUP) { y[first + k] = exp(a[first + k] - top) * scale; }
}

// a = y, b = dy
@compute @workgroup_size(64)
fn softmax_bwd_f32(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) me: u32) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows { return; }
    let first = row * p.columns;
    var sum = 0.0;
    for (var k = me; k < p.columns; k += GROUP) { sum += a[first + k] * b[first + k]; }
    let dot_y_dy = group_sum(me, sum);
    for (var k = me; k < p.columns; k += GROUP) { dx[first + k] = a[first + k] * (b[first + k] - dot_y_dy); }
}
