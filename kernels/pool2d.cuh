// Windows along one axis, for pooling; common.cuh comes before this. A range is its first number and one past its last.

struct Range { u32 first, end; };

// The places of the window at `start - pad` that lie inside an axis of `size`.
DEVICE Range inside(u32 start, u32 pad, u32 kernel, u32 size) { return {pad - least(start, pad), least(kernel, size + pad - start)}; }

// The windows, of `count`, that cover place `at`, counted from the border's beginning.
DEVICE Range covering(u32 at, u32 stride, u32 kernel, u32 count) {
    return {(at + 1 - least(at + 1, kernel) + stride - 1) / stride, least(at / stride + 1, count)};
}
