// Rotary position embedding of x [.., D] by a table of cosines and sines: the pair (u, v) of x becomes
//     (u * cos_u - v * sin_u, v * cos_v + u * sin_v).
// INTERLEAVED: pairs (2i, 2i + 1), else (i, i + rot / 2). The table has `width` columns: rot / 2, and then both halves of a pair use
// column i; or rot, and then each half uses the column of its own place. Elements from rot on are copied.
// The table row of position s is start + s; start is a live scalar, so that no plan depends on the position. RAGGED: it is past + s with
// (past, new) = lengths[b], and positions from new on are padding, whose result is zero.
//
// An invocation makes one pair or copies one element; neighbours make neighbouring pairs. A workgroup: 64 of them.
// Traffic: x and out once; the table row is read by every head, from the cache. f32 inside.
@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read> cosines: array<Cos>;
@group(0) @binding(2) var<storage, read> sines: array<Sin>;
@group(0) @binding(3) var<storage, read_write> out: array<Out>;

struct Params {
    count: u32,  // invocations: vectors * (size - rot / 2)
    size: u32,  // D
    rot: u32,
    width: u32,  // of a table row
    rows: u32,  // of the table
    positions: u32,  // S
    repeat: u32,  // vectors in a row that have the same position: H for [B, S, H, D], 1 for [B, H, S, D]
    start: u32,  // slot
    vectors: u32,  // of a batch row: H * S
}
@group(0) @binding(4) var<uniform> params: Params;
@group(0) @binding(5) var<uniform> live: array<vec4<i32>, 16>;
@group(0) @binding(6) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

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
    let half = params.rot / 2u;
    let per_vector = params.size - half;
    let vector = i / per_vector;
    let item = i % per_vector;
    let base = vector * params.size;
    let position = (vector / params.repeat) % params.positions;
    var start = live_value(params.start);
    var padding = false;
    if (RAGGED) {
        let own = lengths[vector / params.vectors];
        start = own.x;
        padding = i32(position) >= own.y;
    }
    if (item >= half) {
        let at = base + half + item;
        if (padding) {
            out[at] = Out();
            return;
        }
        out[at] = Out(x[at]);
        return;
    }
    let row = min(u32(max(start, 0)) + position, params.rows - 1u) * params.width;
    let first = select(item, 2u * item, INTERLEAVED);
    let second = select(item + half, first + 1u, INTERLEAVED);
    if (padding) {
        out[base + first] = Out();
        out[base + second] = Out();
        return;
    }
    let own = params.width == params.rot;
    let row_u = row + select(item, first, own);
    let row_v = row + select(item, second, own);
    let u = f32(x[base + first]);
    let v = f32(x[base + second]);
    out[base + first] = Out(u * f32(cosines[row_u]) - v * f32(sines[row_u]));
    out[base + second] = Out(v * f32(cosines[row_v]) + u * f32(sines[row_v]));
}
