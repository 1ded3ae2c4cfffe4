// Sums along the rows of [rows, channels]: what bias gradients and norms need. A block of 256 threads takes a block of rows and
// some neighbouring channels. Its threads stand in rows of `lanes`; a thread owns N channels (one access of 4 N bytes) and every
// step-th row from its own on. A fixed tree in shared memory adds the threads of a channel, so the order of additions never
// changes.

struct Columns {
    // Where the thread stands, threads in a row, rows of threads.
    u32 lane, row, lanes, step;
    // The first of the thread's channels, and whether there is one.
    u32 channel;
    bool inside;
};

// `chunk` counts blocks along the channels. As `column_plan` in src/ops/reduce.rs.
template <int N> DEVICE Columns columns(u32 channels, u32 chunk) {
    u32 packs = channels / N, lanes = 32;
    while (lanes / 2 >= packs && lanes > 1) lanes /= 2;
    Columns at;
    at.lanes = lanes;
    at.lane = threadIdx.x % lanes;
    at.row = threadIdx.x / lanes;
    at.step = 256 / lanes;
    at.channel = (chunk * lanes + at.lane) * N;
    at.inside = at.channel < channels;
    return at;
}

// Adds K numbers of each thread over the rows of threads; the sums are with row 0. `shares` has K * 256 floats.
template <int K> DEVICE void add_rows(float (&v)[K], float *shares, Columns at) {
    float *mine = shares + threadIdx.x;
    UNROLL for (int k = 0; k < K; k++) mine[k * 256] = v[k];
    for (u32 half = at.step / 2; half > 0; half /= 2) {
        __syncthreads();
        if (at.row < half) {
            UNROLL for (int k = 0; k < K; k++) mine[k * 256] += mine[k * 256 + half * at.lanes];
        }
    }
    UNROLL for (int k = 0; k < K; k++) v[k] = mine[k * 256];
}
