// The class token and positions of a vision transformer; formulas in src/ops/tokens.rs. A thread owns neighbouring elements of the
// output, 16 bytes. p.tokens counts the class token; cls and pos are f32 however the tokens are stored. Bytes: each tensor once.
// Memory-bound.

#include "common.cuh"

struct TokenParams { u32 images, tokens, channels; };

template <int N> DEVICE void embed(TokenParams p, u32 i, const Real *patches, const float *cls, const float *pos, Real *y) {
    u32 image = p.tokens * p.channels, at = i % image;
    Pack<N> v = at < p.channels ? load<N>(cls + at) : load<N>(patches + i - (i / image + 1) * p.channels), w = load<N>(pos + at);
    UNROLL for (int k = 0; k < N; k++) v.v[k] += w.v[k];
    store(y + i, v);
}

KERNEL(256) OF(embed_tokens_fwd)(TokenParams p, const Real *patches, const float *cls, const float *pos, Real *y) {
    for_own(p.images * p.tokens * p.channels, p.channels,
            [=](auto width, u32 i) { embed<width.n>(p, i, patches, cls, pos, y); });
}

template <int N> DEVICE void embed_bwd(TokenParams p, u32 i, const Real *dy, Real *dpatches) {
    u32 image = (p.tokens - 1) * p.channels;
    store(dpatches + i, load<N>(dy + i + (i / image + 1) * p.channels));
}

KERNEL(256) OF(embed_tokens_bwd)(TokenParams p, const Real *dy, Real *dpatches) {
    for_own(p.images * (p.tokens - 1) * p.channels, p.channels,
            [=](auto width, u32 i) { embed_bwd<width.n>(p, i, dy, dpatches); });
}

template <int N> DEVICE void first(TokenParams p, u32 i, const Real *x, Real *y) {
    store(y + i, load<N>(x + i / p.channels * p.tokens * p.channels + i % p.channels));
}

KERNEL(256) OF(first_token_fwd)(TokenParams p, const Real *x, Real *y) {
    for_own(p.images * p.channels, p.channels, [=](auto width, u32 i) { first<width.n>(p, i, x, y); });
}

template <int N> DEVICE void first_bwd(TokenParams p, u32 i, const Real *dy, Real *dx) {
    u32 image = p.tokens * p.channels, at = i % image;
    Pack<N> v = {};
    if (at < p.channels) v = load<N>(dy + i / image * p.channels + at);
    store(dx + i, v);
}

KERNEL(256) OF(first_token_bwd)(TokenParams p, const Real *dy, Real *dx) {
    for_own(p.images * p.tokens * p.channels, p.channels, [=](auto width, u32 i) { first_bwd<width.n>(p, i, dy, dx); });
}
