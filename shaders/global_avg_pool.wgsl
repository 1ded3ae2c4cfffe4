// The mean over an image's pixels: x [images, pixels, channels] -> y [images, channels].

struct GlobalAvgPoolParams { images: u32, pixels: u32, channels: u32 }

@group(0) @binding(0) var<uniform> p: GlobalAvgPoolParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

// Pixels summed by themselves before they join the total: keeps long sums accurate.
const BLOCK = 256u;

// One invocation a channel of an image.
@compute @workgroup_size(64)
fn global_avg_pool_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 64u);
    if i >= p.images * p.channels { return; }
    let first = (i / p.channels) * p.pixels * p.channels + i % p.channels;
    var total = 0.0;
    for (var start = 0u; start < p.pixels; start += BLOCK) {
        var sum = 0.0;
        for (var k = start; k < min(start + BLOCK, p.pixels); k++) {
            sum += x[first + k * p.channels];
        }
        total += sum;
    }
    y[i] = total / f32(p.pixels);
}

@group(0) @binding(1) var<storage, read> dy: array<f32>;
@group(0) @binding(2) var<storage, read_write> dx: array<f32>;

// One invocation an input element.
@compute @workgroup_size(256)
fn global_avg_pool_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.images * p.pixels * p.channels { return; }
    let n = i / (p.pixels * p.channels);
    dx[i] = dy[n * p.channels + i % p.channels] / f32(p.pixels);
}
