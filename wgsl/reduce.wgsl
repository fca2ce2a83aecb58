// out[o] = finish(post(combine over r of map(x[kept(o) + reduced(r)], o))): sums, products, extrema, any, all, means, norms, variances.
//
// Appended by the host for each operator (ops/reduce.py):
//   alias X, Out    storage types
//   alias S, R      type of the running value and of the result: f32 or i32
//   fn identity() -> S, fn combine(u: S, v: S) -> S, fn map(v: X, o: u32) -> S, fn post(v: S) -> R, fn finish(v: R) -> Out
//
// One workgroup: 256 / LY outputs, LY invocations each (a power of two). Each adds up every LY-th element, in blocks of 32 so that rounding
// errors grow with the square root of the length at most; a tree in workgroup memory joins the LY partial results. ALONG says that
// neighbouring invocations walk along the reduction (last dimension), else across the outputs: memory is read coalesced both ways.
// Memory traffic: x once, out once. Tried: nothing else yet (splitting one very long row over workgroups is the next candidate).

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read> center: array<f32>; // means, for variances
@group(0) @binding(2) var<storage, read_write> out: array<Out>;

struct Params {
    outputs: u32,
    length: u32,
    inf: f32,
    divisor: f32,
    kept: array<vec4<u32>, 2>,
    kept_strides: array<vec4<u32>, 2>,
    reduced: array<vec4<u32>, 2>,
    reduced_strides: array<vec4<u32>, 2>,
}
@group(0) @binding(3) var<uniform> params: Params;

override LY: u32 = 256u;
override ALONG: u32 = 1u;
override KEPT_RANK: u32 = 1u;
override REDUCED_RANK: u32 = 1u;

const WG: u32 = 256u;
const BLOCK: u32 = 32u;

var<workgroup> partial: array<S, WG>;

fn is_nan(v: f32) -> bool { return (bitcast<u32>(v) & 0x7fffffffu) > 0x7f800000u; }
fn maximum(u: f32, v: f32) -> f32 { return select(select(v, u, u > v), u, is_nan(u)); }
fn minimum(u: f32, v: f32) -> f32 { return select(select(v, u, u < v), u, is_nan(u)); }

fn component(v: array<vec4<u32>, 2>, d: u32) -> u32 {
    let half = select(v[0], v[1], d > 3u);
    return half[d & 3u];
}

fn kept_offset(o: u32) -> u32 {
    var rest = o;
    var at = 0u;
    for (var d = KEPT_RANK; d > 0u; d--) {
        let size = component(params.kept, d - 1u);
        at += (rest % size) * component(params.kept_strides, d - 1u);
        rest /= size;
    }
    return at;
}

fn reduced_offset(r: u32) -> u32 {
    if (REDUCED_RANK == 1u) { return r * params.reduced_strides[0].x; }
    var rest = r;
    var at = 0u;
    for (var d = REDUCED_RANK; d > 0u; d--) {
        let size = component(params.reduced, d - 1u);
        at += (rest % size) * component(params.reduced_strides, d - 1u);
        rest /= size;
    }
    return at;
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
    var total = identity();
    if (o < params.outputs) {
        let base = kept_offset(o);
        var block = identity();
        var filled = 0u;
        for (var r = row; r < params.length; r += LY) {
            block = combine(block, map(x[base + reduced_offset(r)], o));
            filled += 1u;
            if (filled == BLOCK) {
                total = combine(total, block);
                block = identity();
                filled = 0u;
            }
        }
        total = combine(total, block);
    }
    let mine = column * LY + row;
    partial[mine] = total;
    workgroupBarrier();
    for (var half = LY / 2u; half > 0u; half /= 2u) {
        if (row < half) { partial[mine] = combine(partial[mine], partial[mine + half]); }
        workgroupBarrier();
    }
    if (row == 0u && o < params.outputs) { out[o] = finish(post(partial[mine])); }
}
