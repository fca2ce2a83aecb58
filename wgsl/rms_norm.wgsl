// out[r, i] = x[r, i] / sqrt(mean_i(x[r, i]^2) + eps) * weight[i]: RMSNorm over rows of `size` elements, f32 inside.
//
// A workgroup takes WG / LANES rows: LANES invocations share a row, so that short rows (a norm per attention head) fill a
// workgroup and long ones (a hidden state while decoding) use all of it. Sums of squares meet in a tree in workgroup memory.
// Traffic: x once from memory and once more from the cache, weight once per workgroup, out once. WEIGHT: there is a weight.
//
// F is f32, or vec4<f32> where the row is a multiple of four and X, W and Out are vec4 too. SPLAT makes the sum of squares right for
// both: `vec4<f32>(v)` repeats a scalar four times (SPLAT = 0.5: 4 * (v/2)^2, exact) and leaves a vector as it is (SPLAT = 1).
@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read> weight: array<W>;
@group(0) @binding(2) var<storage, read_write> out: array<Out>;

struct Params {
    rows: u32,
    size: u32,  // of a row, in X
    elements: f32,  // of a row
    eps: f32,
}
@group(0) @binding(3) var<uniform> params: Params;

var<workgroup> partial: array<f32, WG>;

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let slot = lane % LANES;
    let row = (wid.y * groups.x + wid.x) * (WG / LANES) + lane / LANES;
    let base = min(row, params.rows - 1u) * params.size;  // rows past the end compute along and store nothing
    var sum = 0.0;
    for (var i = slot; i < params.size; i += LANES) {
        let v = vec4<f32>(F(x[base + i])) * SPLAT;
        sum += dot(v, v);
    }
    partial[lane] = sum;
    workgroupBarrier();
    for (var step = LANES / 2u; step > 0u; step >>= 1u) {
        if (slot < step) {
            partial[lane] += partial[lane + step];
        }
        workgroupBarrier();
    }
    let scale = 1.0 / sqrt(partial[lane - slot] / params.elements + params.eps);
    if (row >= params.rows) {
        return;
    }
    for (var i = slot; i < params.size; i += LANES) {
        var v = F(x[base + i]) * scale;
        if (WEIGHT) {
            v *= F(weight[i]);
        }
        out[base + i] = Out(v);
    }
}
