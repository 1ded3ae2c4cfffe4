// Batch norm fused with residual and activation; formulas and the table [4, channels] (mean, 1 / std, weight / std, bias)
// are explained in src/ops/batch_norm.rs. Layout [rows, channels]: neighbouring invocations take neighbouring channels.

struct BatchNormParams {
    rows: u32,
    channels: u32,
    rows_per_block: u32,
    blocks: u32,
    act: u32,
    residual: u32,
    residual_grad: u32,
    training: u32,
    eps: f32,
    momentum: f32,
}

const RELU = 1u;
const SILU = 2u;

@group(0) @binding(0) var<uniform> p: BatchNormParams;

// ------------------------------------------------------------------------------------------------ statistics
// A running mean and sum of squared deviations, merged by Chan, Golub and LeVeque's rule: exact also far from zero.

struct Moments { seen: f32, mean: f32, m2: f32 }

fn merge(a: Moments, b: Moments) -> Moments {
    let n = a.seen + b.seen;
    let delta = b.mean - a.mean;
    let mean = a.mean + delta * (b.seen / n);
    return Moments(n, mean, a.m2 + b.m2 + delta * delta * (a.seen * b.seen / n));
}

@group(0) @binding(1) var<storage, read> stats_x: array<f32>;
@group(0) @binding(2) var<storage, read_write> stats_part: array<f32>;

// One invocation a channel of a block of rows; part [blocks, 2, channels].
@compute @workgroup_size(64)
fn batch_norm_stats_f32(@builtin(global_invocation_id) gid: vec3u) {
    let c = gid.x;
    if c >= p.channels { return; }
    let first = gid.y * p.rows_per_block;
    let end = min(first + p.rows_per_block, p.rows);
    var total = Moments(0.0, 0.0, 0.0);
    // Eight rows in registers at a time: their own mean first, so that a division comes once in eight.
    var r = first;
    for (; r + 8u <= end; r += 8u) {
        var at = r * p.channels + c;
        let v0 = stats_x[at]; at += p.channels;
        let v1 = stats_x[at]; at += p.channels;
        let v2 = stats_x[at]; at += p.channels;
        let v3 = stats_x[at]; at += p.channels;
        let v4 = stats_x[at]; at += p.channels;
        let v5 = stats_x[at]; at += p.channels;
        let v6 = stats_x[at]; at += p.channels;
        let v7 = stats_x[at];
        let mean = (((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7))) * 0.125;
        let low = vec4f(v0, v1, v2, v3) - mean;
        let high = vec4f(v4, v5, v6, v7) - mean;
        total = merge(total, Moments(8.0, mean, dot(low, low) + dot(high, high)));
    }
    for (; r < end; r++) {
        total = merge(total, Moments(1.0, stats_x[r * p.channels + c], 0.0));
    }
    let at = gid.y * 2u * p.channels + c;
    stats_part[at] = total.mean;
    stats_part[at + p.channels] = total.m2;
}

@group(0) @binding(1) var<storage, read> finish_part: array<f32>;
@group(0) @binding(2) var<storage, read> finish_weight: array<f32>;
@group(0) @binding(3) var<storage, read> finish_bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> finish_mean: array<f32>;
@group(0) @binding(5) var<storage, read_write> finish_var: array<f32>;
@group(0) @binding(6) var<storage, read_write> finish_table: array<f32>;

var<workgroup> finish_shares: array<f32, 64>;

// The sum over the invocations of a channel, for all of them.
fn over_rows(lane: u32, v: f32) -> f32 {
    finish_shares[lane] = v;
    for (var half = 32u; half >= 8u; half /= 2u) {
        workgroupBarrier();
        if lane < half { finish_shares[lane] += finish_shares[lane + half]; }
    }
    workgroupBarrier();
    let sum = finish_shares[lane % 8u];
    workgroupBarrier();
    return sum;
}

fn rows_of(block: u32) -> f32 {
    return f32(min(p.rows_per_block, p.rows - block * p.rows_per_block));
}

// Joins the blocks: a workgroup takes 8 channels, 8 invocations each. The mean is the mean of the blocks' as seen from the first of them, then
// the squared deviations are those inside the blocks and of the blocks' means.
@compute @workgroup_size(64)
fn batch_norm_finish_f32(@builtin(workgroup_id) wg: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
    let own = (wg.y * groups.x + wg.x) * 8u + lane % 8u;
    let c = min(own, p.channels - 1u);
    let rows = f32(p.rows);
    let shift = finish_part[c];
    var sum = 0.0;
    for (var b = lane / 8u; b < p.blocks; b += 8u) {
        sum += rows_of(b) * (finish_part[b * 2u * p.channels + c] - shift);
    }
    let mean = shift + over_rows(lane, sum) / rows;
    var squares = 0.0;
    for (var b = lane / 8u; b < p.blocks; b += 8u) {
        let at = b * 2u * p.channels + c;
        let d = finish_part[at] - mean;
        squares += finish_part[at + p.channels] + rows_of(b) * (d * d);
    }
    let m2 = over_rows(lane, squares);
    if lane >= 8u || own >= p.channels { return; }
    let inv_std = 1.0 / sqrt(m2 / rows + p.eps);
    finish_table[c] = mean;
    finish_table[p.channels + c] = inv_std;
    finish_table[2u * p.channels + c] = finish_weight[c] * inv_std;
    finish_table[3u * p.channels + c] = finish_bias[c];
    finish_mean[c] += p.momentum * (mean - finish_mean[c]);
    finish_var[c] += p.momentum * (m2 / (rows - 1.0) - finish_var[c]);
}

