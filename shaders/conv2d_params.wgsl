// Put before the texts of convolutions: `Conv2dParams` of src/ops/conv2d.rs.
struct Conv2dParams {
    n: u32, h: u32, w: u32, c: u32,
    o: u32, kh: u32, kw: u32, p: u32, q: u32,
    stride_h: u32, stride_w: u32, pad_h: u32, pad_w: u32,
    bias: u32, parts: u32, groups: u32,
    act: u32, residual: u32,
}

@group(0) @binding(0) var<uniform> p: Conv2dParams;
