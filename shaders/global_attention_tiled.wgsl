// Global attention on hardware, with tiles in workgroup memory. Put after global_attention.wgsl, which has the formula; the entries
// stand in global_attention_tiled_fwd.wgsl and global_attention_tiled_bwd.wgsl, each of which has a fetch().
//
// Who owns what. A workgroup of 8 x 8 invocations owns a tile of up to 32 tokens of a head and 64 channels of their output (wider heads
// take several, each of which makes the scores again), and walks over all tiles of the head: forward and dq own queries and walk over
// keys, dk and dv the other way round. Invocation (tx, ty) holds 4 x 4 scores in registers, rows 4 ty + i and columns tx + 8 j of the
// pair of tiles, and of rows 4 ty + i of the output the channels 4 tx .. 4 tx + 3 and those 32 further. Nothing is added by two
// invocations or workgroups, and every sum runs in a fixed order. src/ops/global_attention/tiles.rs cuts the map into tiles.
//
// A step: rows of both tiles come to workgroup memory 32 channels at a time, their products to registers; then the scores go to
// workgroup memory, by columns, where the left slot was, and the rows that they multiply to the right slot, 32 channels at a time. The
// forward's row maxima go through workgroup memory; sums stay with their invocations until the end.
//
// Position terms. With tables a tile is a rectangle of the map, up to 4 places along its short axis and up to 16 along the long one, so
// that all pairs of two tiles have at most 7 and 31 different offsets: `lines`. The terms are the products of the queries with the
// tables' rows at these lines, made as the scores are: the short axis' as eight more rows of the right slot in the product with the
// keys, the long axis' once for a strip of tiles (in dk and dv, whose queries change, for each tile). Where query and key of a pair lie
// in their tiles says which line it takes. dq goes back the same way: dS is summed by the key's place along each axis, shifted to
// lines, and multiplied with the tables' rows. Biases of a pair of tiles, at most 105, are copied.
//
// Workgroup memory: 16,292 bytes, of the 16,384 that every adapter has: slots 10,368, terms 5,504, biases 420.
//
// Banks (32 of 4 bytes; vec4s are read in turns of eight invocations). A slot's rows are 9 vec4s apart: eight invocations tx read eight rows in
// different banks, those of a ty the same row; scores and their rows are read side by side, and scores written 9 apart. Terms of a
// query are 43 numbers apart: in forward and dq neighbours along tx are one line and along ty four queries and four lines apart, which is
// 1 and 4 * 42 = 8 (mod 32) banks: none meet. In dk and dv two to four invocations meet in a bank, as they do when terms are written.
//
// Reads for each multiply-add, in numbers: from global memory 3/64 in the forward (96 d for 2048 d), 5/96 in dq, 3/64 in dk and dv; from
// workgroup memory 1/2 (8 vec4s for 64). The kernels of global_attention.wgsl read 17/16 from global memory, most of them at one
// address for all invocations at once. Multiply-adds with both tables, 14 x 14: a fifth more in forward and dq, a third more in dk and dv. Of
// d = 128, where scores are made twice: forward 1.5 times as many, dq 1.67, dk and dv 1.5. Barriers of a step, d up to 32: forward 6, dq 7, dk
// and dv 10; with tables 6, 11 and 12, and for each strip 2, 6 and none. Global memory beside inputs and outputs: as in global_attention.wgsl.
//
// Limits: d a multiple of 4; any map, any number of heads and images (they lie along the grid's z, and are walked over past its end). Maps
// of fewer than 32 places and rectangles that leave a rest waste invocations: 14 x 14 with tables is 7 tiles of 28, 7 x 7 two of 28 and 21; a map
// of one row or column with tables has tiles of 16. A multiprocessor with 100 KB of workgroup memory holds six workgroups, 12 warps.
//
// No hardware has timed it yet. On llvmpipe (Mesa 22.3, two cores, busy with other work too), which gains nothing by sharing, it is for
// correctness alone; ms forward / forward and backward for 8 images, 8 heads, 14 x 14, no tables: d = 32: 775 / 3,048 (base 698 / 2,989,
// wide 49 / 387), d = 64: 1,292 / 5,592 (wide 221 / 1,273). The op's 28 cases take 14 s there, compilation of all entries included, as they
// do with the base. Tried before: dS summed by lines at once, for each query other keys, number by number: five times as many reads.
// Weighed and left: tiles of 32 tokens in a row, where the terms of 14 columns have as many lines for two or three rows as for one; slots of
// 16 channels, which save a sixth of the memory for twice the barriers; 64 x 32 tokens, whose terms and scores do not fit; terms of the
// whole map at once, which fit small maps alone.

