// The halves of LESA; formulas and layouts in src/ops/lesa.rs. e = p.size numbers of a query or key, 2 e of a value; row i + L - 1 - j of
// the table belongs to the offset i - j. All f32.
//
// Logits: a thread owns a pair of pixels and a head, 16 bytes of q and k at a time where 4 divides e. Context: a warp owns a query of
// a head and holds a number for each key in shared memory. Gradients of qkv and of the tables, one for each image: a thread owns an
// element and asks every pair that it has a share in, in order: no atomics. The products run on plain units with operands out of the
// caches: maps are small (L <= 1024). Bytes: logits 3 L^2 a head, written by the forward and read once or twice by each pass.

#include "common.cuh"

struct LesaParams { u32 images, pixels, heads, size; };

// Where things of this launch lie.
struct Lesa {
    u32 l, g, e;
    DEVICE Lesa(LesaParams p) : l(p.pixels), g(p.heads), e(p.size) {}
    // Of qkv: pixel i of an image, its head and a number of it.
    DEVICE u32 at(u32 image, u32 i, u32 head, u32 c) const { return ((image * l + i) * g + head) * 4 * e + c; }
    // Of the table: the offset i - j.
    DEVICE u32 row(u32 i, u32 j, u32 c) const { return (i + l - 1 - j) * 4 * e + c; }
    // Of the logits, first kind; the next ones are g further.
    DEVICE u32 logit(u32 image, u32 i, u32 j, u32 head) const { return ((image * l + i) * l + j) * 3 * g + head; }
    // Of the weights.
    DEVICE u32 weight(u32 image, u32 head, u32 i, u32 j) const { return ((image * g + head) * l + i) * l + j; }
    // Of the context: of values (0) or places (1).
    DEVICE u32 context(u32 image, u32 i, u32 kind, u32 head, u32 c) const { return (((image * l + i) * 2 + kind) * g + head) * 2 * e + c; }
};

template <int N> DEVICE float dot(u32 len, const float *x, const float *y) {
    float sum = 0.0f;
    for (u32 c = 0; c < len; c += N) {
        Pack<N> a = load<N>(x + c), b = load<N>(y + c);
        UNROLL for (int k = 0; k < N; k++) sum += a.v[k] * b.v[k];
    }
    return sum;
}

KERNEL(256) lesa_logits_fwd_f32(LesaParams p, const float *qkv, const float *table, float *logits) {
    Lesa s(p);
    u32 id = flat_id();
    if (id >= p.images * s.l * s.l * s.g) return;
    u32 head = id % s.g, j = id / s.g % s.l, i = id / (s.g * s.l) % s.l, image = id / (s.g * s.l * s.l);
    const float *q = qkv + s.at(image, i, head, 0), *k = qkv + s.at(image, j, head, s.e);
    const float *place_q = table + s.row(i, j, 0), *place_k = table + s.row(j, i, s.e);
    float *out = logits + s.logit(image, i, j, head);
    with_width(s.e, [=](auto width) {
        constexpr int N = decltype(width)::n;
        out[0] = dot<N>(s.e, q, k);
        out[s.g] = dot<N>(s.e, q, place_q);
        out[2 * s.g] = dot<N>(s.e, k, place_k);
    });
}

// The gradient of number c of q (c < e) or k (c - e) of pixel i.
DEVICE float of_pixel(Lesa s, u32 image, u32 i, u32 head, u32 c, const float *qkv, const float *table, const float *dlogits) {
    bool is_q = c < s.e;
    float sum = 0.0f;
    for (u32 j = 0; j < s.l; j++) {
        // The pair of this pixel with the j-th.
        u32 at = is_q ? s.logit(image, i, j, head) : s.logit(image, j, i, head);
        sum += dlogits[at] * qkv[s.at(image, j, head, is_q ? c + s.e : c - s.e)];
        sum += dlogits[at + (is_q ? s.g : 2 * s.g)] * table[s.row(i, j, c)];
    }
    return sum;
}

// One image's gradient of number c of the table's row: the pairs with this offset, of all heads.
DEVICE float of_row(Lesa s, u32 image, u32 row, u32 c, const float *qkv, const float *dlogits) {
    bool is_q = c < s.e;
    float sum = 0.0f;
    u32 first = row - least(row, s.l - 1), end = least(row + 1, s.l);
    for (u32 head = 0; head < s.g; head++) {
        for (u32 i = first; i < end; i++) {
            u32 j = i + s.l - 1 - row;
            u32 at = is_q ? s.logit(image, i, j, head) + s.g : s.logit(image, j, i, head) + 2 * s.g;
            sum += dlogits[at] * qkv[s.at(image, i, head, c)];
        }
    }
    return sum;
}

