// Sorting by counting: the element that `place` others precede goes to position `place`; positions from `keep` on are dropped.
//
// x is seen as [outer, length, inner], the results as [outer, keep, inner]. Elements are in descending or ascending order, NaN counts as the
// largest, equal ones keep their order. Appended by the host (ops/order.py): alias X, Out, alias T (f32 or i32), fn is_nan(v: T) -> bool.
//
// One invocation: one element; reads its whole line (which stays in cache): length^2 comparisons, so for lines of some thousands at most
// where time matters. Memory traffic: x once from memory, results once. See topk.wgsl for few results of long lines.

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read_write> out: array<Out>;
@group(0) @binding(2) var<storage, read_write> index: array<i32>;

struct Params { count: u32, length: u32, inner: u32, keep: u32 }
@group(0) @binding(3) var<uniform> params: Params;

override WG: u32 = 64u;
override DESCENDING: u32 = 1u;

// Whether v at j stands before u at i.
fn precedes(v: T, j: u32, u: T, i: u32) -> bool {
    let v_nan = is_nan(v);
    let u_nan = is_nan(u);
    if (v_nan != u_nan) { return v_nan == (DESCENDING == 1u); }
    if (v_nan || v == u) { return j < i; }
    return (v > u) == (DESCENDING == 1u);
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * WG + lane;
    if (i >= params.count) { return; }
    let inner = i % params.inner;
    let r = (i / params.inner) % params.length;
    let outer = i / (params.inner * params.length);
    let base = outer * params.length * params.inner + inner;
    let v = T(x[i]);
    var place = 0u;
    for (var j = 0u; j < params.length; j++) {
        if (precedes(T(x[base + j * params.inner]), j, v, r)) { place += 1u; }
    }
    if (place < params.keep) {
        let at = (outer * params.keep + place) * params.inner + inner;
        out[at] = Out(v);
        index[at] = i32(r);
    }
}
