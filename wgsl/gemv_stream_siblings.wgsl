// Few rows times two or three weight matrices [N_i, K] in one dispatch, for devices with subgroups: y_i = xn w_i^T.
//
// As gemv_stream.wgsl, which says what xn and the constants are; workgroups up to ends.x take columns of y_0, up to ends.y those of y_1, the
// others those of y_2. No bias and no residual: bindings are used up.
//
// Memory traffic: all weights once; x (and norm) once a workgroup.
// Unchecked: weight rows are clamped below N_i, rows of x below m, cells are below params.cells; what is stored is below N_i and m.
// Appended: gemv_stream_weights.wgsl, gemv_stream_sums.wgsl, gemv_stream_columns_<COLS>.wgsl, gemv_stream_f16.wgsl or gemv_stream_f32.wgsl; for
// packed weights gemv_stream_weights.wgsl and what gemv_stream.wgsl names for them.

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read> w0: array<Raw>;
@group(0) @binding(2) var<storage, read> w1: array<Raw>;
@group(0) @binding(3) var<storage, read> w2: array<Raw>;
@group(0) @binding(4) var<storage, read> norm: array<Norm>;
@group(0) @binding(5) var<storage, read_write> y0: array<Y0>;
@group(0) @binding(6) var<storage, read_write> y1: array<Y1>;
@group(0) @binding(7) var<storage, read_write> y2: array<Y2>;

struct Params {
    n: vec4<u32>,
    ends: vec4<u32>, // workgroups up to the end of each result
    m: u32,
    cells: u32, // of 16 bytes in a row of weights, scales included
    k: f32,
    eps: f32,
    span: vec4<f32>, // of codes, where x is quantised: low, high, least scale, shift
}
@group(0) @binding(8) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let flat = (wid.y * grid.x + wid.x) / PASSES;
    if (flat >= params.ends.z) {
        return;
    }
    row0 = (wid.y * grid.x + wid.x) % PASSES * ROWS;
    // three calls, so that each loop has one buffer to read
    var n = params.n.x;
    var first = flat * COLUMNS;
    if (flat < params.ends.x) {
        stream(0u, first + lane / LANES * PER, n, lane);
    } else if (flat < params.ends.y) {
        n = params.n.y;
        first = (flat - params.ends.x) * COLUMNS;
        stream(1u, first + lane / LANES * PER, n, lane);
    } else {
        n = params.n.z;
        first = (flat - params.ends.y) * COLUMNS;
        stream(2u, first + lane / LANES * PER, n, lane);
    }
    workgroupBarrier();
    for (var j = lane; j < COLUMNS * ROWS; j += WG) {
        let row = j / COLUMNS;
        let c = j % COLUMNS;
        let col = first + c;
        if (row0 + row < params.m && col < n) {
            let y = met(c / PER, row, c % PER) * factor(c / PER, row);
            let at = (row0 + row) * n + col;
            if (flat < params.ends.x) {
                y0[at] = Y0(y);
            } else if (flat < params.ends.y) {
                y1[at] = Y1(y);
            } else {
                y2[at] = Y2(y);
            }
        }
    }
}
