// Quantised tensors element by element, for tensors of up to four axes that are cut into equal blocks, each with a scale and a zero:
//   dequantize:             out[i] = (code(i) - zero[b]) * scale[b]
//   QUANTIZE:               out[i] = clamp(round(x[i] * (1 / scale[b])) + zero[b], low, high), ties to even
// b is the block that element i lies in. BITS < 8: an element of x holds 8 / BITS codes along the last axis, the first in its low bits (LOW_FIRST) or
// in its high bits, from which `offset` is taken off. GATHER: the first axis of x is looked up: row idx[c0], clamped to the rows there are.
//
// One invocation an element, 64 a workgroup. Memory traffic: every element read and written once; scales and zeros from the caches.
// Versions tried: this one only; it serves what no pass fuses.

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read> scale: array<Scale>;
@group(0) @binding(2) var<storage, read> zero: array<Zero>;
@group(0) @binding(3) var<storage, read> idx: array<i32>;
@group(0) @binding(4) var<storage, read_write> out: array<Out>;

struct Params {
    sizes: vec4<u32>, // of out; axes in front are 1
    blocks: vec4<u32>, // sizes of a block
    steps: vec4<u32>, // elements of scale and zero per block of each axis
    count: u32,
    rows: i32, // of x, where GATHER
    low: f32,
    high: f32,
    offset: f32,
}
@group(0) @binding(5) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * 64u + lane;
    if (i >= params.count) { return; }
    let s = params.sizes;
    let yzw = i / s.w;
    var c = vec4<u32>(yzw / s.z / s.y, yzw / s.z % s.y, yzw % s.z, i % s.w);
    if (GATHER) {
        c.z = u32(clamp(idx[c.z], 0, params.rows - 1));
    }
    let b = c / params.blocks * params.steps;
    let block = b.x + b.y + b.z + b.w;
    let factor = f32(scale[block]);
    var shift = 0.0;
    if (ZERO) {
        shift = f32(zero[block]);
    }
    let at = ((c.x * s.y + c.y) * s.z + c.z) * s.w + c.w;
    if (QUANTIZE) {
        out[i] = Out(clamp(round(f32(x[at]) * (1.0 / factor)) + shift, params.low, params.high));
        return;
    }
    var code = f32(x[at / (8u / BITS)]);
    if (BITS < 8u) {
        let place = at % (8u / BITS);
        let bits = BITS * select(8u / BITS - 1u - place, place, LOW_FIRST);
        code = f32((u32(x[at / (8u / BITS)]) >> bits) & ((1u << BITS) - 1u)) - params.offset;
    }
    out[i] = Out((code - shift) * factor);
}
