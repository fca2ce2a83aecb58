// out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]: SwiGLU, the gated activation of LLaMA-like feed-forward layers; f32 inside.
//
// An invocation makes one element of F (f32, or vec4<f32> where the count is a multiple of four and Gate, Up and Out are vec4 too);
// a workgroup 256 of them. Traffic: each operand once.
@group(0) @binding(0) var<storage, read> gate: array<Gate>;
@group(0) @binding(1) var<storage, read> up: array<Up>;
@group(0) @binding(2) var<storage, read_write> out: array<Out>;

struct Params {
    count: u32,  // in F
}
@group(0) @binding(3) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * 256u + lane;
    if (i >= params.count) {
        return;
    }
    let g = F(gate[i]);
    out[i] = Out(g / (1.0 + exp(-g)) * F(up[i]));
}
