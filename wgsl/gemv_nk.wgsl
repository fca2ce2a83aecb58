// out[b, m, n] = alpha * sum_k A[b, m, k] * W[b, n, k] + beta * bias[b, m, n] for few rows m; W is [.., N, K].
//
// A workgroup computes ROWS rows (1, 2, 4 or 8) of COLS * WG / LANES columns. LANES invocations share COLS (1 or 4) columns: each
// walks along K in vec4 steps, so that neighbours load neighbouring 16 (f16: 8) bytes of W, and keeps one vec4 of sums per row,
// a component per column. Then a tree over the LANES partial sums in workgroup memory (no subgroups needed).
// Traffic: W once per ROWS rows (once in all for up to 8 rows), A once per COLS columns, from the caches.
//
// VEC: K is a multiple of four, and A and W are read as vec4. Otherwise element by element with guards.
// Rows and columns past the end are computed on clamped addresses and not stored.
// COLS = 1 is for an N so small that four columns each would leave most of a GPU idle. Choices are by count of loads and
// invocations; no variant has been timed on a GPU yet.
@group(0) @binding(0) var<storage, read> a: array<A>;
@group(0) @binding(1) var<storage, read> a4: array<A4>;
@group(0) @binding(2) var<storage, read> b: array<B>;
@group(0) @binding(3) var<storage, read> b4: array<B4>;
@group(0) @binding(4) var<storage, read> bias: array<Bias>;
@group(0) @binding(5) var<storage, read_write> out: array<Out>;

struct Params {
    sizes: vec4<u32>,
    a_strides: vec4<u32>,
    b_strides: vec4<u32>,
    bias_strides: vec4<u32>,
    m: u32,
    n: u32,
    k: u32,
    bias_row: u32,
    bias_col: u32,
    alpha: f32,
    beta: f32,
    col_blocks: u32,
    row_blocks: u32,
    total: u32,
}
@group(0) @binding(6) var<uniform> params: Params;

var<workgroup> partial: array<vec4<f32>, WG * ROWS>;

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

// Four elements from `at`, of which `left` exist; the others count as 0 in both operands.
fn load_a(at: u32, left: u32) -> vec4<f32> {
    if (VEC) {
        return vec4<f32>(a4[at >> 2u]);
    }
    var v = vec4<f32>(f32(a[at]), 0.0, 0.0, 0.0);
    if (left > 1u) { v.y = f32(a[at + 1u]); }
    if (left > 2u) { v.z = f32(a[at + 2u]); }
    if (left > 3u) { v.w = f32(a[at + 3u]); }
    return v;
}

fn load_b(at: u32, left: u32) -> vec4<f32> {
    if (VEC) {
        return vec4<f32>(b4[at >> 2u]);
    }
    var v = vec4<f32>(f32(b[at]), 0.0, 0.0, 0.0);
    if (left > 1u) { v.y = f32(b[at + 1u]); }
    if (left > 2u) { v.z = f32(b[at + 2u]); }
    if (left > 3u) { v.w = f32(b[at + 3u]); }
    return v;
}

