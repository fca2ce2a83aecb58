// Many rows of activations that are integers of 8 bits (ops/activations.py) times packed weights [N, K] of 4 or 8 bits (ops/packed.py):
//
//   out[m, n] = s[m] * sum over groups of scale[n, g] * sum over k in g of (a[m, k] - zero[m, k / 32]) * (w[n, k] - zero[n, g])  + bias[n] + residual[m, n]
//
// GATED: silu(x w0^T) * (x w1^T) + residual. Sums within a group are integers, so they are exact; across groups they are f32.
//
// One workgroup: TILE_M rows by TILE_N columns of the result (half as many where GATED, whose gate and up lie side by side), over all blocks of 32
// of K or, with SPLIT, one of several ranges of them; then it writes bare sums and `gemm_merge` follows. A block of both goes through workgroup
// memory as signed bytes, 16 columns of K of a row each ([half][row]), so that it is copied as it lies in memory, or unpacked once. Lane (ty, tx)
// has four rows ty + i * TY and eight columns tx + j * TX: one instruction multiplies four columns of K and adds. What is next is asked for before
// the products: a lane has one row of a block, of x or of w.
//
// FLUSH blocks of a group are added up as integers before they are scaled. The zero of a block of x, mostly 0, costs a product with the sum of the
// weights' codes.
//
// Traffic: x once for each tile of columns, w once for each tile of rows. Versions: docs/KERNELS.md.
// Unchecked: rows of x are clamped to the last one, rows of w too; blocks are below params.blocks, cells of codes below CELLS; what is stored is
// below M and N; indices of workgroup memory follow from lane < LANES, and TILE_M + TILE_N is at most LANES.
// Appended: gemm_codes_bits_4.wgsl or gemm_codes_bits_8.wgsl; gemm_codes_sums.wgsl.

@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> w0: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> w1: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> bias: array<Bias>;
@group(0) @binding(4) var<storage, read> residual: array<Residual>;
@group(0) @binding(5) var<storage, read_write> out: array<Out>;

struct Params {
    m: u32,
    n: u32,
    blocks: u32, // of 32 columns of K
    x_row: u32, // 16 bytes of a row of x
    w_row: u32, // 16 bytes of a row of w
    row_tiles: u32,
    col_tiles: u32,
    span: u32, // blocks of a split
    total: u32,
}
@group(0) @binding(6) var<uniform> params: Params;

const LANES = TX * TY;
const TILE_M = 4u * TY;
const TILE_N = 8u * TX;
const OWN = select(TILE_N, TILE_N / 2u, GATED); // columns of the result

var<workgroup> tile_x: array<vec4<u32>, 2u * TILE_M>;
var<workgroup> tile_w: array<vec4<u32>, 2u * TILE_N>;
var<workgroup> x_zeros: array<i32, TILE_M>;
var<workgroup> x_totals: array<f32, select(1u, TILE_M, ZEROS)>; // of what a block of x stands for
var<workgroup> w_totals: array<i32, TILE_N>; // of a block's codes
var<workgroup> w_scales: array<vec2<f32>, TILE_N>; // and zeros

/// A row of a block: 32 columns of x and their zero, or the cells of w with the words that scale and zero are in.
struct Fetched { a: vec4<u32>, b: vec4<u32>, more: vec4<u32> }

fn cell(which: u32, at: u32) -> vec4<u32> {
    if (GATED && which == 1u) {
        return w1[at];
    }
    return w0[at];
}

fn word(which: u32, at: u32, i: u32) -> u32 {
    if (GATED && which == 1u) {
        return w1[at + i / 4u][i % 4u];
    }
    return w0[at + i / 4u][i % 4u];
}

fn fetch(lane: u32, row0: u32, col0: u32, block: u32) -> Fetched {
    var f = Fetched();
    if (lane < TILE_M) {
        let at = min(row0 + lane, params.m - 1u) * params.x_row;
        f.a = x[at + 2u * block];
        f.b = x[at + 2u * block + 1u];
        f.more.x = x[at + 2u * params.blocks + block / 4u][block % 4u];
    } else if (lane < TILE_M + TILE_N) {
        let j = lane - TILE_M;
        let which = j / OWN;
        let at = min(col0 + j - which * OWN, params.n - 1u) * params.w_row;
        f.a = cell(which, at + BLOCK_CELLS * block);
        if (BLOCK_CELLS > 1u) {
            f.b = vec4<u32>(0x80808080u); // codes that stand for 0
            if (BLOCK_CELLS * block + 1u < CELLS) {
                f.b = cell(which, at + BLOCK_CELLS * block + 1u);
            }
        }
        let group = block / GROUP_BLOCKS;
        let i = 4u * CELLS + select(group, group / 2u, SCALE_F16);
        f.more = vec4<u32>(word(which, at, i), 0u, group & 1u, 0u);
        if (ZEROS) {
            f.more.y = word(which, at, i + SCALE_WORDS);
        }
    }
    return f;
}

