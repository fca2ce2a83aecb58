// The `keep` largest (DESCENDING) or smallest elements of each line in order, with their positions; NaN counts as the largest, of equal ones
// the first comes first. x is seen as [outer, length, inner], the results as [outer, keep, inner].
//
// Appended by the host (ops/order.py): alias X, Out (storage), alias T (f32 or i32), fn is_nan(v: T) -> bool.
//
// One workgroup: one line. Each round finds the first element, in the order above, behind the one found last (keep * length / 256
// comparisons an invocation). Memory traffic: x `keep` times, mostly from cache. See rank.wgsl for short lines or many results.

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read_write> out: array<Out>;
@group(0) @binding(2) var<storage, read_write> index: array<i32>;

struct Params { lines: u32, length: u32, inner: u32, keep: u32 }
@group(0) @binding(3) var<uniform> params: Params;

override DESCENDING: u32 = 1u;

const WG: u32 = 256u;
const NOTHING: u32 = 0xffffffffu;

var<workgroup> values: array<T, WG>;
var<workgroup> places: array<u32, WG>;

// Whether v at j stands before u at i.
fn precedes(v: T, j: u32, u: T, i: u32) -> bool {
    let v_nan = is_nan(v);
    let u_nan = is_nan(u);
    if (v_nan != u_nan) { return v_nan == (DESCENDING == 1u); }
    if (v_nan || v == u) { return j < i; }
    return (v > u) == (DESCENDING == 1u);
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let line = wid.y * groups.x + wid.x;
    let valid = line < params.lines;
    let outer = line / params.inner;
    let inner = line % params.inner;
    let base = outer * params.length * params.inner + inner;
    var last = T(0);
    var last_place = NOTHING;
    for (var k = 0u; k < params.keep; k++) {
        var best = T(0);
        var place = NOTHING;
        if (valid) {
            for (var r = lane; r < params.length; r += WG) {
                let v = T(x[base + r * params.inner]);
                let behind = last_place == NOTHING || precedes(last, last_place, v, r);
                if (behind && (place == NOTHING || precedes(v, r, best, place))) {
                    best = v;
                    place = r;
                }
            }
        }
        values[lane] = best;
        places[lane] = place;
        workgroupBarrier();
        for (var half = WG / 2u; half > 0u; half /= 2u) {
            if (lane < half) {
                let v = values[lane + half];
                let j = places[lane + half];
                if (j != NOTHING && (places[lane] == NOTHING || precedes(v, j, values[lane], places[lane]))) {
                    values[lane] = v;
                    places[lane] = j;
                }
            }
            workgroupBarrier();
        }
        last = values[0];
        last_place = places[0];
        workgroupBarrier();
        if (lane == 0u && valid) {
            let at = (outer * params.keep + k) * params.inner + inner;
            out[at] = Out(last);
            index[at] = i32(last_place);
        }
    }
}
