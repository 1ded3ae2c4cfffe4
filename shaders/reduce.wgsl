// Sums over blocks of rows: x [rows, channels] -> sum [blocks, channels]. One invocation a channel of a block:
// neighbours read neighbouring channels.

struct SumRowsParams { rows: u32, channels: u32, rows_per_block: u32, blocks: u32 }

@group(0) @binding(0) var<uniform> p: SumRowsParams;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> sum: array<f32>;

@compute @workgroup_size(64)
fn sum_rows_fwd_f32(@builtin(global_invocation_id) gid: vec3u) {
    let c = gid.x;
    if c >= p.channels { return; }
    let first = gid.y * p.rows_per_block;
    let end = min(first + p.rows_per_block, p.rows);
    var total = 0.0;
    for (var r = first; r < end; r++) {
        total += x[r * p.channels + c];
    }
    sum[gid.y * p.channels + c] = total;
}
