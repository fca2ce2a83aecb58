// Quantisation of every row of x [rows, K] by its own range, least = min(0, min_k x) and most = max(0, max_k x), which quantize_range.wgsl makes a
// scale s and a zero point z of: either s and z themselves, or (FAKE) what is left after quantising and dequantising:
// (clamp(round(x * (1 / s)) + z, low, high) - z) * s.
//
// One workgroup a row: 256 invocations find the range in workgroup memory, then go over the row again.
// Memory traffic: x twice, the second time from the caches; the result once. Versions tried: this one only.
// Appended: quantize_range.wgsl, quotient.wgsl.

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read_write> scale: array<Scale>;
@group(0) @binding(2) var<storage, read_write> zero: array<i32>;
@group(0) @binding(3) var<storage, read_write> out: array<Out>;

struct Params {
    rows: u32,
    k: u32,
    low: f32,
    high: f32,
    eps: f32,
}
@group(0) @binding(4) var<uniform> params: Params;

var<workgroup> ends: array<vec2<f32>, 256>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = wid.y * groups.x + wid.x;
    if (row >= params.rows) {
        return;
    }
    let start = row * params.k;
    var range = vec2<f32>();
    for (var i = lane; i < params.k; i += 256u) {
        let v = f32(x[start + i]);
        range = vec2<f32>(min(range.x, v), max(range.y, v));
    }
    ends[lane] = range;
    for (var step = 128u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (lane < step) {
            let other = ends[lane + step];
            ends[lane] = vec2<f32>(min(ends[lane].x, other.x), max(ends[lane].y, other.y));
        }
    }
    workgroupBarrier();
    range = ends[0];
    let span = vec3<f32>(params.low, params.high, params.eps);
    let s = range_scale(range.x, range.y, span);
    let z = range_zero(range.x, s, span);
    if (!FAKE) {
        if (lane == 0u) {
            scale[row] = Scale(s);
            zero[row] = i32(z);
        }
        return;
    }
    let inverse = quotient(1.0, s);
    for (var i = lane; i < params.k; i += 256u) {
        out[start + i] = Out((range_codes(vec4<f32>(f32(x[start + i])), inverse, z, span).x - z) * s);
    }
}