fn half_of(found: u32, odd: u32) -> f32 {
    if (SCALE_F16) {
        let both = unpack2x16float(found);
        return select(both.x, both.y, odd == 1u);
    }
    return bitcast<f32>(found);
}

/// The sum of sixteen signed bytes.
fn total_of(v: vec4<u32>) -> i32 {
    let ones = 0x01010101u;
    return dot4I8Packed(v.x, ones) + dot4I8Packed(v.y, ones) + dot4I8Packed(v.z, ones) + dot4I8Packed(v.w, ones);
}

fn place(lane: u32, f: Fetched) {
    if (lane < TILE_M) {
        tile_x[lane] = f.a;
        tile_x[TILE_M + lane] = f.b;
        let zero = bitcast<i32>(f.more.x);
        x_zeros[lane] = zero;
        if (ZEROS) {
            x_totals[lane] = f32(total_of(f.a) + total_of(f.b) - 32 * zero);
        }
    } else if (lane < TILE_M + TILE_N) {
        let j = lane - TILE_M;
        let c = columns_of(f.a, f.b);
        tile_w[j] = c.a;
        tile_w[TILE_N + j] = c.b;
        w_totals[j] = total_of(c.a) + total_of(c.b);
        var zero = 0.0;
        if (ZEROS) {
            zero = FACTOR * (half_of(f.more.y, f.more.z) - MIDDLE);
        }
        w_scales[j] = vec2<f32>(half_of(f.more.x, f.more.z), zero);
    }
}

fn put(split: u32, row: u32, col: u32, sum: f32) {
    if (row >= params.m || col >= params.n) {
        return;
    }
    let at = row * params.n + col;
    if (SPLIT) {
        out[split * params.m * params.n + at] = Out(sum);
        return;
    }
    var y = sum;
    if (BIAS) {
        y += f32(bias[col]);
    }
    if (RESIDUAL) {
        y += f32(residual[at]);
    }
    out[at] = Out(y);
}

/// The scale of a row of x, over FACTOR.
fn scale_of(row: u32) -> f32 {
    return bitcast<f32>(x[(min(row, params.m - 1u) + 1u) * params.x_row - 1u].x) / FACTOR;
}

/// One column of four rows TY apart.
fn put_column(split: u32, row: u32, col: u32, sums: vec4<f32>) {
    put(split, row, col, sums.x);
    put(split, row + TY, col, sums.y);
    put(split, row + 2u * TY, col, sums.z);
    put(split, row + 3u * TY, col, sums.w);
}

fn gated(gate: vec4<f32>, up: vec4<f32>) -> vec4<f32> {
    return gate / (1.0 + exp(-gate)) * up;
}

/// Two columns, of one result each or, where GATED, of gate and up.
fn finish(split: u32, row: u32, col: u32, a: vec4<f32>, e: vec4<f32>) {
    let by = vec4<f32>(scale_of(row), scale_of(row + TY), scale_of(row + 2u * TY), scale_of(row + 3u * TY));
    if (GATED) {
        put_column(split, row, col, gated(by * a, by * e));
        return;
    }
    put_column(split, row, col, by * a);
    put_column(split, row, col + 4u * TX, by * e);
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
    let row0 = flat % params.row_tiles * TILE_M;
    let col0 = rest % params.col_tiles * OWN;
    let split = rest / params.col_tiles;
    let begin = split * params.span;
    let end = min(begin + params.span, params.blocks);

    // 32 neighbours are 4 x 8 lanes of the grid, even ones and odd ones in different rows.
    let in_32 = lane % 32u;
    let tx = lane / 32u % (TX / 8u) * 8u + in_32 % 16u / 2u;
    let ty = lane / (4u * TX) * 4u + in_32 / 16u * 2u + in_32 % 2u;

    var sums = Sums();
    var acc = Dots();
    var next = fetch(lane, row0, col0, begin);
    for (var block = begin; block < end; block++) {
        place(lane, next);
        workgroupBarrier();
        next = fetch(lane, row0, col0, min(block + 1u, end - 1u)); // the last asks for itself once more: no test around loads
        acc = with_block(acc, ty, tx);
        if (FLUSH == 1u || (block + 1u) % FLUSH == 0u || block + 1u == end) {
            sums = flushed(sums, acc, ty, tx);
            acc = Dots();
        }
        workgroupBarrier();
    }
    let row = row0 + ty;
    let col = col0 + tx;
    finish(split, row, col, sums.a, sums.e);
    finish(split, row, col + TX, sums.b, sums.f);
    finish(split, row, col + 2u * TX, sums.c, sums.g);
    finish(split, row, col + 3u * TX, sums.d, sums.h);
}
