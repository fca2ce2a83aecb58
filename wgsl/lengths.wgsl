// What each batch row has in the cache and gets in this step, once a step for all layers:
//
//   out[b] = (past, new, 0, 0),  past = clamp(past[b], 0, capacity),  new = clamp(q_len[b], 0, min(rows, capacity - past))
//
// so that no number, whoever made it, leads a kernel out of the cache. Without GIVEN every row has `rows` new tokens.
//
// An invocation: one batch row; 64 of them a workgroup. Memory traffic: 8 bytes read, 16 written a batch row. Versions tried: this one only.
@group(0) @binding(0) var<storage, read> past: array<i32>;
@group(0) @binding(1) var<storage, read> q_len: array<i32>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<i32>>;

struct Params {
    count: u32,
    rows: i32,
    capacity: i32,
}
@group(0) @binding(3) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let b = id.x;
    if (b >= params.count) {
        return;
    }
    let before = clamp(past[b], 0, params.capacity);
    var fresh = params.rows;
    if (GIVEN) {
        fresh = q_len[b];
    }
    out[b] = vec4<i32>(before, clamp(fresh, 0, min(params.rows, params.capacity - before)), 0, 0);
}
