// out[b, m, n] = alpha * sum_k x[b, m, k] * w[b, n, k] + beta * bias[b, m, n] + residual[b, m, n] through tiles in registers.
//
// x is [.., M, K]; w is [.., N, K] (W_NK) or [.., K, N]. GATED: silu(x w0^T) * (x w1^T) + residual. Sums are f32.
//
// One workgroup: a tile of 4 * XQ rows by 4 * WQ columns of the result (half as many columns where GATED), over all of K or, with SPLIT, one of
// several ranges of K; then it writes bare sums and `gemm_merge` follows. K goes by in steps of 4 * KQ through workgroup memory, where both tiles lie
// with K outermost ([k][row quad], [k][column quad]), so that a lane reads four rows, or four columns, with one load. Lane (ty, tx) owns rows
// 4 * (s * TY + ty) + e of ROW_SETS sets s, columns likewise: with two sets each, 8 x 8 sums from four reads of 16 bytes a k.
//
// Loads are blocks of 4 rows by 4 k, one or two of x and of w a lane: four cells of raw bits from global memory, asked for before the
// products of the step before, converted and transposed in registers when they are placed. A step of 32 reads twice as many neighbours of a row
// at once as one of 16, which counts where weights come from memory and are used for few rows. Quads of a k are permuted by an exclusive or
// (`swizzle`), so that the eight lanes of a store meet different banks and no tile has padding: 64 x 64 x 16 takes 8 KiB, 128 x 128 x 16 and
// 64 x 64 x 32 take 16.
// Neighbouring lanes alternate between two rows of lanes: each half of 32 lanes reads eight vectors of w and two of x.
//
// Traffic: x once for each tile of columns, w once for each tile of rows. Versions tried: docs/KERNELS.md.
// Unchecked: K is at least 1; rows of x are clamped to the last one, rows (or quads of columns) of w too; k is below K, or with EVEN by
// construction; what is stored is below M and N; indices of workgroup memory follow from lane < LANES.
// Appended: gemm_x_f32.wgsl, gemm_x_f16.wgsl or gemm_x_any.wgsl; gemm_weights_f16.wgsl, _bf16.wgsl, _f32.wgsl, _packed.wgsl or _any.wgsl;
// gemm_store_4.wgsl or gemm_store_1.wgsl; gemm_tiles.wgsl.

@group(0) @binding(0) var<storage, read> x: array<XCell>;
@group(0) @binding(1) var<storage, read> w0: array<WCell>;
@group(0) @binding(2) var<storage, read> w1: array<WCell>;
@group(0) @binding(3) var<storage, read> scales0: array<Scale>; // of w0, for loaders of quantised weights
@group(0) @binding(4) var<storage, read> scales1: array<Scale>;
@group(0) @binding(5) var<storage, read> bias: array<Bias>;
@group(0) @binding(6) var<storage, read> residual: array<Residual>;
@group(0) @binding(7) var<storage, read_write> out: array<Out>;

struct Params {
    sizes: vec4<u32>, // batch sizes
    x_strides: vec4<u32>, // of each batch index, in cells of x
    w_strides: vec4<u32>, // in cells of w
    bias_strides: vec4<u32>, // in elements
    m: u32,
    n: u32,
    k: u32,
    x_row: u32, // cells of a row of x
    w_row: u32, // cells of a row of w
    bias_row: u32,
    bias_col: u32,
    alpha: f32,
    beta: f32,
    row_tiles: u32,
    col_tiles: u32,
    splits: u32,
    span: u32, // of K in a split, a multiple of STEP
    batch: u32,
    total: u32,
}
@group(0) @binding(8) var<uniform> params: Params;

const XQ = ROW_SETS * TY; // quads of rows in a tile
const WQ = COL_SETS * TX; // quads of columns
const LANES = TX * TY;
const STEP = 4u * KQ;
const GATE_QUADS = WQ / 2u;

var<workgroup> tile_x: array<vec4<f32>, STEP * XQ>;
var<workgroup> tile_w: array<vec4<f32>, STEP * WQ>;

fn batch_index(flat: u32) -> vec4<u32> {
    let s = params.sizes;
    let yz = flat / s.w;
    let xy = yz / s.z;
    return vec4<u32>(xy / s.y, xy % s.y, yz % s.z, flat % s.w);
}

fn offset(index: vec4<u32>, strides: vec4<u32>) -> u32 {
    let p = index * strides;
    return p.x + p.y + p.z + p.w;
}

fn silu(gate: vec4<f32>) -> vec4<f32> {
    return gate / (1.0 + exp(-gate));
}

fn bias_at(at: u32, row: u32, col: u32) -> vec4<f32> {
    let last = params.n - 1u;
    let start = at + min(row, params.m - 1u) * params.bias_row;
    return vec4<f32>(
        f32(bias[start + min(col, last) * params.bias_col]),
        f32(bias[start + min(col + 1u, last) * params.bias_col]),
        f32(bias[start + min(col + 2u, last) * params.bias_col]),
        f32(bias[start + min(col + 3u, last) * params.bias_col]),
    );
}

