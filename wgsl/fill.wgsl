// out[i] = finish(value(i)): constants, ranges and identity matrices.
//
// Appended by the host for each operator (ops/fill.py): alias Out (storage), alias R (f32 or i32), fn value(i: u32) -> R (may call start()
// and step()), fn finish(v: R) -> Out.
//
// One workgroup: WG consecutive elements. Memory traffic: out once. Tried: nothing else yet.

@group(0) @binding(0) var<storage, read_write> out: array<Out>;

struct Params { count: u32, start: u32, step: u32, columns: u32 }
@group(0) @binding(1) var<uniform> params: Params;
@group(0) @binding(2) var<uniform> live: array<vec4<i32>, 16>;

override WG: u32 = 64u;
override LIVE: u32 = 0u; // params.start is the slot of a live scalar, not the bits of a number

fn start() -> R {
    if (LIVE == 1u) { return R(live_value(params.start)); }
    return bitcast<R>(params.start);
}
fn step() -> R { return bitcast<R>(params.step); }

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * WG + lane;
    if (i < params.count) { out[i] = finish(value(i)); }
}
