// out[m, n] = sum_k a[m, k] * b[k, n] of bytes that are stored as i32; exact, modulo 2^32 as on the host.
//
// A workgroup: 64 consecutive outputs, one an invocation. Traffic: every element of a and b is read N and M times, from the caches if they hold it.
// Versions tried: this one only. Products with constant weights do not come here: they are packed (backend/passes/quantized_activations.py).
@group(0) @binding(0) var<storage, read> a: array<i32>;
@group(0) @binding(1) var<storage, read> b: array<i32>;
@group(0) @binding(2) var<storage, read_write> out: array<i32>;

struct Params {
    n: u32,
    k: u32,
    count: u32,
}
@group(0) @binding(3) var<uniform> params: Params;

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
    let row = i / params.n * params.k;
    let column = i % params.n;
    var sum = 0;
    for (var k = 0u; k < params.k; k++) {
        sum += a[row + k] * b[k * params.n + column];
    }
    out[i] = sum;
}
