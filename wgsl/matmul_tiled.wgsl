// out[b, m, n] = alpha * sum_k A[b, m, k] * B[b, k, n] + beta * bias[b, m, n] through tiles in workgroup memory.
//
// A is [.., M, K]; B is [.., K, N], or [.., N, K] with B_NK. A workgroup of T * T invocations computes a tile of
// ROW_SETS * 4T x 4T outputs, T deep in K at a time: 128 x 64 x 16, 64 x 64 x 16 or 32 x 32 x 8, the largest that gives enough
// workgroups. An invocation computes 4 x 4 outputs per row set in named vec4 (an array indexed in a loop would fall into slow local
// memory) and loads vec4 of each tile: four rows of A (columns of B) at one k, so that neighbours read neighbouring k. The next
// tile is loaded into registers while this one is multiplied. Tile rows are one vector longer than needed so that the stores of
// neighbouring k meet different banks.
// Traffic: A is read N / 4T times, B M / (ROW_SETS * 4T) times. Per two vec4 of workgroup memory 16 multiply-adds with one row
// set, per three 32 with two. Up to 12.5 KiB of workgroup memory.
//
// Past the end of K both tiles hold 0 (0 * 0, so no NaN is made); rows and columns past the end repeat the last and are not
// stored. VEC: B is [.., K, N] with N a multiple of four, read as vec4.
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
    row_tiles: u32,
    col_tiles: u32,
    total: u32,
}
@group(0) @binding(5) var<uniform> params: Params;

var<workgroup> tile_a: array<vec4<f32>, T * (ROW_SETS * T + 1u)>;
var<workgroup> tile_b: array<vec4<f32>, T * (T + 1u)>;

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

fn load_a(base: u32, row: u32, k: u32) -> vec4<f32> {
    if (k >= params.k) {
        return vec4<f32>();
    }
    let last = params.m - 1u;
    return vec4<f32>(
        f32(a[base + min(row, last) * params.k + k]),
        f32(a[base + min(row + 1u, last) * params.k + k]),
        f32(a[base + min(row + 2u, last) * params.k + k]),
        f32(a[base + min(row + 3u, last) * params.k + k]),
    );
}

fn load_b(base: u32, col: u32, k: u32) -> vec4<f32> {
    if (k >= params.k) {
        return vec4<f32>();
    }
    let last = params.n - 1u;
    if (VEC) {
        return vec4<f32>(b4[(base + k * params.n + min(col, last)) >> 2u]);
    }
    let col_step = select(1u, params.k, B_NK);
    let at = base + k * select(params.n, 1u, B_NK);
    return vec4<f32>(
        f32(b[at + min(col, last) * col_step]),
        f32(b[at + min(col + 1u, last) * col_step]),
        f32(b[at + min(col + 2u, last) * col_step]),
        f32(b[at + min(col + 3u, last) * col_step]),
    );
}

fn store(batch: u32, bias_base: u32, row: u32, col: u32, sums: vec4<f32>) {
    if (row >= params.m) {
        return;
    }
    var values = params.alpha * sums;
    let at = (batch * params.m + row) * params.n + col;
    if (BIAS) {
        let last = params.n - 1u;
        let bias_at = bias_base + row * params.bias_row;
        values += params.beta * vec4<f32>(
            f32(bias[bias_at + min(col, last) * params.bias_col]),
            f32(bias[bias_at + min(col + 1u, last) * params.bias_col]),
            f32(bias[bias_at + min(col + 2u, last) * params.bias_col]),
            f32(bias[bias_at + min(col + 3u, last) * params.bias_col]),
        );
    }
    if (col < params.n) { out[at] = Out(values.x); }
    if (col + 1u < params.n) { out[at + 1u] = Out(values.y); }
    if (col + 2u < params.n) { out[at + 2u] = Out(values.z); }
    if (col + 3u < params.n) { out[at + 3u] = Out(values.w); }
}

