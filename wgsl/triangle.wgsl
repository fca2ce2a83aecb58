// out[.., r, c] = x[.., r, c] where c - r <= diagonal (LOWER) or c - r >= diagonal, else 0: tril and triu.
//
// Appended by the host (ops/fill.py): aliases X and Out (storage types). One workgroup: WG consecutive elements.
// Memory traffic: x once, out once. Tried: nothing else yet.

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read_write> out: array<Out>;

struct Params { count: u32, rows: u32, columns: u32, diagonal: u32 }
@group(0) @binding(2) var<uniform> params: Params;
@group(0) @binding(3) var<uniform> live: array<vec4<i32>, 16>;

override WG: u32 = 64u;
override LIVE: u32 = 0u; // params.diagonal is the slot of a live scalar
override LOWER: u32 = 1u;

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * WG + lane;
    if (i >= params.count) { return; }
    var diagonal = bitcast<i32>(params.diagonal);
    if (LIVE == 1u) { diagonal = live_value(params.diagonal); }
    let distance = i32(i % params.columns) - i32((i / params.columns) % params.rows);
    let kept = select(distance >= diagonal, distance <= diagonal, LOWER == 1u);
    out[i] = select(Out(0), Out(x[i]), kept);
}
