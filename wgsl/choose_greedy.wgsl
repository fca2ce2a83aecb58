// Last step of a greedy choice (runtime/decoding/chooser.py): the largest key of all chunks (choose_argmax.wgsl), the lowest id among equals, and
// what follows from it (choose_outputs.wgsl).
//
// Appended by the host: choose_keys.wgsl, choose_outputs.wgsl.
//
// One workgroup: one row. Memory traffic: 8 bytes for each 1,024 tokens. Tried: nothing else yet.

@group(0) @binding(0) var<storage, read> work: array<u32>;
@group(0) @binding(1) var<storage, read_write> state: array<u32>;
@group(0) @binding(2) var<storage, read_write> ring: array<i32>;
@group(0) @binding(3) var<storage, read_write> outer0: array<i32>;
@group(0) @binding(4) var<storage, read_write> outer1: array<i32>;
@group(0) @binding(5) var<storage, read_write> outer2: array<i32>;
@group(0) @binding(6) var<storage, read_write> outer3: array<i32>;

struct Params {
    vocabulary: u32, chunks: u32, rows: u32, capacity: u32, work_stride: u32,
    target_count: u32, advance_count: u32, // used entries of `targets` and `advances`
    lengths: vec4<u32>, // of rows with their own: (buffer of past, buffer of q_len, capacity, 1); else zeros
    targets: vec4<u32>, // (buffer, word) twice
    advances: array<vec4<i32>, 32>, // (buffer, word, delta, 0)
}
@group(0) @binding(7) var<uniform> params: Params;

const WG: u32 = 256u;

var<workgroup> best: array<u32, WG>;
var<workgroup> places: array<u32, WG>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = wid.x;
    let base = row * params.work_stride;
    var key = 0u;
    var place = 0xffffffffu;
    for (var chunk = lane; chunk < params.chunks; chunk += WG) {
        let mine = work[base + chunk * 2u];
        if (mine > key) {
            key = mine;
            place = work[base + chunk * 2u + 1u];
        }
    }
    best[lane] = key;
    places[lane] = place;
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            let other = best[lane + half];
            let where_other = places[lane + half];
            if (other > best[lane] || (other == best[lane] && where_other < places[lane])) {
                best[lane] = other;
                places[lane] = where_other;
            }
        }
        workgroupBarrier();
    }
    finish(lane, row, places[0], best[0]);
}
