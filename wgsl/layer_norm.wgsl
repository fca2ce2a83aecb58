// out[r, i] = (x[r, i] - mean) * rstd * weight[i] + bias[i] over rows of `size` elements, and the row's mean and
// rstd = 1 / sqrt(variance + eps); variance = mean_i((x[r, i] - mean)^2), a second pass, so that a large mean costs no digits.
// CENTER false: the mean is taken as 0, which gives RMSNorm with its rstd. f32 inside.
//
// A workgroup takes WG / LANES rows, LANES invocations share a row; sums meet in a tree in workgroup memory.
// Traffic: x once from memory and twice more from the cache, out once. WEIGHT, BIAS: whether there are any.
//
// F is f32, or vec4<f32> where the row is a multiple of four and X, W, B and Out are vec4 too. SPLAT: see rms_norm.wgsl (0.5 or 1).
@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read> weight: array<W>;
@group(0) @binding(2) var<storage, read> bias: array<B>;
@group(0) @binding(3) var<storage, read_write> out: array<Out>;
@group(0) @binding(4) var<storage, read_write> mean_out: array<Mean>;
@group(0) @binding(5) var<storage, read_write> rstd_out: array<Rstd>;

struct Params {
    rows: u32,
    size: u32,  // of a row, in X
    elements: f32,  // of a row
    eps: f32,
}
@group(0) @binding(6) var<uniform> params: Params;

var<workgroup> partial: array<f32, WG>;

// The sum of `value` over the invocations of a row.
fn row_sum(value: f32, lane: u32) -> f32 {
    let slot = lane % LANES;
    workgroupBarrier();
    partial[lane] = value;
    workgroupBarrier();
    for (var step = LANES / 2u; step > 0u; step >>= 1u) {
        if (slot < step) {
            partial[lane] += partial[lane + step];
        }
        workgroupBarrier();
    }
    return partial[lane - slot];
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let slot = lane % LANES;
    let row = (wid.y * groups.x + wid.x) * (WG / LANES) + lane / LANES;
    let base = min(row, params.rows - 1u) * params.size;  // rows past the end compute along and store nothing
    var mean = 0.0;
    if (CENTER) {
        var sum = 0.0;
        for (var i = slot; i < params.size; i += LANES) {
            sum += dot(vec4<f32>(F(x[base + i])), vec4<f32>(SPLAT * SPLAT));
        }
        mean = row_sum(sum, lane) / params.elements;
    }
    var squares = 0.0;
    for (var i = slot; i < params.size; i += LANES) {
        let v = vec4<f32>(F(x[base + i]) - mean) * SPLAT;
        squares += dot(v, v);
    }
    let rstd = 1.0 / sqrt(row_sum(squares, lane) / params.elements + params.eps);
    if (row >= params.rows) {
        return;
    }
    for (var i = slot; i < params.size; i += LANES) {
        var v = (F(x[base + i]) - mean) * rstd;
        if (WEIGHT) {
            v *= F(weight[i]);
        }
        if (BIAS) {
            v += F(bias[i]);
        }
        out[base + i] = Out(v);
    }
    if (slot == 0u) {
        mean_out[row] = Mean(mean);
        rstd_out[row] = Rstd(rstd);
    }
}
