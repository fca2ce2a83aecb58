// Few rows times packed weights of any format, bfloat16 too, on any device: y[m, n] = x[m, :] . w[n, :] + bias[n] + residual[m, n].
//
// One workgroup: BLOCK rows of x (1, 2 or 4) by COLUMNS columns of the result; LANES invocations share a column, each takes every LANES-th four
// columns of K, unpacks them once for all BLOCK rows, and keeps sums in f32; sums meet in workgroup memory.
//
// Memory traffic: weights once for each block of rows; x once a workgroup, from the caches. Versions tried: this one only; devices with subgroups
// take gemv_stream.wgsl for groups of whole cells.
// Appended: packed_weights.wgsl or packed_weights_bf16.wgsl.

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read> w: array<u32>;
@group(0) @binding(2) var<storage, read> bias: array<Bias>;
@group(0) @binding(3) var<storage, read> residual: array<Residual>;
@group(0) @binding(4) var<storage, read_write> out: array<Out>;

struct Params {
    m: u32,
    n: u32,
    k: u32,
    row_words: u32,
    col_blocks: u32,
    total: u32, // workgroups with work
}
@group(0) @binding(5) var<uniform> params: Params;

const COLUMNS = WG / LANES;

var<workgroup> partial: array<vec4<f32>, WG>;

fn packed_word(which: u32, at: u32) -> u32 {
    return w[at];
}

fn packed_row(row: u32) -> u32 {
    return row * params.row_words;
}

fn x_quad(row: u32, quad: u32) -> vec4<f32> {
    let at = min(row, params.m - 1u) * params.k;
    let first = 4u * quad;
    let last = params.k - 1u; // what is read twice meets weights that are 0
    return vec4<f32>(
        f32(x[at + first]),
        f32(x[at + min(first + 1u, last)]),
        f32(x[at + min(first + 2u, last)]),
        f32(x[at + min(first + 3u, last)]),
    );
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let flat = wid.y * groups.x + wid.x;
    if (flat >= params.total) {
        return;
    }
    let row = flat / params.col_blocks * BLOCK;
    let col = flat % params.col_blocks * COLUMNS + lane / LANES;
    let place = min(col, params.n - 1u);
    var sum = vec4<f32>();
    for (var quad = lane % LANES; quad * 4u < params.k; quad += LANES) {
        let v = packed_values(0u, place, quad, params.k);
        sum.x += dot(v, x_quad(row, quad));
        if (BLOCK > 1u) {
            sum.y += dot(v, x_quad(row + 1u, quad));
        }
        if (BLOCK > 2u) {
            sum.z += dot(v, x_quad(row + 2u, quad));
            sum.w += dot(v, x_quad(row + 3u, quad));
        }
    }
    partial[lane] = sum;
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (lane % LANES < step) {
            partial[lane] += partial[lane + step];
        }
    }
    if (lane % LANES == 0u && col < params.n) {
        for (var r = 0u; r < min(BLOCK, params.m - row); r++) {
            var y = partial[lane][r];
            let at = (row + r) * params.n + col;
            if (BIAS) {
                y += f32(bias[col]);
            }
            if (RESIDUAL) {
                y += f32(residual[at]);
            }
            out[at] = Out(y);
        }
    }
}
