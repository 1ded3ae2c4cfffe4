// Softmax cross-entropy; formulas in src/ops/cross_entropy.rs. rows [N, 3]: loss, weight, log-sum-exp of each row.

struct CrossEntropyParams { rows: u32, classes: u32, weighted: u32, smoothing: f32, nan: f32 }

@group(0) @binding(0) var<uniform> p: CrossEntropyParams;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read> labels: array<u32>;
@group(0) @binding(3) var<storage, read> class_weight: array<f32>;
@group(0) @binding(4) var<storage, read_write> rows_out: array<f32>;

fn weight_of(k: u32) -> f32 {
    if p.weighted == 0u { return 1.0; }
    return class_weight[k];
}

// One invocation a row.
@compute @workgroup_size(64)
fn cross_entropy_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let n = flat_id(gid, groups, 64u);
    if n >= p.rows { return; }
    let first = n * p.classes;
    var top = logits[first];
    for (var k = 1u; k < p.classes; k++) { top = max(top, logits[first + k]); }
    var sum = 0.0;
    for (var k = 0u; k < p.classes; k++) { sum += exp(logits[first + k] - top); }
    let lse = top + log(sum);
    rows_out[3u * n + 2u] = lse;
    let label = labels[n];
    if label >= p.classes {
        rows_out[3u * n] = p.nan;
        rows_out[3u * n + 1u] = 1.0;
        return;
    }
    let own = weight_of(label);
    var loss = (1.0 - p.smoothing) * own * (lse - logits[first + label]);
    if p.smoothing > 0.0 {
        var spread = 0.0;
        for (var k = 0u; k < p.classes; k++) { spread += weight_of(k) * (lse - logits[first + k]); }
        loss += p.smoothing / f32(p.classes) * spread;
    }
    rows_out[3u * n] = loss;
    rows_out[3u * n + 1u] = own;
}

@group(0) @binding(1) var<storage, read> finish_rows: array<f32>;
@group(0) @binding(2) var<storage, read> finish_weight: array<f32>;
@group(0) @binding(3) var<storage, read_write> loss_out: array<f32>;
@group(0) @binding(4) var<storage, read_write> totals_out: array<f32>;

const GROUP = 64u;
var<workgroup> shares: array<vec3f, GROUP>;

// One workgroup: each invocation sums every 64th row and class, the first one the shares.
@compute @workgroup_size(64)
fn cross_entropy_finish_f32(@builtin(local_invocation_index) me: u32) {
    var share = vec3f(0.0);
    for (var n = me; n < p.rows; n += GROUP) {
        share += vec3f(finish_rows[3u * n], finish_rows[3u * n + 1u], 0.0);
    }
    for (var k = me; k < p.classes; k += GROUP) {
        var weight = 1.0;
        if p.weighted != 0u { weight = finish_weight[k]; }
        share.z += weight;
    }
    shares[me] = share;
    workgroupBarrier();
    if me == 0u {
        var total = vec3f(0.0);
        for (var i = 0u; i < GROUP; i++) { total += shares[i]; }
        loss_out[0] = total.x / total.y;
        totals_out[0] = total.y;
        totals_out[1] = total.z;
    }
}

@group(0) @binding(4) var<storage, read> rows: array<f32>;
@group(0) @binding(5) var<storage, read> totals: array<f32>;
@group(0) @binding(6) var<storage, read> dloss: array<f32>;
@group(0) @binding(7) var<storage, read_write> dlogits: array<f32>;

// One invocation a logit.
@compute @workgroup_size(256)
fn cross_entropy_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.rows * p.classes { return; }
    let n = i / p.classes;
    let k = i % p.classes;
    let own = rows[3u * n + 1u] * (1.0 - p.smoothing);
    let spread_share = p.smoothing / f32(p.classes);
    let target_here = select(0.0, own, k == labels[n]) + spread_share * weight_of(k);
    let softmax = exp(logits[i] - rows[3u * n + 2u]);
    dlogits[i] = dloss[0] / totals[0] * (softmax * (own + spread_share * totals[1]) - target_here);
}
