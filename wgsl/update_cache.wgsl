// New rows of a ragged batch into a cache: cache[b, past + s] = value[b, s] for s < new, where (past, new) = lengths[b].
//
// A unit is one element or four neighbours of a row, all heads of which are one run. An invocation: one unit; 64 of them a workgroup; those of
// padding leave. Memory traffic: each new row read once and written once.
// Unchecked: units are below count; rows are below given_rows, so cache rows are below the capacity.
// Versions tried: this one only.
// Appended: ragged_rows.wgsl.
@group(0) @binding(0) var<storage, read> value: array<X>;
@group(0) @binding(1) var<storage, read_write> cache: array<Cache>;

struct Params {
    count: u32,  // units of value
    rows: u32,  // positions S
    row: u32,  // units of a row
    capacity: u32,  // rows of the cache
}
@group(0) @binding(2) var<uniform> params: Params;
@group(0) @binding(3) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

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
    let number = i / params.row;
    let b = number / params.rows;
    let s = number % params.rows;
    if (s < given_rows(b)) {
        cache[(b * params.capacity + given_past(b) + s) * params.row + i % params.row] = Cache(value[i]);
    }
}
