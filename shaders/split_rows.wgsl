// Blocks of rows of one tensor, see src/ops/split_rows.rs. One invocation an element of the output. Memory-bound: each tensor once.

struct SplitRowsParams { block: u32, number: u32, given: u32 }

@group(0) @binding(0) var<uniform> p: SplitRowsParams;
@group(0) @binding(1) var<storage, read> d0: array<f32>;
@group(0) @binding(2) var<storage, read> d1: array<f32>;
@group(0) @binding(3) var<storage, read> d2: array<f32>;
@group(0) @binding(4) var<storage, read> d3: array<f32>;
@group(0) @binding(5) var<storage, read> d4: array<f32>;
@group(0) @binding(6) var<storage, read> d5: array<f32>;
@group(0) @binding(7) var<storage, read> d6: array<f32>;
@group(0) @binding(8) var<storage, read_write> dw: array<f32>;
@group(0) @binding(2) var<storage, read_write> block: array<f32>;

@compute @workgroup_size(256)
fn split_rows_fwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i < p.block { block[i] = d0[p.number * p.block + i]; }
}

@compute @workgroup_size(256)
fn split_rows_bwd_f32(@builtin(global_invocation_id) gid: vec3u, @builtin(num_workgroups) groups: vec3u) {
    let i = flat_id(gid, groups, 256u);
    if i >= p.number * p.block { return; }
    let part = i / p.block;
    let at = i % p.block;
    var v = 0.0;
    if ((p.given >> part) & 1u) != 0u {
        switch part {
            case 0u: { v = d0[at]; }
            case 1u: { v = d1[at]; }
            case 2u: { v = d2[at]; }
            case 3u: { v = d3[at]; }
            case 4u: { v = d4[at]; }
            case 5u: { v = d5[at]; }
            default: { v = d6[at]; }
        }
    }
    dw[i] = v;
}
