// out[i] = low + (high - low) * u(i), u uniform in [0, 1): pseudo-random values in f32 or, two a word, in f16.
//
// u is the PCG hash of M. Jarzynski and M. Olano, "Hash Functions for GPU Rendering" (JCGT 9, 2020), of seed and index.
// An invocation writes one 32-bit word. Traffic: out once.
@group(0) @binding(0) var<storage, read_write> out: array<u32>;

struct Params {
    words: u32,
    seed: u32,
    half: u32,  // 1: two f16 a word
    low: f32,
    high: f32,
}
@group(0) @binding(1) var<uniform> params: Params;

fn hash(x: u32) -> u32 {
    let state = x * 747796405u + 2891336453u;
    let word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
    return (word >> 22u) ^ word;
}

fn value(i: u32) -> f32 {
    let u = f32(hash(hash(i) ^ params.seed) >> 8u) * (1.0 / 16777216.0);
    return params.low + (params.high - params.low) * u;
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * 256u + lane;
    if (i >= params.words) {
        return;
    }
    if (params.half == 1u) {
        out[i] = pack2x16float(vec2<f32>(value(2u * i), value(2u * i + 1u)));
    } else {
        out[i] = bitcast<u32>(value(i));
    }
}