// ------------------------------------------------------------------------------------------------ workgroup memory

// Tokens of a tile.
const TOKENS = 32u;
// vec4s from one row of a slot to the next: 32 channels, and one so that neighbours lie in different banks.
const LINE = 9u;
// Slots of 32 rows, the right with eight more; scores (by columns) lie where the left one was.
const LEFT = 0u;
const SCORES = 0u;
const RIGHT = 288u;
const EXTRA = 576u;
// Numbers from one query's terms to the next's: 32 along the long axis, then 8 along the short one, and three for the banks.
const SPAN = 43u;

var<workgroup> tile: array<vec4f, 648>;
var<workgroup> terms: array<f32, 1376>;
// Of the offsets between a tile of queries and one of keys: at most (2 * 4 - 1) * (2 * 8 - 1).
var<workgroup> biases: array<f32, 105>;

// ------------------------------------------------------------------------------------------------ places

// What a row is read from.
const OF_Q = 0u;
const OF_K = 1u;
const OF_V = 2u;
const OF_TABLES = 3u;
const OF_DY = 4u;
// The start of a row of zeros.
const NONE = 0xffffffffu;

struct Lane { tx: u32, ty: u32 }

// The map as it is cut into tiles. `.x` is along the short axis, `.y` along the long one: places, tokens from one place to the next,
// places of a tile. `inverse` divides by side.y.
struct Map { size: vec2u, step: vec2u, side: vec2u, inverse: u32 }

// Whether the short axis is that of the columns.
fn swapped() -> bool {
    return any_table() && p.h > p.w;
}

fn any_rel() -> bool {
    return p.has_rel_h + p.has_rel_w > 0u;
}

// The plan chooses how many tiles there are along each axis: see src/ops/global_attention/tiles.rs.
fn map_of(groups: vec3u) -> Map {
    let size = walk();
    let step = vec2u(size.y, 1u);
    let turned = select(size, size.yx, swapped());
    let side = (turned + groups.yx - 1u) / groups.yx;
    return Map(turned, select(step, step.yx, swapped()), side, (1023u + side.y) / side.y);
}

// Where token r of a tile (r up to 31) lies in it; past the last token outside of it.
fn cell(map: Map, r: u32) -> vec2u {
    let x = (r * map.inverse) >> 10u;
    return vec2u(x, r - x * map.side.y);
}

// Whether the tile at `at` has a token r.
fn inside(map: Map, at: vec2u, r: u32) -> bool {
    let c = cell(map, r);
    return c.x < map.side.x && all(at + c < map.size);
}

// Token r of the tile at `at`, or the head's first where there is none.
fn token(map: Map, at: vec2u, r: u32) -> u32 {
    let to = (at + cell(map, r)) * map.step;
    return select(0u, to.x + to.y, inside(map, at, r));
}

// Where that token's row starts.
fn start_of(map: Map, head: Place, at: vec2u, r: u32) -> u32 {
    return select(NONE, head.base + token(map, at, r) * head.stride, inside(map, at, r));
}

// Where the rows start that this invocation reads into a slot.
fn starts_of(map: Map, me: Lane, head: Place, at: vec2u) -> vec4u {
    return vec4u(start_of(map, head, at, me.ty), start_of(map, head, at, me.ty + 8u),
        start_of(map, head, at, me.ty + 16u), start_of(map, head, at, me.ty + 24u));
}

// The smallest offsets between a tile of queries and one of keys, as rows of the tables: lines l of terms, l = key - query + side - 1,
// belong to first + l.
fn first_offset(map: Map, queries: vec2u, keys: vec2u) -> vec2u {
    return keys - queries + map.size - map.side;
}

// Where the table's row of line l along an axis (0: the short one) starts.
fn table_start(map: Map, axis: u32, g: u32, first: vec2u, l: u32) -> u32 {
    let offset = first[axis] + l;
    let of_rows = (axis == 0u) != swapped();
    let has = select(p.has_rel_w, p.has_rel_h, of_rows);
    if has == 0u || l > 2u * map.side[axis] - 2u || offset > 2u * map.size[axis] - 2u {
        return NONE;
    }
    return select(rel_w_row(g, offset), rel_h_row(g, offset), of_rows);
}

// The same for the lines that this invocation reads.
fn table_starts(map: Map, me: Lane, axis: u32, g: u32, first: vec2u) -> vec4u {
    return vec4u(table_start(map, axis, g, first, me.ty), table_start(map, axis, g, first, me.ty + 8u),
        table_start(map, axis, g, first, me.ty + 16u), table_start(map, axis, g, first, me.ty + 24u));
}

