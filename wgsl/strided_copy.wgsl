// out[o(c)] = x[a(c)] for every coordinate c of a box of up to 8 axes:
//   a(c) = x_offset + x_scale * x_live + sum_k c[k] * x_strides[k], o(c) likewise.
// Strides may be 0 (broadcast) or negative (flip). One kernel serves permute, slice, select, cat, stack, split, expand, repeat, flip,
// roll, casts in copies and cache writes; the host merges adjacent axes first, so a contiguous copy has rank 1.
//
// x_live and out_live are live scalars (a slice's start, a cache position); x_wrap is added to a negative one. A source that would
// start past x_max is clamped (it only reads), a destination outside 0..out_max is not written at all: a position past a cache's
// capacity damages nothing, whoever advanced it.
//
// One workgroup moves 64 elements: of 4 bytes, or of 16 where the host found runs of four on both sides (X and Out are then vec4
// types). Memory traffic: every element is read once and written once.
// The rank is a constant so that compilers can unroll the loop. Versions tried: this one only.
@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read_write> out: array<Out>;

struct Params {
    count: u32,
    x_offset: i32,
    x_slot: u32,
    x_scale: i32,
    x_wrap: i32,
    x_max: i32,
    out_offset: i32,
    out_slot: u32,
    out_scale: i32,
    out_wrap: i32,
    out_max: i32,
    sizes: array<vec4<u32>, 2>,
    x_strides: array<vec4<i32>, 2>,
    out_strides: array<vec4<i32>, 2>,
}
@group(0) @binding(2) var<uniform> params: Params;
@group(0) @binding(3) var<uniform> live: array<vec4<i32>, 16>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * 64u + lane;
    if (i >= params.count) { return; }
    var origin = params.x_offset;
    if (params.x_scale != 0) {
        let start = live_value(params.x_slot);
        origin += params.x_scale * clamp(select(start, start + params.x_wrap, start < 0), 0, params.x_max);
    }
    var place = params.out_offset;
    if (params.out_scale != 0) {
        let start = live_value(params.out_slot);
        let wrapped = select(start, start + params.out_wrap, start < 0);
        if (wrapped < 0 || wrapped > params.out_max) { return; }
        place += params.out_scale * wrapped;
    }
    var rest = i;
    for (var k = RANK; k > 1u; k--) {
        let axis = k - 1u;
        let size = params.sizes[axis >> 2u][axis & 3u];
        let next = rest / size;
        let c = i32(rest - next * size);
        origin += c * params.x_strides[axis >> 2u][axis & 3u];
        place += c * params.out_strides[axis >> 2u][axis & 3u];
        rest = next;
    }
    if (RANK > 0u) {
        origin += i32(rest) * params.x_strides[0].x;
        place += i32(rest) * params.out_strides[0].x;
    }
    out[place] = convert(x[origin]);
}
