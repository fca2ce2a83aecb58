// The second half of `gemm` where K is split: out[m, n] = alpha * sum_s partial[s, m, n] + beta * bias[m, n] + residual[m, n].
//
// One invocation: four columns of a row. Splits are added in their order, so results do not depend on timing.
// Traffic: splits * M * N * 4 bytes read, M * N elements written. Versions tried: this one only.
// Unchecked: i is below the number of vectors of the result; partial has `splits` times as many.

@group(0) @binding(0) var<storage, read> partial: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> bias: array<Bias>;
@group(0) @binding(2) var<storage, read> residual: array<Residual>;
@group(0) @binding(3) var<storage, read_write> out: array<Out>;

struct Params {
    count: u32, // vectors of the result
    quads: u32, // of a row
    splits: u32,
    bias_row: u32,
    bias_col: u32,
    alpha: f32,
    beta: f32,
}
@group(0) @binding(4) var<uniform> params: Params;

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
    var y = partial[i];
    for (var s = 1u; s < params.splits; s++) {
        y += partial[s * params.count + i];
    }
    y *= params.alpha;
    if (BIAS) {
        let row = i / params.quads;
        let col = (i - row * params.quads) * 4u;
        let at = row * params.bias_row + col * params.bias_col;
        y += params.beta * vec4<f32>(
            f32(bias[at]),
            f32(bias[at + params.bias_col]),
            f32(bias[at + 2u * params.bias_col]),
            f32(bias[at + 3u * params.bias_col]),
        );
    }
    if (RESIDUAL) {
        y += vec4<f32>(residual[i]);
    }
    out[i] = Out(y);
}