/// Writes four columns of a row: what is left to do to its sums is done here. `at` is the first row's element, `added` its share of a bias that
/// is the same in all rows.
fn finish(matrix: u32, row: u32, col: u32, sums: vec4<f32>, added: vec4<f32>, first: u32) {
    if (row >= params.m || col >= params.n) {
        return;
    }
    let at = (matrix * params.m + row) * params.n + col;
    if (SPLIT) {
        put(at, col, sums);
        return;
    }
    var y = params.alpha * sums;
    if (BIAS && BIAS_ROWS) {
        y += params.beta * bias_at(first, row, col);
    } else if (BIAS) {
        y += added;
    }
    if (RESIDUAL) {
        y += residual_at(at, col);
    }
    put(at, col, y);
}

fn finish_rows(matrix: u32, row: u32, col: u32, sums: mat4x4<f32>, first: u32) {
    var added = vec4<f32>();
    if (BIAS && !BIAS_ROWS) {
        added = params.beta * bias_at(first, 0u, col);
    }
    finish(matrix, row, col, sums[0], added, first);
    finish(matrix, row + 1u, col, sums[1], added, first);
    finish(matrix, row + 2u, col, sums[2], added, first);
    finish(matrix, row + 3u, col, sums[3], added, first);
}

fn gated(gate: mat4x4<f32>, up: mat4x4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(silu(gate[0]) * up[0], silu(gate[1]) * up[1], silu(gate[2]) * up[2], silu(gate[3]) * up[3]);
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let flat = wid.y * groups.x + wid.x;
    if (flat >= params.total) {
        return;
    }
    // Row tiles vary fastest: workgroups that run together share columns of w, and rows of x soon after.
    let rest = flat / params.row_tiles;
    let row0 = flat % params.row_tiles * 4u * XQ;
    let col0 = rest % params.col_tiles * 4u * select(WQ, GATE_QUADS, GATED);
    let matrix = rest / params.col_tiles; // split, batch
    let index = batch_index(matrix % params.batch);
    let begin = matrix / params.batch * params.span;
    let end = min(begin + params.span, params.k);
    let last = begin + (end - begin - 1u) / STEP * STEP;
    let place = Place(row0, col0, offset(index, params.x_strides), offset(index, params.w_strides));

    // 32 neighbours are 4 x 8 lanes of the grid, even ones and odd ones in different rows.
    let in_32 = lane % 32u;
    let tx = lane / 32u % (TX / 8u) * 8u + in_32 % 16u / 2u;
    let ty = lane / (4u * TX) * 4u + in_32 / 16u * 2u + in_32 % 2u;

    var acc = Sums();
    var next_x = fetch_x(lane, place, begin);
    var next_w = fetch_w(lane, place, begin);
    var more_x = Block();
    var more_w = Block();
    if (X_BLOCKS > LANES) { more_x = fetch_x(lane + LANES, place, begin); }
    if (W_BLOCKS > LANES) { more_w = fetch_w(lane + LANES, place, begin); }
    for (var k = begin; k < end; k += STEP) {
        place_x(lane, next_x);
        place_w(lane, next_w);
        if (X_BLOCKS > LANES) { place_x(lane + LANES, more_x); }
        if (W_BLOCKS > LANES) { place_w(lane + LANES, more_w); }
        workgroupBarrier();
        let ahead = min(k + STEP, last); // the last step asks for its own tiles once more: no test around loads
        next_x = fetch_x(lane, place, ahead);
        next_w = fetch_w(lane, place, ahead);
        if (X_BLOCKS > LANES) { more_x = fetch_x(lane + LANES, place, ahead); }
        if (W_BLOCKS > LANES) { more_w = fetch_w(lane + LANES, place, ahead); }
        if (UNROLLED) { // by hand: compilers leave a loop over these as it is
            for (var q = 0u; q < KQ; q += 4u) {
                acc = with_quad(acc, q, tx, ty);
                acc = with_quad(acc, q + 1u, tx, ty);
                acc = with_quad(acc, q + 2u, tx, ty);
                acc = with_quad(acc, q + 3u, tx, ty);
            }
        } else {
            for (var q = 0u; q < KQ; q++) {
                acc = with_quad(acc, q, tx, ty);
            }
        }
        workgroupBarrier();
    }

    let first = offset(index, params.bias_strides);
    let row = row0 + 4u * ty;
    let col = col0 + 4u * tx;
    if (GATED) {
        finish_rows(matrix, row, col, gated(acc.a, acc.b), first);
        if (ROW_SETS > 1u) { finish_rows(matrix, row + 4u * TY, col, gated(acc.c, acc.d), first); }
        return;
    }
    finish_rows(matrix, row, col, acc.a, first);
    if (COL_SETS > 1u) { finish_rows(matrix, row, col + 4u * TX, acc.b, first); }
    if (ROW_SETS > 1u) {
        finish_rows(matrix, row + 4u * TY, col, acc.c, first);
        if (COL_SETS > 1u) { finish_rows(matrix, row + 4u * TY, col + 4u * TX, acc.d, first); }
    }
    if (ROW_SETS > 2u) {
        finish_rows(matrix, row + 8u * TY, col, acc.e, first);
        finish_rows(matrix, row + 12u * TY, col, acc.g, first);
        if (COL_SETS > 1u) {
            finish_rows(matrix, row + 8u * TY, col + 4u * TX, acc.f, first);
            finish_rows(matrix, row + 12u * TY, col + 4u * TX, acc.h, first);
        }
    }
}
