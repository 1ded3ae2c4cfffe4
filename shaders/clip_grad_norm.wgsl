// Norm of a gradient and the factor of a step; formulas in src/ops/clip_grad_norm.rs. A workgroup sums the squares of a piece: each
// invocation every 256th element, then a tree; one workgroup adds the pieces.

struct PartsParams { len: u32, piece: u32, inv_scale: f32 }
struct FinishParams { parts: u32, max_norm: f32, inv_scale: f32 }

@group(0) @binding(0) var<uniform> p: PartsParams;
@group(0) @binding(0) var<uniform> f: FinishParams;
@group(0) @binding(1) var<storage, read> numbers: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;

const GROUP = 256u;

@compute @workgroup_size(256)
fn clip_grad_norm_parts_f32(@builtin(local_invocation_index) me: u32, @builtin(workgroup_id) group: vec3u) {
    let end = min((group.x + 1u) * p.piece, p.len);
    var sum = 0.0;
    for (var i = group.x * p.piece + me; i < end; i += GROUP) {
        let g = numbers[i] * p.inv_scale;
        sum += g * g;
    }
    let total = group_sum(me, sum);
    if me == 0u { out[group.x] = total; }
}

@compute @workgroup_size(256)
fn clip_grad_norm_finish_f32(@builtin(local_invocation_index) me: u32) {
    var sum = 0.0;
    for (var i = me; i < f.parts; i += GROUP) { sum += numbers[i]; }
    let total = group_sum(me, sum);
    if me != 0u { return; }
    let norm = sqrt(total);
    var clip = 1.0;
    if f.max_norm > 0.0 { clip = min(f.max_norm / (norm + 1e-6), 1.0); }
    out[0] = norm;
    // By its bits: compilers of shaders may take it that no number is infinite or NaN. The sum's, because a square root may lose them.
    out[1] = select(0.0, f.inv_scale * clip, (bitcast<u32>(total) & 0x7f800000u) != 0x7f800000u);
}