// ------------------------------------------------------------------------------------------------ products

fn row_of(x: u32, start: u32, c: u32) -> vec4f {
    if start == NONE || c >= p.d / 4u {
        return vec4f();
    }
    return fetch(x, start + c);
}

// Puts 32 channels, from vec4 c on, of 32 rows of x into a slot.
fn fill(me: Lane, slot: u32, x: u32, starts: vec4u, c: u32, factor: f32) {
    let to = slot + me.ty * LINE + me.tx;
    tile[to] = factor * row_of(x, starts.x, c + me.tx);
    tile[to + 8u * LINE] = factor * row_of(x, starts.y, c + me.tx);
    tile[to + 16u * LINE] = factor * row_of(x, starts.z, c + me.tx);
    tile[to + 24u * LINE] = factor * row_of(x, starts.w, c + me.tx);
}

// Products of left rows 4 ty + i with right rows tx + 8 j (column j of `s`), and with right row 32 + tx.
struct Products { s: mat4x4f, extra: vec4f }

// `sum` with the products of four rows (by columns) and one.
fn add_dots(sum: vec4f, left: mat4x4f, right: vec4f) -> vec4f {
    return sum + left[0] * right.x + left[1] * right.y + left[2] * right.z + left[3] * right.w;
}

// The products over `width` vec4s of both slots.
fn add_slots(me: Lane, before: Products, width: u32, with_extra: bool) -> Products {
    var out = before;
    for (var c = 0u; c < width; c++) {
        let row = LEFT + 4u * LINE * me.ty + c;
        let left = transpose(mat4x4f(tile[row], tile[row + LINE], tile[row + 2u * LINE], tile[row + 3u * LINE]));
        let to = RIGHT + LINE * me.tx + c;
        out.s[0] = add_dots(out.s[0], left, tile[to]);
        out.s[1] = add_dots(out.s[1], left, tile[to + 8u * LINE]);
        out.s[2] = add_dots(out.s[2], left, tile[to + 16u * LINE]);
        out.s[3] = add_dots(out.s[3], left, tile[to + 24u * LINE]);
        if with_extra {
            out.extra = add_dots(out.extra, left, tile[to + 32u * LINE]);
        }
    }
    return out;
}

// Products of rows of x and rows of y, and, where there is one, of a table (this invocation reads the row at `extra`). Invocations
// meet inside, the first time before workgroup memory is touched.
fn multiply(me: Lane, x: u32, left: vec4u, y: u32, right: vec4u, extra: u32, with_extra: bool) -> Products {
    var out = Products();
    for (var c = 0u; c < p.d / 4u; c += 8u) {
        workgroupBarrier();
        fill(me, LEFT, x, left, c, 1.0);
        fill(me, RIGHT, y, right, c, 1.0);
        if with_extra {
            tile[EXTRA + LINE * me.ty + me.tx] = row_of(OF_TABLES, extra, c + me.tx);
        }
        workgroupBarrier();
        out = add_slots(me, out, min(8u, p.d / 4u - c), with_extra);
    }
    return out;
}

// Puts scores where `apply` reads them: column r is row r of the slot.
fn put_scores(me: Lane, s: mat4x4f) {
    let to = SCORES + LINE * me.tx + me.ty;
    tile[to] = s[0];
    tile[to + 8u * LINE] = s[1];
    tile[to + 16u * LINE] = s[2];
    tile[to + 24u * LINE] = s[3];
}

// Of rows 4 ty + i of an output the channels 4 tx .. 4 tx + 3 of a piece of 64, and those 32 further.
struct Rows { near: mat4x4f, far: mat4x4f }

// `rows` with a row of x under the weights of row r of the scores.
fn add_row(me: Lane, rows: mat4x4f, r: u32) -> mat4x4f {
    let s = tile[SCORES + LINE * r + me.ty];
    let x = tile[RIGHT + LINE * r + me.tx];
    return mat4x4f(rows[0] + s.x * x, rows[1] + s.y * x, rows[2] + s.z * x, rows[3] + s.w * x);
}

// Sums over `count` columns of the scores, and those that make it a multiple of 4, times rows of the right slot.
fn add_rows(me: Lane, before: mat4x4f, count: u32) -> mat4x4f {
    var out = before;
    for (var r = 0u; r < count; r += 4u) {
        out = add_row(me, out, r);
        out = add_row(me, out, r + 1u);
        out = add_row(me, out, r + 2u);
        out = add_row(me, out, r + 3u);
    }
    return out;
}

