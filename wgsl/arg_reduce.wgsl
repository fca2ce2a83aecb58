// out[o], index[o] = the largest (LARGEST) or smallest element of x[outer, :, inner] and its position; of equal ones the first. NaN beats all.
//
// Appended by the host (ops/reduce.py): alias X, Out (storage), alias T (f32 or i32), fn is_nan(v: T) -> bool, fn worst() -> T.
//
// One workgroup: 256 / LY lines, LY invocations each (a power of two), joined by a tree in workgroup memory; see reduce.wgsl for ALONG.
// Memory traffic: x once, both results once. Tried: nothing else yet.

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read_write> out: array<Out>;
@group(0) @binding(2) var<storage, read_write> index: array<i32>;

struct Params { outputs: u32, length: u32, inner: u32, inf: f32 }
@group(0) @binding(3) var<uniform> params: Params;

override LY: u32 = 256u;
override ALONG: u32 = 1u;
override LARGEST: u32 = 1u;

const WG: u32 = 256u;

var<workgroup> values: array<T, WG>;
var<workgroup> places: array<u32, WG>;

// Whether v at j takes the place of u at i.
fn better(v: T, j: u32, u: T, i: u32) -> bool {
    let v_nan = is_nan(v);
    let u_nan = is_nan(u);
    if (v_nan != u_nan) { return v_nan; }
    if (v_nan || v == u) { return j < i; }
    return (v > u) == (LARGEST == 1u);
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let columns = WG / LY;
    let column = select(lane % columns, lane / LY, ALONG == 1u);
    let row = select(lane / columns, lane % LY, ALONG == 1u);
    let o = (wid.y * groups.x + wid.x) * columns + column;
    var best = worst();
    var place = 0xffffffffu; // behind every element, so that an element equal to worst() still wins
    if (o < params.outputs) {
        let base = (o / params.inner) * params.length * params.inner + o % params.inner;
        for (var r = row; r < params.length; r += LY) {
            let v = T(x[base + r * params.inner]);
            if (better(v, r, best, place)) {
                best = v;
                place = r;
            }
        }
    }
    let mine = column * LY + row;
    values[mine] = best;
    places[mine] = place;
    workgroupBarrier();
    for (var half = LY / 2u; half > 0u; half /= 2u) {
        if (row < half && better(values[mine + half], places[mine + half], values[mine], places[mine])) {
            values[mine] = values[mine + half];
            places[mine] = places[mine + half];
        }
        workgroupBarrier();
    }
    if (row == 0u && o < params.outputs) {
        out[o] = Out(values[mine]);
        index[o] = i32(places[mine]);
    }
}
