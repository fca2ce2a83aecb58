// out[b, :] = x[b, n - 1, :] with n = q_len[b] clamped to 1 .. S: the last real row of each batch row padded on the right.
//
// One invocation copies one element of the result; a workgroup 64 of them, neighbours in a row. Whatever q_len holds, no row outside of
// x[b] is read.
// Traffic: B * K elements in and out, however many rows S there are.
// Versions tried: this one only. (As ATen operators it is seven dispatches: cast, subtraction, clamp, row numbers, an offset for each of
// two index tensors, and the copy.)
@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read> q_len: array<i32>;
@group(0) @binding(2) var<storage, read_write> out: array<Out>;

struct Params {
    count: u32,  // elements of out
    rows: u32,  // S
    size: u32,  // K
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
    let batch = i / params.size;
    let last = u32(clamp(q_len[batch], 1, i32(params.rows)) - 1);
    out[i] = Out(x[(batch * params.rows + last) * params.size + i % params.size]);
}