fn dots(x: vec4<f32>, w0: vec4<f32>, w1: vec4<f32>, w2: vec4<f32>, w3: vec4<f32>) -> vec4<f32> {
    if (COLS == 1u) {
        return vec4<f32>(dot(x, w0), 0.0, 0.0, 0.0);
    }
    return vec4<f32>(dot(x, w0), dot(x, w1), dot(x, w2), dot(x, w3));
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
    let rest = flat / params.col_blocks;
    let row = (rest % params.row_blocks) * ROWS;
    let batch = rest / params.row_blocks;
    let index = batch_index(batch);
    let slot = lane % LANES;
    let col = ((flat % params.col_blocks) * (WG / LANES) + lane / LANES) * COLS;
    let k_size = params.k;

    let a_base = offset(index, params.a_strides);
    let last_row = params.m - 1u;
    let a_0 = a_base + min(row, last_row) * k_size;
    let a_1 = a_base + min(row + 1u, last_row) * k_size;
    let a_2 = a_base + min(row + 2u, last_row) * k_size;
    let a_3 = a_base + min(row + 3u, last_row) * k_size;
    let a_4 = a_base + min(row + 4u, last_row) * k_size;
    let a_5 = a_base + min(row + 5u, last_row) * k_size;
    let a_6 = a_base + min(row + 6u, last_row) * k_size;
    let a_7 = a_base + min(row + 7u, last_row) * k_size;
    let b_base = offset(index, params.b_strides);
    let last_col = params.n - 1u;
    let b_0 = b_base + min(col, last_col) * k_size;
    let b_1 = b_base + min(col + 1u, last_col) * k_size;
    let b_2 = b_base + min(col + 2u, last_col) * k_size;
    let b_3 = b_base + min(col + 3u, last_col) * k_size;

    var s_0 = vec4<f32>();
    var s_1 = vec4<f32>();
    var s_2 = vec4<f32>();
    var s_3 = vec4<f32>();
    var s_4 = vec4<f32>();
    var s_5 = vec4<f32>();
    var s_6 = vec4<f32>();
    var s_7 = vec4<f32>();
    for (var k = slot * 4u; k < k_size; k += LANES * 4u) {
        let left = k_size - k;
        let w0 = load_b(b_0 + k, left);
        var w1 = vec4<f32>();
        var w2 = vec4<f32>();
        var w3 = vec4<f32>();
        if (COLS > 1u) {
            w1 = load_b(b_1 + k, left);
            w2 = load_b(b_2 + k, left);
            w3 = load_b(b_3 + k, left);
        }
        s_0 += dots(load_a(a_0 + k, left), w0, w1, w2, w3);
        if (ROWS > 1u) {
            s_1 += dots(load_a(a_1 + k, left), w0, w1, w2, w3);
        }
        if (ROWS > 2u) {
            s_2 += dots(load_a(a_2 + k, left), w0, w1, w2, w3);
            s_3 += dots(load_a(a_3 + k, left), w0, w1, w2, w3);
        }
        if (ROWS > 4u) {
            s_4 += dots(load_a(a_4 + k, left), w0, w1, w2, w3);
            s_5 += dots(load_a(a_5 + k, left), w0, w1, w2, w3);
            s_6 += dots(load_a(a_6 + k, left), w0, w1, w2, w3);
            s_7 += dots(load_a(a_7 + k, left), w0, w1, w2, w3);
        }
    }
    partial[lane] = s_0;
    if (ROWS > 1u) {
        partial[min(1u, ROWS - 1u) * WG + lane] = s_1;
    }
    if (ROWS > 2u) {
        partial[min(2u, ROWS - 1u) * WG + lane] = s_2;
        partial[min(3u, ROWS - 1u) * WG + lane] = s_3;
    }
    if (ROWS > 4u) {
        partial[min(4u, ROWS - 1u) * WG + lane] = s_4;
        partial[min(5u, ROWS - 1u) * WG + lane] = s_5;
        partial[min(6u, ROWS - 1u) * WG + lane] = s_6;
        partial[min(7u, ROWS - 1u) * WG + lane] = s_7;
    }
    workgroupBarrier();
    for (var step = LANES / 2u; step > 0u; step >>= 1u) {
        if (slot < step) {
            for (var r = 0u; r < ROWS; r++) {
                partial[r * WG + lane] += partial[r * WG + lane + step];
            }
        }
        workgroupBarrier();
    }
    for (var j = slot; j < ROWS * COLS; j += LANES) {
        let m = row + j / COLS;
        let n = col + j % COLS;
        if (m < params.m && n < params.n) {
            var value = params.alpha * partial[(j / COLS) * WG + lane - slot][j % COLS];
            if (BIAS) {
                let at = offset(index, params.bias_strides) + m * params.bias_row + n * params.bias_col;
                value += params.beta * f32(bias[at]);
            }
            out[(batch * params.m + m) * params.n + n] = Out(value);
        }
    }
}