// Sums of scores times rows of x (times the factor), from vec4 c on. Invocations meet inside, the first time before anything is read.
fn apply(me: Lane, before: Rows, x: u32, starts: vec4u, c: u32, factor: f32, count: u32) -> Rows {
    var out = before;
    workgroupBarrier();
    fill(me, RIGHT, x, starts, c, factor);
    workgroupBarrier();
    out.near = add_rows(me, out.near, count);
    if p.d > 32u {
        workgroupBarrier();
        fill(me, RIGHT, x, starts, c + 8u, factor);
        workgroupBarrier();
        out.far = add_rows(me, out.far, count);
    }
    return out;
}

// ------------------------------------------------------------------------------------------------ position terms

fn put_terms(me: Lane, line: u32, t: vec4f) {
    let to = 4u * SPAN * me.ty + line + me.tx;
    terms[to] = t.x;
    terms[to + SPAN] = t.y;
    terms[to + 2u * SPAN] = t.z;
    terms[to + 3u * SPAN] = t.w;
}

// The terms of 32 queries along the long axis, and along the short one where asked for. Readers meet before; see `multiply`.
fn fill_terms(map: Map, me: Lane, g: u32, queries: vec4u, first: vec2u, both: bool) {
    let product =
        multiply(me, OF_Q, queries, OF_TABLES, table_starts(map, me, 1u, g, first), table_start(map, 0u, g, first, me.ty), both);
    put_terms(me, 0u, product.s[0]);
    put_terms(me, 8u, product.s[1]);
    put_terms(me, 16u, product.s[2]);
    put_terms(me, 24u, product.s[3]);
    if both {
        put_terms(me, 32u, product.extra);
    }
}

// The biases between two tiles. Readers meet before.
fn fill_biases(map: Map, me: Lane, g: u32, first: vec2u) {
    if p.has_bias == 0u {
        return;
    }
    let lines = 2u * map.side - 1u;
    for (var i = 8u * me.ty + me.tx; i < lines.x * lines.y; i += 64u) {
        let offset = first + vec2u(i / lines.y, i % lines.y);
        if all(offset < 2u * map.size - 1u) {
            let at = select(offset, offset.yx, swapped());
            biases[i] = bias_of(g, at.x, at.y);
        }
    }
}

// What a pair's logit has beside the product: query r of its tile lies at `query` in it, the key at `key`. Past the last token it means
// nothing.
fn term(map: Map, r: u32, query: vec2u, key: vec2u) -> f32 {
    let line = min(key, map.side - 1u) - min(query, map.side - 1u) + map.side - 1u;
    var sum = 0.0;
    if any_rel() {
        sum = terms[SPAN * r + line.y] + terms[SPAN * r + 32u + line.x];
    }
    if p.has_bias != 0u {
        sum += biases[line.x * (2u * map.side.y - 1u) + line.y];
    }
    return sum;
}

// Logits of queries 4 ty + i and a key, and of keys 4 ty + i and a query, from their products.
fn logits_of_key(map: Map, me: Lane, key: u32, product: vec4f) -> vec4f {
    let s = p.scale * product;
    if !any_table() {
        return s;
    }
    let r = 4u * me.ty;
    let to = cell(map, key);
    return s + vec4f(term(map, r, cell(map, r), to), term(map, r + 1u, cell(map, r + 1u), to),
        term(map, r + 2u, cell(map, r + 2u), to), term(map, r + 3u, cell(map, r + 3u), to));
}

fn logits_of_query(map: Map, me: Lane, query: u32, product: vec4f) -> vec4f {
    let s = p.scale * product;
    if !any_table() {
        return s;
    }
    let r = 4u * me.ty;
    let at = cell(map, query);
    return s + vec4f(term(map, query, at, cell(map, r)), term(map, query, at, cell(map, r + 1u)),
        term(map, query, at, cell(map, r + 2u)), term(map, query, at, cell(map, r + 3u)));
}

// ------------------------------------------------------------------------------------------------ launches

// The head of a workgroup, and the first vec4 of its piece of the output: heads and pieces of 64 channels lie along z.
fn pieces_of_head() -> u32 {
    return (p.d + 63u) / 64u;
}

fn head_of(z: u32) -> Place {
    let head = z / pieces_of_head();
    return place(head / p.g, head % p.g, 0u);
}

fn piece_of(z: u32) -> u32 {
    return z % pieces_of_head() * 16u;
}
