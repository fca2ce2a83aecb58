// out[b, m, n] = alpha * sum_k A[b, m, k] * B[b, k, n] + beta * bias[b, m, n] for few rows m; B is [.., K, N].
//
// A workgroup computes ROWS rows (1, 2, 4 or 8) of 4 * LANES columns: an invocation owns four neighbouring columns and every
// (WG / LANES)-th k, four of them at a time so that four loads of B are in flight. It keeps one vec4 of sums per row; then a tree
// over the WG / LANES partial sums in workgroup memory.
// Traffic: B once per ROWS rows, in runs of 4 * LANES elements; A once per 4 * LANES columns.
//
// VEC: N is a multiple of four and B is read as vec4, otherwise element by element. Rows and columns past the end are computed
// on clamped addresses and not stored.
@group(0) @binding(0) var<storage, read> a: array<A>;
@group(0) @binding(1) var<storage, read> b: array<B>;
@group(0) @binding(2) var<storage, read> b4: array<B4>;
@group(0) @binding(3) var<storage, read> bias: array<Bias>;
@group(0) @binding(4) var<storage, read_write> out: array<Out>;

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
@group(0) @binding(5) var<uniform> params: Params;

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

// Columns col .. col + 3 of the row that starts at `base`; columns past the end repeat the last.
fn load_b(base: u32, col: u32) -> vec4<f32> {
    let last = params.n - 1u;
    if (VEC) {
        return vec4<f32>(b4[(base + min(col, last)) >> 2u]);
    }
    return vec4<f32>(
        f32(b[base + min(col, last)]),
        f32(b[base + min(col + 1u, last)]),
        f32(b[base + min(col + 2u, last)]),
        f32(b[base + min(col + 3u, last)]),
    );
}

fn four(at: u32, w0: vec4<f32>, w1: vec4<f32>, w2: vec4<f32>, w3: vec4<f32>) -> vec4<f32> {
    let step = WG / LANES;
    return f32(a[at]) * w0 + f32(a[at + step]) * w1 + f32(a[at + 2u * step]) * w2 + f32(a[at + 3u * step]) * w3;
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
    let slot = lane / LANES;
    let slots = WG / LANES;
    let col = ((flat % params.col_blocks) * LANES + lane % LANES) * 4u;
    let k_size = params.k;
    let n_size = params.n;

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

    var s_0 = vec4<f32>();
    var s_1 = vec4<f32>();
    var s_2 = vec4<f32>();
    var s_3 = vec4<f32>();
    var s_4 = vec4<f32>();
    var s_5 = vec4<f32>();
    var s_6 = vec4<f32>();
    var s_7 = vec4<f32>();
    var k = slot;
    for (; k + 3u * slots < k_size; k += 4u * slots) {
        let w0 = load_b(b_base + k * n_size, col);
        let w1 = load_b(b_base + (k + slots) * n_size, col);
        let w2 = load_b(b_base + (k + 2u * slots) * n_size, col);
        let w3 = load_b(b_base + (k + 3u * slots) * n_size, col);
        s_0 += four(a_0 + k, w0, w1, w2, w3);
        if (ROWS > 1u) {
            s_1 += four(a_1 + k, w0, w1, w2, w3);
        }
        if (ROWS > 2u) {
            s_2 += four(a_2 + k, w0, w1, w2, w3);
            s_3 += four(a_3 + k, w0, w1, w2, w3);
        }
        if (ROWS > 4u) {
            s_4 += four(a_4 + k, w0, w1, w2, w3);
            s_5 += four(a_5 + k, w0, w1, w2, w3);
            s_6 += four(a_6 + k, w0, w1, w2, w3);
            s_7 += four(a_7 + k, w0, w1, w2, w3);
        }
    }
    for (; k < k_size; k += slots) {
        let w = load_b(b_base + k * n_size, col);
        s_0 += f32(a[a_0 + k]) * w;
        if (ROWS > 1u) {
            s_1 += f32(a[a_1 + k]) * w;
        }
        if (ROWS > 2u) {
            s_2 += f32(a[a_2 + k]) * w;
            s_3 += f32(a[a_3 + k]) * w;
        }
        if (ROWS > 4u) {
            s_4 += f32(a[a_4 + k]) * w;
            s_5 += f32(a[a_5 + k]) * w;
            s_6 += f32(a[a_6 + k]) * w;
            s_7 += f32(a[a_7 + k]) * w;
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
    for (var step = (WG / LANES) / 2u; step > 0u; step >>= 1u) {
        if (slot < step) {
            for (var r = 0u; r < ROWS; r++) {
                partial[r * WG + lane] += partial[r * WG + lane + step * LANES];
            }
        }
        workgroupBarrier();
    }
    // The sums of LANES * 4 columns stand in the first LANES vectors of each row: neighbours store neighbouring columns.
    let first = (flat % params.col_blocks) * LANES * 4u;
    for (var j = lane; j < ROWS * LANES * 4u; j += WG) {
        let r = j / (LANES * 4u);
        let c = j % (LANES * 4u);
        let m = row + r;
        let n = first + c;
        if (m < params.m && n < n_size) {
            var value = params.alpha * partial[r * WG + c / 4u][c % 4u];
            if (BIAS) {
                let at = offset(index, params.bias_strides) + m * params.bias_row + n * params.bias_col;
                value += params.beta * f32(bias[at]);
            }
            out[(batch * params.m + m) * n_size + n] = Out(value);
        }
    }
}
