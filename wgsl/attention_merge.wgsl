// The second half of split attention: combines the partial results of `attention_decode`.
//
//   out[row, :] = sum_i exp(top_i - top) partial[row, i, :] / sum_i exp(top_i - top) sum_i,  top = max_i top_i
//
// over the splits that have keys (as many as the live length makes; what stands in the others is not read), with the head's sink as one
// more term of the sum. One workgroup: one row (batch row, query row, head). Its 64 lanes load the splits' tops and sums side by side, then lane
// (sub, column) sums every SUBS-th split of one vec4 column, so the loads do not wait for one another; wide heads take several rounds.
//
// Memory traffic: splits * (DV + 2) * 4 bytes read, DV elements written a row. At most 64 splits. Versions tried: this one only.
// Appended: attention_rules.wgsl.

@group(0) @binding(0) var<storage, read> partial: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> ml: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read> sink: array<Sink>;
@group(0) @binding(3) var<storage, read_write> out: array<Out>;

struct Params {
    start_pos: u32,
    heads: u32,
    rows: u32,
    capacity: u32,
    limit: u32,
    window: u32,
    o_b: u32, o_s: u32, o_h: u32,
    sinks: u32,
    total: u32,
    splits: u32,
}
@group(0) @binding(4) var<uniform> params: Params;
@group(0) @binding(5) var<uniform> live: array<vec4<i32>, 16>;

const LOWEST: f32 = -3.4028234663852886e38;
const LANES = 64u;
const DV4 = (DV + 3u) / 4u;

var<workgroup> tops: array<f32, LANES>;
var<workgroup> sums: array<f32, LANES>;
var<workgroup> shares: array<vec4<f32>, LANES>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let flat = wid.y * groups.x + wid.x; // (b * heads + h) * rows + s
    if (flat >= params.total) {
        return;
    }
    let s = flat % params.rows;
    let h = (flat / params.rows) % params.heads;
    let b = flat / params.rows / params.heads;
    let used = used_splits(b);

    var top = LOWEST;
    var own = 0.0;
    if (lane < used) {
        let entry = ml[flat * params.splits + lane];
        top = entry.x;
        own = entry.y;
    }
    tops[lane] = top;
    workgroupBarrier();
    for (var i = 0u; i < used; i++) {
        top = max(top, tops[i]);
    }
    var extra = 0.0;
    if (params.sinks != 0u) {
        let logit = f32(sink[h]);
        if (bitcast<u32>(logit) != 0xff800000u) {
            top = max(top, logit);
            extra = exp(logit - top);
        }
    }
    let factor = exp(tops[lane] - top); // of this lane's split
    workgroupBarrier();
    tops[lane] = factor;
    sums[lane] = select(0.0, own * factor, lane < used);
    workgroupBarrier();
    var sum = extra;
    for (var i = 0u; i < used; i++) {
        sum += sums[i];
    }
    let norm = select(1.0 / sum, 0.0, sum == 0.0);

    let sub = lane / COLUMNS;
    for (var c0 = 0u; c0 < DV4; c0 += COLUMNS) {
        let c = c0 + lane % COLUMNS;
        var share = vec4<f32>();
        if (sub < SUBS && c < DV4) {
            for (var i = sub; i < used; i += SUBS) {
                share += tops[i] * partial[(flat * params.splits + i) * DV4 + c];
            }
        }
        shares[lane] = share;
        workgroupBarrier();
        if (sub == 0u && c < DV4) {
            for (var k = 1u; k < SUBS; k++) {
                share += shares[k * COLUMNS + lane];
            }
            share *= norm;
            let at = b * params.o_b + s * params.o_s + h * params.o_h + 4u * c;
            out[at] = Out(share.x);
            if (4u * c + 1u < DV) { out[at + 1u] = Out(share.y); }
            if (4u * c + 2u < DV) { out[at + 2u] = Out(share.z); }
            if (4u * c + 3u < DV) { out[at + 3u] = Out(share.w); }
        }
        workgroupBarrier();
    }
}