@compute @workgroup_size(T * T)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let flat = wid.y * groups.x + wid.x;
    if (flat >= params.total) {
        return;
    }
    // Row tiles vary fastest: workgroups that run together share columns of B, the larger operand of a linear layer.
    let row0 = (flat % params.row_tiles) * 4u * T * ROW_SETS;
    let rest = flat / params.row_tiles;
    let col0 = (rest % params.col_tiles) * 4u * T;
    let batch = rest / params.col_tiles;
    let index = batch_index(batch);
    let a_base = offset(index, params.a_strides);
    let b_base = offset(index, params.b_strides);
    let high = lane / T;
    let low = lane % T;
    let a_step = ROW_SETS * T + 1u;
    let b_step = T + 1u;
    // Where this invocation loads: neighbours along K, except for B in [K, N], where they are along N.
    let b_quad = select(low, high, B_NK);
    let b_k = select(high, low, B_NK);

    var r0 = vec4<f32>();
    var r1 = vec4<f32>();
    var r2 = vec4<f32>();
    var r3 = vec4<f32>();
    var r4 = vec4<f32>();
    var r5 = vec4<f32>();
    var r6 = vec4<f32>();
    var r7 = vec4<f32>();
    var next_c = vec4<f32>();
    if (ROW_SETS > 1u) {
        next_c = load_a(a_base, row0 + (T + high) * 4u, low);
    }
    var next_a = load_a(a_base, row0 + high * 4u, low);
    var next_b = load_b(b_base, col0 + b_quad * 4u, b_k);
    for (var k0 = 0u; k0 < params.k; k0 += T) {
        tile_a[low * a_step + high] = next_a;
        if (ROW_SETS > 1u) {
            tile_a[low * a_step + T + high] = next_c;
        }
        tile_b[b_k * b_step + b_quad] = next_b;
        workgroupBarrier();
        next_a = load_a(a_base, row0 + high * 4u, k0 + T + low);
        if (ROW_SETS > 1u) {
            next_c = load_a(a_base, row0 + (T + high) * 4u, k0 + T + low);
        }
        next_b = load_b(b_base, col0 + b_quad * 4u, k0 + T + b_k);
        for (var k = 0u; k < T; k += 4u) {  // unrolled by hand: wgpu adds a loop bound, which may keep a driver from it
            let at_a = k * a_step + high;
            let at_b = k * b_step + low;
            let a0 = tile_a[at_a];
            let b0 = tile_b[at_b];
            let a1 = tile_a[at_a + a_step];
            let b1 = tile_b[at_b + b_step];
            let a2 = tile_a[at_a + 2u * a_step];
            let b2 = tile_b[at_b + 2u * b_step];
            let a3 = tile_a[at_a + 3u * a_step];
            let b3 = tile_b[at_b + 3u * b_step];
            r0 += a0.x * b0;
            r1 += a0.y * b0;
            r2 += a0.z * b0;
            r3 += a0.w * b0;
            r0 += a1.x * b1;
            r1 += a1.y * b1;
            r2 += a1.z * b1;
            r3 += a1.w * b1;
            r0 += a2.x * b2;
            r1 += a2.y * b2;
            r2 += a2.z * b2;
            r3 += a2.w * b2;
            r0 += a3.x * b3;
            r1 += a3.y * b3;
            r2 += a3.z * b3;
            r3 += a3.w * b3;
            if (ROW_SETS > 1u) {
                let c0 = tile_a[at_a + T];
                let c1 = tile_a[at_a + a_step + T];
                let c2 = tile_a[at_a + 2u * a_step + T];
                let c3 = tile_a[at_a + 3u * a_step + T];
                r4 += c0.x * b0;
                r5 += c0.y * b0;
                r6 += c0.z * b0;
                r7 += c0.w * b0;
                r4 += c1.x * b1;
                r5 += c1.y * b1;
                r6 += c1.z * b1;
                r7 += c1.w * b1;
                r4 += c2.x * b2;
                r5 += c2.y * b2;
                r6 += c2.z * b2;
                r7 += c2.w * b2;
                r4 += c3.x * b3;
                r5 += c3.y * b3;
                r6 += c3.z * b3;
                r7 += c3.w * b3;
            }
        }
        workgroupBarrier();
    }
    let bias_base = offset(index, params.bias_strides);
    let row = row0 + high * 4u;
    let col = col0 + low * 4u;
    store(batch, bias_base, row, col, r0);
    store(batch, bias_base, row + 1u, col, r1);
    store(batch, bias_base, row + 2u, col, r2);
    store(batch, bias_base, row + 3u, col, r3);
    if (ROW_SETS > 1u) {
        store(batch, bias_base, row + 4u * T, col, r4);
        store(batch, bias_base, row + 4u * T + 1u, col, r5);
        store(batch, bias_base, row + 4u * T + 2u, col, r6);
        store(batch, bias_base, row + 4u * T + 3u, col, r7);
    }
}
