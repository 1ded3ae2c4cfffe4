// Put before the texts of pooling: windows along one axis. A range is its first number and one past its last.

// The places of the window at `start - pad` that lie inside an axis of `size`.
fn inside(start: u32, pad: u32, kernel: u32, size: u32) -> vec2u {
    return vec2u(pad - min(start, pad), min(kernel, size + pad - start));
}

// The windows, of `count`, that cover place `at`, counted from the border's beginning.
fn covering(at: u32, stride: u32, kernel: u32, count: u32) -> vec2u {
    return vec2u((at + 1u - min(at + 1u, kernel) + stride - 1u) / stride, min(at / stride + 1u, count));
}

