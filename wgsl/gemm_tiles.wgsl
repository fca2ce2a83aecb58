// No kernel: how `gemm` moves blocks of x and w from global memory to its tiles in workgroup memory, and multiplies from there; appended to it.
//
// A block is 4 rows by 4 k: four cells of raw bits, which `x_values` and `weight_values` turn into floats. Everything is a vector of a fixed
// name in a structure that functions take and return: an array indexed by a loop would leave registers.
// Needs the params and constants of gemm.wgsl, `tile_x`, `tile_w`, and the loaders of x and of weights.

const X_BLOCKS = XQ * KQ; // at most 2 * LANES
const W_BLOCKS = WQ * KQ;

struct Block {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
}

/// First row and column of the workgroup's tile, and where its batch begins, in cells.
struct Place {
    row0: u32,
    col0: u32,
    x_at: u32,
    w_at: u32,
}

/// The lane's sums: rows of the first set in a, b, of the second in c, d and so on; columns of the first set in a, c, e, g,
/// of the second in b, d, f, h.
struct Sums {
    a: mat4x4<f32>,
    b: mat4x4<f32>,
    c: mat4x4<f32>,
    d: mat4x4<f32>,
    e: mat4x4<f32>,
    f: mat4x4<f32>,
    g: mat4x4<f32>,
    h: mat4x4<f32>,
}

/// By what the quads of four k are permuted: lanes that store together have 8 / KQ neighbouring quads of KQ different q.
fn swizzle(q: u32) -> u32 {
    return q * (8u / KQ);
}

/// Block i of the tile of x at k.
fn fetch_x(i: u32, p: Place, k: u32) -> Block {
    var found = Block();
    if (X_BLOCKS % LANES == 0u || i < X_BLOCKS) {
        let row = p.row0 + i / KQ * 4u;
        let quad = k / 4u + i % KQ;
        let last = params.m - 1u;
        found.a = x_cell(p.x_at, min(row, last), quad);
        found.b = x_cell(p.x_at, min(row + 1u, last), quad);
        found.c = x_cell(p.x_at, min(row + 2u, last), quad);
        found.d = x_cell(p.x_at, min(row + 3u, last), quad);
    }
    return found;
}

/// Block i of the tile of w at k.
fn fetch_w(i: u32, p: Place, k: u32) -> Block {
    var found = Block();
    if (W_BLOCKS % LANES == 0u || i < W_BLOCKS) {
        if (W_NK) {
            let first = i / KQ;
            let which = select(0u, first / GATE_QUADS, GATED);
            let row = p.col0 + 4u * (first - which * GATE_QUADS);
            let quad = k / 4u + i % KQ;
            let last = params.n - 1u;
            found.a = weight_cell(which, p.w_at, min(row, last), quad);
            found.b = weight_cell(which, p.w_at, min(row + 1u, last), quad);
            found.c = weight_cell(which, p.w_at, min(row + 2u, last), quad);
            found.d = weight_cell(which, p.w_at, min(row + 3u, last), quad);
        } else {
            let row = k + i / WQ * 4u;
            let quad = min(p.col0 / 4u + i % WQ, (params.n - 1u) / 4u);
            if (EVEN || row < params.k) { found.a = weight_cell(0u, p.w_at, row, quad); }
            if (EVEN || row + 1u < params.k) { found.b = weight_cell(0u, p.w_at, row + 1u, quad); }
            if (EVEN || row + 2u < params.k) { found.c = weight_cell(0u, p.w_at, row + 2u, quad); }
            if (EVEN || row + 3u < params.k) { found.d = weight_cell(0u, p.w_at, row + 3u, quad); }
        }
    }
    return found;
}

/// Stores block i of x where the products read it.
fn place_x(i: u32, block: Block) {
    if (X_BLOCKS % LANES == 0u || i < X_BLOCKS) {
        let q = i % KQ;
        let at = q * 4u * XQ + ((i / KQ) ^ swizzle(q));
        let columns = transpose(mat4x4<f32>(x_values(block.a), x_values(block.b), x_values(block.c), x_values(block.d)));
        tile_x[at] = columns[0];
        tile_x[at + XQ] = columns[1];
        tile_x[at + 2u * XQ] = columns[2];
        tile_x[at + 3u * XQ] = columns[3];
    }
}

/// Stores block i of w where the products read it.
fn place_w(i: u32, block: Block) {
    if (W_BLOCKS % LANES == 0u || i < W_BLOCKS) {
        let rows = mat4x4<f32>(
            weight_values(block.a), weight_values(block.b), weight_values(block.c), weight_values(block.d),
        );
        if (W_NK) {
            let q = i % KQ;
            let at = q * 4u * WQ + ((i / KQ) ^ swizzle(q));
            let columns = transpose(rows);
            tile_w[at] = columns[0];
            tile_w[at + WQ] = columns[1];
            tile_w[at + 2u * WQ] = columns[2];
            tile_w[at + 3u * WQ] = columns[3];
        } else {
            let q = i / WQ;
            let at = q * 4u * WQ + ((i % WQ) ^ swizzle(q));
            tile_w[at] = rows[0];
            tile_w[at + WQ] = rows[1];
            tile_w[at + 2u * WQ] = rows[2];
            tile_w[at + 3u * WQ] = rows[3];
        }
    }
}

/// acc + the products of four rows of x with four columns of w at one k.
fn outer(acc: mat4x4<f32>, rows: vec4<f32>, columns: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(
        fma(vec4<f32>(rows.x), columns, acc[0]),
        fma(vec4<f32>(rows.y), columns, acc[1]),
        fma(vec4<f32>(rows.z), columns, acc[2]),
        fma(vec4<f32>(rows.w), columns, acc[3]),
    );
}

/// acc + the products of one k, whose first quads are at `x_at` and `w_at`.
fn with_column(acc: Sums, x_at: u32, w_at: u32) -> Sums {
    var sums = acc;
    let columns = tile_w[w_at];
    var more = vec4<f32>();
    if (COL_SETS > 1u) {
        more = tile_w[w_at + TX];
    }
    let rows = tile_x[x_at];
    sums.a = outer(acc.a, rows, columns);
    if (COL_SETS > 1u) { sums.b = outer(acc.b, rows, more); }
    if (ROW_SETS > 1u) {
        let second = tile_x[x_at + TY];
        sums.c = outer(acc.c, second, columns);
        if (COL_SETS > 1u) { sums.d = outer(acc.d, second, more); }
    }
    if (ROW_SETS > 2u) {
        let third = tile_x[x_at + 2u * TY];
        let fourth = tile_x[x_at + 3u * TY];
        sums.e = outer(acc.e, third, columns);
        sums.g = outer(acc.g, fourth, columns);
        if (COL_SETS > 1u) {
            sums.f = outer(acc.f, third, more);
            sums.h = outer(acc.h, fourth, more);
        }
    }
    return sums;
}

/// acc + the products of four k, number q of the step.
fn with_quad(acc: Sums, q: u32, tx: u32, ty: u32) -> Sums {
    let x_at = q * 4u * XQ + (ty ^ swizzle(q));
    let w_at = q * 4u * WQ + (tx ^ swizzle(q));
    var sums = with_column(acc, x_at, w_at);
    sums = with_column(sums, x_at + XQ, w_at + WQ);
    sums = with_column(sums, x_at + 2u * XQ, w_at + 2u * WQ);
    return with_column(sums, x_at + 3u * XQ, w_at + 3u * WQ);
}
