// out[t, c] = weight[idx[t] - first, c] for every t whose row lies in first .. first + rows - 1; other rows of out are left alone.
//
// One part of a table that is too large for one binding: the host makes a dispatch for each part, and together they write all of out.
// Row numbers outside 0 .. total - 1 are clamped, so that whatever the GPU computed leaves no row unwritten.
//
// W and Out are vec4 types where rows have a length divisible by four. One workgroup: 64 elements of out, one per invocation.
// Memory traffic: rows that the part holds are read and written once; the index of a row is read by all its lanes (one cache line), and
// by the dispatches of all parts. Versions tried: this one only.
@group(0) @binding(0) var<storage, read> weight: array<W>;
@group(0) @binding(1) var<storage, read> idx: array<i32>;
@group(0) @binding(2) var<storage, read_write> out: array<Out>;

struct Params {
    count: u32,
    width: u32,
    first: i32,
    rows: i32,
    total: i32,
}
@group(0) @binding(3) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * 64u + lane;
    if (i >= params.count) { return; }
    let token = i / params.width;
    let row = clamp(idx[token], 0, params.total - 1) - params.first;
    if (row < 0 || row >= params.rows) { return; }
    out[i] = Out(weight[u32(row) * params.width + (i - token * params.width)]);
}
