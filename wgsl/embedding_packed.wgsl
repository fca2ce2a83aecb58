// out[t, c] = value of row idx[t], column c of a table of packed weights: a lookup that dequantises only the rows it needs.
//
// One invocation: four columns of one token, unpacked from one word; 64 a workgroup. Row numbers outside 0 .. total - 1 are clamped, so that no data
// can make the kernel leave its buffers. A table in several parts takes a dispatch for each, which writes the rows that its part holds: those
// from `first` on.
//
// Memory traffic: the codes and scales of the rows asked for, once; the result once. Versions tried: this one only.
// Appended: packed_weights.wgsl or packed_weights_bf16.wgsl.

@group(0) @binding(0) var<storage, read> w: array<u32>;
@group(0) @binding(1) var<storage, read> idx: array<i32>;
@group(0) @binding(2) var<storage, read_write> out: array<Out>;

struct Params {
    count: u32, // quads in all
    quads: u32, // in a row
    columns: u32,
    row_words: u32,
    rows: i32,
    first: i32,
    total: i32,
}
@group(0) @binding(3) var<uniform> params: Params;

fn packed_word(which: u32, at: u32) -> u32 {
    return w[at];
}

fn packed_row(row: u32) -> u32 {
    return row * params.row_words;
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * 64u + lane;
    if (i >= params.count) { return; }
    let token = i / params.quads;
    let quad = i - token * params.quads;
    let row = clamp(idx[token], 0, params.total - 1) - params.first;
    if (row < 0 || row >= params.rows) { return; }
    let v = packed_values(0u, u32(row), quad, params.columns);
    let first = 4u * quad;
    let at = token * params.columns + first;
    for (var c = 0u; c < min(4u, params.columns - first); c++) {
        out[at + c] = Out(v[c]);
    }
}
