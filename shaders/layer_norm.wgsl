// Layer norm along rows: x [rows, channels]; formulas in src/ops/layer_norm.rs. stats [rows, 2]: mean, 1 / std.

struct LayerNormParams { rows: u32, channels: u32, rows_per_block: u32, blocks: u32, eps: f32 }

@group(0) @binding(0) var<uniform> p: LayerNormParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> fwd_weight: array<f32>;
@group(0) @binding(3) var<storage, read> fwd_bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
@group(0) @binding(5) var<storage, read_write> fwd_stats: array<f32>;

const GROUP = 64u;

// One workgroup a row.
@compute @workgroup_size(64)
fn layer_norm_fwd_f32(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) me: u32) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows { return; }
    let first = row * p.channels;
    var sum = 0.0;
    for (var c = me; c < p.channels; c += GROUP) { sum += x[first + c]; }
    let mean = group_sum(me, sum) / f32(p.channels);
    var squares = 0.0;
    for (var c = me; c < p.channels; c += GROUP) {
        let d = x[first + c] - mean;
        squares += d * d;
    }
    let inv_std = 1.0 / sqrt(group_sum(me, squares) / f32(p.channels) + p.eps);
    for (var c = me; c < p.channels; c += GROUP) {
        y[first + c] = (x[first + c] - mean) * inv_std * fwd_weight[c] + fwd_bias[c];
    }
    if me == 0u {
        fwd_stats[2u * row] = mean;
        fwd_stats[2u * row + 1u] = inv_std;
    }
}

@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read> weight: array<f32>;
@group(0) @binding(4) var<storage, read> stats: array<f32>;
@group(0) @binding(5) var<storage, read_write> dx: array<f32>;

// One workgroup a row.
@compute @workgroup_size(64)
fn layer_norm_bwd_f32(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) me: u32) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows { return; }
    let first = row * p.channels;
    let mean = stats[2u * row];
    let inv_std = stats[2u * row + 1u];
    var sum = 0.0;
    var sum_x = 0.0;
    for (var c = me; c < p.channels; c += GROUP) {
        let g = dy[first + c] * weight[c];
        sum += g;
        sum_x += g * ((x[first + c] - mean) * inv_std);
    }
    let g_mean = group_sum(me, sum) / f32(p.channels);
    let gx_mean = group_sum(me, sum_x) / f32(p.channels);
    for (var c = me; c < p.channels; c += GROUP) {
        let xhat = (x[first + c] - mean) * inv_std;
        dx[first + c] = inv_std * (dy[first + c] * weight[c] - g_mean - xhat * gx_mean);
    }
}

@group(0) @binding(3) var<storage, read> sums_stats: array<f32>;
@group(0) @binding(4) var<storage, read_write> sums_part: array<f32>;

// One invocation a channel of a block of rows; part [blocks, 2, channels]: sum of dy, sum of dy * xhat.
@compute @workgroup_size(64)
fn layer_norm_bwd_sums_f32(@builtin(global_invocation_id) gid: vec3u) {
    let c = gid.x;
    if c >= p.channels { return; }
    let first = gid.y * p.rows_per_block;
    let end = min(first + p.rows_per_block, p.rows);
    var sum = 0.0;
    var sum_x = 0.0;
    for (var r = first; r < end; r++) {
        let i = r * p.channels + c;
        sum += dy[i];
        sum_x += dy[i] * ((x[i] - sums_stats[2u * r]) * sums_stats[2u * r + 1u]);
    }
    let at = gid.y * 2u * p.channels + c;
    sums_part[at] = sum;
    sums_part[at + p.channels] = sum_x;
}

@group(0) @binding(1) var<storage, read> total_part: array<f32>;
@group(0) @binding(2) var<storage, read_write> total_dweight: array<f32>;
@group(0) @binding(3) var<storage, read_write> total_dbias: array<f32>;

// One invocation a channel.
@compute @workgroup_size(64)
fn layer_norm_bwd_finish_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let c = flat_id(gid, groups, 64u);
    if c >= p.channels { return; }
    var sum = 0.0;
    var sum_x = 0.0;
    for (var b = 0u; b < p.blocks; b++) {
        let at = b * 2u * p.channels + c;
        sum += total_part[at];
        sum_x += total_part[at + p.channels];
    }
    total_dweight[c] = sum_x;
    total_dbias[c] = sum;
}
