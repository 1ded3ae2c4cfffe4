// What the convolutions in f32 (conv2d.cu), on tensor cores (conv2d_mma.cu, conv2d_bwd_mma.cu) and by groups (depthwise.cu, grouped.cu) share; common.cuh comes before it.

struct Conv2dParams {
    // Images, input rows, columns and channels; output channels, kernel rows and columns, output rows and columns.
    u32 n, h, w, c, o, kh, kw, p, q;
    u32 stride_h, stride_w, pad_h, pad_w, bias, parts, groups;
};

// A place in a sum over kernel taps and channels, channels innermost: counted up, never divided out. Or a pixel: column, row, image.
struct Walk {
    u32 c = 0, s = 0, r = 0;
    DEVICE void to(u32 k, u32 channels, u32 columns) {
        c = k % channels;
        s = k / channels % columns;
        r = k / channels / columns;
    }
    DEVICE void on(u32 by, u32 channels, u32 columns) {
        c += by;
        while (c >= channels) {
            c -= channels;
            if (++s == columns) {
                s = 0;
                r++;
            }
        }
    }
    // The same by a walk of its own, so that no loop is needed.
    DEVICE void on(const Walk &by, u32 channels, u32 columns) {
        c += by.c;
        if (c >= channels) c -= channels, s++;
        s += by.s;
        if (s >= columns) s -= columns, r++;
        r += by.r;
    }
};

// Input gradient: dx[h, w, c] = sum over the taps with h = p * stride + r - pad (and so in width) and over o of dy[p, q, o] *
// w[o, r, s, c]. Pixels of dx with equal remainder modulo the stride (a phase) are hit by the same taps: a block takes pixels of one.
//
// Phase blockIdx.z: its remainders, its first tap and its extent in pixels and in taps.
struct Phase {
    u32 row, col, r, s, rows, cols, taps_r, taps_s;

    DEVICE Phase(const Conv2dParams &p) {
        row = blockIdx.z / p.stride_w;
        col = blockIdx.z % p.stride_w;
        r = (row + p.pad_h) % p.stride_h;
        s = (col + p.pad_w) % p.stride_w;
        // Rounded up; none where the image (or the kernel) is smaller than the stride.
        rows = (p.h + p.stride_h - 1 - row) / p.stride_h;
        cols = (p.w + p.stride_w - 1 - col) / p.stride_w;
        taps_r = (p.kh + p.stride_h - 1 - r) / p.stride_h;
        taps_s = (p.kw + p.stride_w - 1 - s) / p.stride_w;
    }
};
