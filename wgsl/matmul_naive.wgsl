// out[b, m, n] = alpha * sum_k A[b, m, k] * B[b, k, n] + beta * bias[b, m, n], one invocation per output element.
//
// A is [.., M, K]. B is [.., K, N], or [.., N, K] with B_NK. The batch of an operand is given by strides over (at most four)
// batch sizes, 0 where it is broadcast; likewise the bias. Sums are f32 in ascending k.
//
// A workgroup: 64 consecutive outputs. Traffic: every A and B element is read N and M times (from the caches, if they hold it).
// The oracle of the other kernels, and the one in use for very short K (outer products), where there is nothing to share.
@group(0) @binding(0) var<storage, read> a: array<A>;
@group(0) @binding(1) var<storage, read> b: array<B>;
@group(0) @binding(2) var<storage, read> bias: array<Bias>;
@group(0) @binding(3) var<storage, read_write> out: array<Out>;

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
    count: u32,
}
@group(0) @binding(4) var<uniform> params: Params;

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

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * 64u + lane;
    if (i >= params.count) {
        return;
    }
    let col = i % params.n;
    let row = (i / params.n) % params.m;
    let index = batch_index(i / params.n / params.m);
    let a_at = offset(index, params.a_strides) + row * params.k;
    let b_base = offset(index, params.b_strides);
    let b_at = select(b_base + col, b_base + col * params.k, B_NK);
    let b_step = select(params.n, 1u, B_NK);
    var sum = 0.0;
    for (var k = 0u; k < params.k; k++) {
        sum += f32(a[a_at + k]) * f32(b[b_at + k * b_step]);
    }
    sum *= params.alpha;
    if (BIAS) {
        let at = offset(index, params.bias_strides) + row * params.bias_row + col * params.bias_col;
        sum += params.beta * f32(bias[at]);
    }
    out[i] = Out(sum);
}
