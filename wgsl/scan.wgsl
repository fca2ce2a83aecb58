// out[outer, r, inner] = sum of x[outer, 0..=r, inner]: cumulative sums.
//
// Appended by the host (ops/reduce.py): alias X, Out (storage), alias S, R (f32 or i32), fn finish(v: R) -> Out.
//
// One workgroup: one line, 256 elements at a time, summed by doubling distances (a tree, so errors grow with the logarithm), plus the carry
// of the chunks before. Memory traffic: x once, out once. Tried: nothing else yet.

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read_write> out: array<Out>;

struct Params { lines: u32, length: u32, inner: u32 }
@group(0) @binding(2) var<uniform> params: Params;

const WG: u32 = 256u;

var<workgroup> sums: array<S, WG>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let line = wid.y * groups.x + wid.x;
    let valid = line < params.lines;
    let base = (line / params.inner) * params.length * params.inner + line % params.inner;
    var carry = S(0);
    for (var start = 0u; start < params.length; start += WG) {
        let r = start + lane;
        let inside = valid && r < params.length;
        var v = S(0);
        if (inside) { v = S(x[base + r * params.inner]); }
        sums[lane] = v;
        workgroupBarrier();
        for (var distance = 1u; distance < WG; distance *= 2u) {
            if (lane >= distance) { v += sums[lane - distance]; }
            workgroupBarrier();
            sums[lane] = v;
            workgroupBarrier();
        }
        if (inside) { out[base + r * params.inner] = finish(carry + v); }
        carry += sums[WG - 1u];
        workgroupBarrier();
    }
}