@group(0) @binding(1) var<storage, read> table_weight: array<f32>;
@group(0) @binding(2) var<storage, read> table_bias: array<f32>;
@group(0) @binding(3) var<storage, read> table_mean: array<f32>;
@group(0) @binding(4) var<storage, read> table_var: array<f32>;
@group(0) @binding(5) var<storage, read_write> table_out: array<f32>;

// One invocation a channel.
@compute @workgroup_size(64)
fn batch_norm_table_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let c = flat_id(gid, groups, 64u);
    if c >= p.channels { return; }
    let inv_std = 1.0 / sqrt(table_var[c] + p.eps);
    table_out[c] = table_mean[c];
    table_out[p.channels + c] = inv_std;
    table_out[2u * p.channels + c] = table_weight[c] * inv_std;
    table_out[3u * p.channels + c] = table_bias[c];
}

// ------------------------------------------------------------------------------------------------ forward

fn sigmoid(x: f32) -> f32 {
    let e = exp(-abs(x));
    return select(e, 1.0, x >= 0.0) / (1.0 + e);
}

@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> fwd_residual: array<f32>;
@group(0) @binding(3) var<storage, read> fwd_table: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

// One invocation an element.
@compute @workgroup_size(256)
fn batch_norm_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.rows * p.channels { return; }
    let c = i % p.channels;
    var z = (x[i] - fwd_table[c]) * fwd_table[2u * p.channels + c] + fwd_table[3u * p.channels + c];
    if p.residual != 0u { z += fwd_residual[i]; }
    if p.act == RELU { z = select(z, 0.0, z < 0.0); }
    if p.act == SILU { z *= sigmoid(z); }
    y[i] = z;
}

// ------------------------------------------------------------------------------------------------ backward

@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read> third: array<f32>;
@group(0) @binding(4) var<storage, read> table: array<f32>;

// g = dy * act'(z) of element i in channel c. With a residual, third is y (ReLU) or the residual (SiLU).
fn before_act(i: u32, c: u32) -> f32 {
    if p.act == 0u { return dy[i]; }
    if p.act == RELU && p.residual != 0u { return select(0.0, dy[i], third[i] > 0.0); }
    var z = (x[i] - table[c]) * table[2u * p.channels + c] + table[3u * p.channels + c];
    if p.act == RELU { return select(0.0, dy[i], z > 0.0); }
    if p.residual != 0u { z += third[i]; }
    let s = sigmoid(z);
    return dy[i] * s * (1.0 + z * (1.0 - s));
}

@group(0) @binding(5) var<storage, read_write> sums_part: array<f32>;

// One invocation a channel of a block of rows; part [blocks, 2, channels]: sum of g, sum of g * xhat.
@compute @workgroup_size(64)
fn batch_norm_bwd_sums_f32(@builtin(global_invocation_id) gid: vec3u) {
    let c = gid.x;
    if c >= p.channels { return; }
    let first = gid.y * p.rows_per_block;
    let end = min(first + p.rows_per_block, p.rows);
    let mean = table[c];
    let inv_std = table[p.channels + c];
    var sum = 0.0;
    var sum_x = 0.0;
    for (var r = first; r < end; r++) {
        let i = r * p.channels + c;
        let g = before_act(i, c);
        sum += g;
        sum_x += g * ((x[i] - mean) * inv_std);
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
fn batch_norm_bwd_finish_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
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

@group(0) @binding(5) var<storage, read> dweight: array<f32>;
@group(0) @binding(6) var<storage, read> dbias: array<f32>;
@group(0) @binding(7) var<storage, read_write> dx: array<f32>;
@group(0) @binding(8) var<storage, read_write> dresidual: array<f32>;

// One invocation an element.
@compute @workgroup_size(256)
fn batch_norm_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.rows * p.channels { return; }
    let c = i % p.channels;
    let g = before_act(i, c);
    var centred = 0.0;
    if p.training != 0u {
        let xhat = (x[i] - table[c]) * table[p.channels + c];
        centred = (dbias[c] + xhat * dweight[c]) / f32(p.rows);
    }
    dx[i] = table[2u * p.channels + c] * (g - centred);
    if p.residual_grad != 0u { dresidual[i] = g; }
}
