// Floats [rows, K] from rows of integers of 8 bits with a scale (ops/activations.py has the layout), for products that do not take those:
//   out = scale * (code - zero of its block)
//
// One invocation: four columns. Traffic: a row's words once, the result once. Versions tried: this one only.

@group(0) @binding(0) var<storage, read> codes: array<u32>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;

struct Params {
    count: u32, // vectors of the result
    quads: u32, // of a row
    blocks: u32,
    words: u32, // of a row of codes
}
@group(0) @binding(2) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * 64u + lane;
    if (i >= params.count) {
        return;
    }
    let row = i / params.quads;
    let quad = i - row * params.quads;
    let start = row * params.words;
    let word = bitcast<i32>(codes[start + quad]);
    let zero = bitcast<i32>(codes[start + 8u * params.blocks + quad / 8u]);
    let found = vec4<i32>(word << 24u, word << 16u, word << 8u, word) >> vec4<u32>(24u);
    out[i] = bitcast<f32>(codes[start + params.words - 4u]) * vec4<f32>(found - vec4<i32>(zero));
}
