// out[i] = low + (high - low) * u(i), u uniform in [0, 1): pseudo-random values in f32, in f16 (two a word), as integers, or words of
// packed weights: random bits, but in the exponents of both halves, so that those which are scales are 16-bit floats from 1/32 to 1/16.
//
// u is the PCG hash of M. Jarzynski and M. Olano, "Hash Functions for GPU Rendering" (JCGT 9, 2020), of seed and index.
// A workgroup writes 256 words, one an invocation. Memory traffic: out once. Versions tried: this one only.
@group(0) @binding(0) var<storage, read_write> out: array<u32>;

struct Params {
    words: u32,
    seed: u32,
    kind: u32, // 0: f32, 1: two f16 a word, 2: packed weights, 3: i32, rounded down
    low: f32,
    high: f32,
}
@group(0) @binding(1) var<uniform> params: Params;

fn hash(x: u32) -> u32 {
    let state = x * 747796405u + 2891336453u;
    let word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
    return (word >> 22u) ^ word;
}

fn bits(i: u32) -> u32 { return hash(hash(i) ^ params.seed); }

fn value(i: u32) -> f32 {
    let u = f32(bits(i) >> 8u) * (1.0 / 16777216.0);
    return params.low + (params.high - params.low) * u;
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * 256u + lane;
    if (i >= params.words) { return; }
    if (params.kind == 1u) {
        out[i] = pack2x16float(vec2<f32>(value(2u * i), value(2u * i + 1u)));
    } else if (params.kind == 2u) {
        out[i] = (bits(i) & 0x83ff83ffu) | 0x28002800u;
    } else if (params.kind == 3u) {
        out[i] = bitcast<u32>(i32(floor(value(i))));
    } else {
        out[i] = bitcast<u32>(value(i));
    }
}
