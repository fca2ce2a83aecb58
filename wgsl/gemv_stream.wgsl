// Few rows times one weight matrix [N, K], or two that are gated; for devices with subgroups: weights stream through registers.
//
//   y[m, n] = f(m, n) + bias[n] + residual[m, n]
//   f = xn[m, :] . w0[n, :],   GATED: silu(xn[m, :] . w0[n, :]) * (xn[m, :] . w1[n, :])
//   xn[m, :] = x[m, :],        NORM: x[m, :] / sqrt(mean_k(x[m, k]^2) + eps) * norm[:]
//
// LANES invocations share COLS (2 or 4) rows of weights, PER columns of the result (half as many where GATED); each lane loads 16 bytes of
// every row at a time, UNROLL times over before it uses them, with the same columns of x from the caches, and keeps the sums of ROWS (1, 2, 4 or 8)
// rows of x in registers. The factor of the norm is taken out of the sum: squares are summed on the way and nothing is computed before the
// weights are asked for. The loop has no barrier. Sums meet by shuffles within a subgroup, then in workgroup memory, after one barrier. More rows
// of x go by in PASSES, each by workgroups of its own.
//
// Memory traffic: weights once; x (and norm) once a workgroup, and 1 / COLS of the loads of weights from the nearest cache.
// Unchecked: weight rows are clamped below N, rows of x below m, cells are below params.cells; what is stored is below N and m.
// Versions: docs/KERNELS.md.
// Appended: gemv_stream_sums.wgsl, gemv_stream_columns_<COLS>.wgsl, gemv_stream_f16.wgsl, _bf16.wgsl or _f32.wgsl; for packed weights, whose x
// goes through workgroup memory: gemv_stream_packed.wgsl, gemv_stream_packed_<COLS>.wgsl, gemv_stream_bits_4.wgsl or gemv_stream_bits_8.wgsl, and
// for x of floats gemv_stream_packed_digits.wgsl, of integers gemv_stream_packed_bytes.wgsl and gemv_stream_packed_codes.wgsl, of floats that are
// quantised here gemv_stream_packed_bytes.wgsl, gemv_stream_packed_quantize.wgsl, quantize_range.wgsl, quotient.wgsl.

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read> w0: array<Raw>;
@group(0) @binding(2) var<storage, read> w1: array<Raw>;
@group(0) @binding(3) var<storage, read> norm: array<Norm>;
@group(0) @binding(4) var<storage, read> bias: array<Bias>;
@group(0) @binding(5) var<storage, read> residual: array<Residual>;
@group(0) @binding(6) var<storage, read_write> out: array<Out>;

struct Params {
    m: u32,
    n: u32,
    cells: u32, // of 16 bytes in a row of weights, scales included
    groups: u32, // workgroups with work in a pass
    k: f32,
    eps: f32,
    span: vec4<f32>, // of codes, where x is quantised: low, high, least scale, shift
}
@group(0) @binding(7) var<uniform> params: Params;

fn raw(which: u32, at: u32) -> Raw {
    if (GATED && which == 1u) {
        return w1[at];
    }
    return w0[at];
}

/// A word of 16 bytes of a weight, for packed ones.
fn raw_word(which: u32, at: u32, word: u32) -> u32 {
    if (GATED && which == 1u) {
        return bitcast<u32>(w1[at][word]);
    }
    return bitcast<u32>(w0[at][word]);
}

/// Bias and residual of the j-th result of a workgroup whose first column is `first`.
fn added(j: u32, first: u32) -> f32 {
    var sum = 0.0;
    if (BIAS || RESIDUAL) {
        let col = min(first + j % COLUMNS, params.n - 1u);
        if (BIAS) {
            sum = f32(bias[col]);
        }
        if (RESIDUAL) {
            sum += f32(residual[min(row0 + j / COLUMNS, params.m - 1u) * params.n + col]);
        }
    }
    return sum;
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let flat = wid.y * grid.x + wid.x;
    if (flat >= params.groups * PASSES) {
        return;
    }
    let first = flat / PASSES * COLUMNS; // the passes over the same weights are neighbours
    row0 = flat % PASSES * ROWS;
    let early = added(lane, first); // so that nothing waits for it after the loop
    stream(0u, first + lane / LANES * PER, params.n, lane);
    workgroupBarrier();
    for (var j = lane; j < COLUMNS * ROWS; j += WG) {
        let row = j / COLUMNS;
        let c = j % COLUMNS;
        let col = first + c;
        if (row0 + row < params.m && col < params.n) {
            let scale = factor(c / PER, row);
            var y = met(c / PER, row, c % PER) * scale;
            if (GATED) {
                y = y / (1.0 + exp(-y)) * (met(c / PER, row, PER + c % PER) * scale);
            }
            if (j == lane) {
                y += early;
            } else {
                y += added(j, first);
            }
            out[(row0 + row) * params.n + col] = Out(y);
        }
    }
}
