// Put before global_attention.wgsl and local_attention.wgsl: bindings, places, and the packed position tables. The op's own text
// has the parameter block `p` (with n, h, w, g, d, has_rel_h, has_rel_w, has_bias, scale, pieces and part) and the functions
// table_rows() and table_columns(), the number of row and column offsets.

// Forward and every backward pass.
@group(0) @binding(1) var<storage, read> q: array<vec4f>;
@group(0) @binding(2) var<storage, read> k: array<vec4f>;
@group(0) @binding(3) var<storage, read> v: array<vec4f>;
@group(0) @binding(4) var<storage, read> tables: array<vec4f>;
// Forward.
@group(0) @binding(5) var<storage, read_write> y: array<vec4f>;
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;
// Backward: (log-sum-exp, rowsum(dy * y)) of each query, then gradients.
@group(0) @binding(5) var<storage, read> dy: array<vec4f>;
@group(0) @binding(6) var<storage, read> stats: array<vec2f>;
@group(0) @binding(7) var<storage, read_write> grad: array<vec4f>;
@group(0) @binding(8) var<storage, read_write> grad_v: array<vec4f>;
// tables_sum.
@group(0) @binding(1) var<storage, read> numbers: array<f32>;
@group(0) @binding(2) var<storage, read_write> result: array<f32>;

// vec4s of output that an invocation holds.
const CHUNK = 8u;
// Keys (or queries) that it takes at a time.
const BLOCK = 8u;

alias Chunk = array<vec4f, CHUNK>;
alias Block = array<f32, BLOCK>;

// A token of a head: token t of the head starts at vec4 `base + t * stride`, its statistics lie at `stat + t * p.g`.
struct Place {
    t: u32,
    y: u32,
    x: u32,
    g: u32,
    base: u32,
    stride: u32,
    stat: u32,
}

fn place(n: u32, g: u32, t: u32) -> Place {
    let tokens = p.h * p.w;
    let first = n * tokens * p.g + g;
    return Place(t, t / p.w, t % p.w, g, first * (p.d / 4u), p.g * (p.d / 4u), first);
}

// Invocation i's token: the tokens of a head stand side by side.
fn place_of(i: u32) -> Place {
    let tokens = p.h * p.w;
    return place(i / tokens / p.g, i / tokens % p.g, i % tokens);
}

// Parts of the packed tables start at multiples of 128 numbers (`ALIGN`).
fn aligned(n: u32) -> u32 {
    return (n + 127u) / 128u * 128u;
}

fn rel_w_start() -> u32 {
    return aligned(p.has_rel_h * table_rows() * p.g * p.d);
}

fn bias_start() -> u32 {
    return rel_w_start() + aligned(p.has_rel_w * table_columns() * p.g * p.d);
}

// First vec4 of head g's part of a row of rel_h, of rel_w.
fn rel_h_row(g: u32, a: u32) -> u32 {
    return (a * p.g + g) * (p.d / 4u);
}

fn rel_w_row(g: u32, b: u32) -> u32 {
    return rel_w_start() / 4u + (b * p.g + g) * (p.d / 4u);
}

// A bias, or 0 where there is none.
fn bias_of(g: u32, a: u32, b: u32) -> f32 {
    if p.has_bias == 0u {
        return 0.0;
    }
    let i = bias_start() + (g * table_rows() + a) * table_columns() + b;
    return tables[i / 4u][i % 4u];
}

// vec4s that the table pass writes for each offset: dS * q where there are rel tables, then dS for the bias.
fn partial_width() -> u32 {
    return select(0u, p.d / 4u, p.has_rel_h + p.has_rel_w > 0u) + p.has_bias;
}

// q . rel_h[a], or 0 where there is no such table.
fn row_term(at: Place, a: u32) -> f32 {
    var sum = 0.0;
    if p.has_rel_h != 0u {
        let row = rel_h_row(at.g, a);
        for (var c = 0u; c < p.d / 4u; c++) {
            sum += dot(q[at.base + at.t * at.stride + c], tables[row + c]);
        }
    }
    return sum;
}

// An offset of a head: dS and dS * q (CHUNK vec4s from `chunk` on) summed over the pairs of tokens at this offset.
struct OffsetSums {
    dsq: Chunk,
    ds: f32,
}

// Writes a row of partial [pieces, G, rows, columns, width].
fn store_sums(i: u32, chunk: u32, sums: OffsetSums) {
    let width = partial_width();
    let rel = width - p.has_bias;
    for (var c = 0u; c < CHUNK; c++) {
        if chunk + c < rel {
            grad[i * width + chunk + c] = sums.dsq[c];
        }
    }
    if p.has_bias != 0u {
        grad[i * width + rel] = vec4f(sums.ds, 0.0, 0.0, 0.0);
    }
}

// Element i of the packed tables' gradient: rel_h sums over pieces and column offsets, rel_w over pieces and row offsets, bias
// over pieces.
fn sum_tables(i: u32) {
    let sizes = vec2u(table_rows(), table_columns());
    let row = p.g * p.d;
    let bias = bias_start();
    if i >= bias + aligned(p.has_bias * p.g * sizes.x * sizes.y) {
        return;
    }
    let width = 4u * partial_width();
    // The first sum, how many follow in a piece and how far apart; none for the gaps between the tables.
    var first = 0u;
    var step = width;
    var count = 0u;
    if i < rel_w_start() {
        let c = i % row;
        first = ((c / p.d * sizes.x + i / row) * sizes.y) * width + c % p.d;
        count = select(0u, sizes.y, i / row < sizes.x);
    } else if i < bias {
        let c = (i - rel_w_start()) % row;
        let b = (i - rel_w_start()) / row;
        first = (c / p.d * sizes.x * sizes.y + b) * width + c % p.d;
        step = width * sizes.y;
        count = select(0u, sizes.x, b < sizes.y);
    } else {
        first = (i - bias) * width + width - 4u;
        count = select(0u, 1u, i - bias < p.g * sizes.x * sizes.y);
    }
    var sum = 0.0;
    for (var piece = 0u; piece < p.pieces; piece++) {
        let start = first + piece * p.g * sizes.x * sizes.y * width;
        for (var j = 0u; j < count; j++) {
            sum += numbers[start + j * step];
        }
    }
    result[i] = sum;
}