KERNEL(256) lesa_logits_bwd_f32(
    LesaParams p, const float *qkv, const float *table, const float *dlogits, float *dqkv, float *dtables) {
    Lesa s(p);
    u32 id = flat_id(), width = 4 * s.e, len = p.images * s.l * s.g * width, rows = 2 * s.l - 1;
    u32 c = id % width;
    if (id < len) {
        u32 head = id / width % s.g, i = id / (width * s.g) % s.l, image = id / (width * s.g * s.l);
        dqkv[id] = c < 2 * s.e ? of_pixel(s, image, i, head, c, qkv, table, dlogits) : 0.0f;
    } else if (id - len < p.images * rows * width) {
        u32 row = (id - len) / width % rows, image = (id - len) / (width * rows);
        dtables[id - len] = c < 2 * s.e ? of_row(s, image, row, c, qkv, dlogits) : 0.0f;
    }
}

KERNEL(32) lesa_context_fwd_f32(
    LesaParams p, const float *qkv, const float *table, const float *logits, float *weights, float *y) {
    DYN_SMEM(float, power);
    Lesa s(p);
    u32 lane = threadIdx.x, head = blockIdx.x % s.g, i = blockIdx.x / s.g % s.l, image = blockIdx.x / (s.g * s.l);
    float top = -INFINITY;
    for (u32 j = lane; j < s.l; j += 32) {
        const float *at = logits + s.logit(image, i, j, head);
        power[j] = at[0] + at[s.g] + at[2 * s.g];
        top = fmaxf(top, power[j]);
    }
    top = warp_max(top);
    float sum = 0.0f;
    for (u32 j = lane; j < s.l; j += 32) {
        power[j] = expf(power[j] - top);
        sum += power[j];
    }
    float scale = 1.0f / warp_sum(sum);
    for (u32 j = lane; j < s.l; j += 32) {
        power[j] *= scale;
        weights[s.weight(image, head, i, j)] = power[j];
    }
    __syncthreads();
    for (u32 c = lane; c < 2 * s.e; c += 32) {
        float of_values = 0.0f, of_places = 0.0f;
        for (u32 j = 0; j < s.l; j++) {
            of_values += power[j] * qkv[s.at(image, j, head, 2 * s.e + c)];
            of_places += power[j] * table[s.row(i, j, 2 * s.e + c)];
        }
        y[s.context(image, i, 0, head, c)] = of_values;
        y[s.context(image, i, 1, head, c)] = of_places;
    }
}

KERNEL(32) lesa_context_bwd_f32(
    LesaParams p, const float *qkv, const float *table, const float *weights, const float *dy, float *dlogits) {
    DYN_SMEM(float, dweight);
    Lesa s(p);
    u32 lane = threadIdx.x, head = blockIdx.x % s.g, i = blockIdx.x / s.g % s.l, image = blockIdx.x / (s.g * s.l);
    const float *of_values = dy + s.context(image, i, 0, head, 0), *of_places = dy + s.context(image, i, 1, head, 0);
    float sum = 0.0f;
    for (u32 j = lane; j < s.l; j += 32) {
        const float *v = qkv + s.at(image, j, head, 2 * s.e), *place = table + s.row(i, j, 2 * s.e);
        float d = 0.0f;
        with_width(2 * s.e, [&](auto width) {
            constexpr int N = decltype(width)::n;
            d = dot<N>(2 * s.e, of_values, v) + dot<N>(2 * s.e, of_places, place);
        });
        dweight[j] = d;
        sum += weights[s.weight(image, head, i, j)] * d;
    }
    sum = warp_sum(sum);
    // A lane reads what it wrote itself.
    for (u32 j = lane; j < s.l; j += 32) {
        float d = weights[s.weight(image, head, i, j)] * (dweight[j] - sum);
        float *out = dlogits + s.logit(image, i, j, head);
        out[0] = d;
        out[s.g] = d;
        out[2 * s.g] = d;
    }
}

KERNEL(256) lesa_context_bwd_values_f32(LesaParams p, const float *weights, const float *dy, float *dqkv, float *dtables) {
    Lesa s(p);
    u32 id = flat_id(), width = 4 * s.e, len = p.images * s.l * s.g * width, rows = 2 * s.l - 1;
    u32 c = id % width;
    float sum = 0.0f;
    if (id < len) {
        u32 head = id / width % s.g, j = id / (width * s.g) % s.l, image = id / (width * s.g * s.l);
        for (u32 i = 0; c >= 2 * s.e && i < s.l; i++) {
            sum += weights[s.weight(image, head, i, j)] * dy[s.context(image, i, 0, head, c - 2 * s.e)];
        }
        dqkv[id] = sum;
    } else if (id - len < p.images * rows * width) {
        u32 row = (id - len) / width % rows, image = (id - len) / (width * rows);
        u32 first = row - least(row, s.l - 1), end = least(row + 1, s.l);
        for (u32 head = 0; c >= 2 * s.e && head < s.g; head++) {
            for (u32 i = first; i < end; i++) {
                sum += weights[s.weight(image, head, i, i + s.l - 1 - row)] * dy[s.context(image, i, 1, head, c - 2 * s.e)];
            }
        }
        dtables[id - len] = sum;
    }
}
