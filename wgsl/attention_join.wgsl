// The second half of split attention for devices whose subgroups have at least 32 lanes: what `attention_merge` does, without a barrier.
//
//   out[row, :] = sum_i exp(top_i - top) partial[row, i, :] / sum_i exp(top_i - top) sum_i,  top = max_i top_i
//
// One group of 32 lanes: four vec4 columns of one row (batch row, query row, head); a workgroup has four such groups, BLOCKS workgroups a row.
// Lane (g, c) holds the partial results of splits g, g + 8, .. g + 56 in column c, and the tops and sums of splits lane and lane + 32. All loads are asked
// for at once, before it is known how many splits have keys; tops, sums and columns then meet by shuffles.
// Where only one split has keys, and where a row is padding, the kernel before wrote the result itself.
//
// Memory traffic: splits * (DV + 2 * BLOCKS * 4) * 4 bytes read, DV elements written a row. At most 64 splits.
// Unchecked: splits are below SPLITS <= 64, columns below DV; rows are the grid's.
// Versions: docs/KERNELS.md.
// Appended: attention_whole.wgsl or ragged_rows.wgsl with attention_ragged.wgsl, attention_rules.wgsl, attention_splits.wgsl.

@group(0) @binding(0) var<storage, read> partial: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> ml: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read> sink: array<Sink>;
@group(0) @binding(3) var<storage, read_write> out: array<Out>;

struct Params {
    heads: u32,
    rows: u32,
    capacity: u32,
    limit: u32,
    window: u32,
    o_b: u32, o_s: u32, o_h: u32,
    sinks: u32,
}
@group(0) @binding(4) var<uniform> params: Params;
@group(0) @binding(5) var<uniform> live: array<vec4<i32>, 16>;
@group(0) @binding(6) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

const LOWEST: f32 = -3.4028234663852886e38;
const DV4 = DV / 4u;
const BLOCKS = (DV4 + 15u) / 16u;

fn fetch(base: u32, i: u32, c: u32) -> vec4<f32> {
    if (i < SPLITS && c < DV4) {
        return partial[base + i * DV4 + c];
    }
    return vec4<f32>();
}

fn entry(base: u32, i: u32) -> vec2<f32> {
    if (i < SPLITS) {
        return ml[base + i];
    }
    return vec2<f32>();
}

/// A partial result times its split's weight; what stands in a split without keys does not count.
fn weighed(x: vec4<f32>, weight: f32, i: u32, used: u32) -> vec4<f32> {
    return select(vec4<f32>(), x * weight, i < used);
}

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_invocation_id) place: u32,
) {
    let h = wid.x / BLOCKS;
    let s = wid.y;
    let b = wid.z;
    let lane = index % 32u;
    let start = place - place % 32u; // of these 32 lanes in the subgroup
    let g = lane / 4u;
    let c = (wid.x % BLOCKS) * 16u + (index / 32u) * 4u + lane % 4u;
    let flat = (b * params.heads + h) * params.rows + s;
    let rows = flat * SPLITS;
    let base = rows * DV4;
    let x0 = fetch(base, g, c);
    let x1 = fetch(base, g + 8u, c);
    let x2 = fetch(base, g + 16u, c);
    let x3 = fetch(base, g + 24u, c);
    let x4 = fetch(base, g + 32u, c);
    let x5 = fetch(base, g + 40u, c);
    let x6 = fetch(base, g + 48u, c);
    let x7 = fetch(base, g + 56u, c);
    let low = entry(rows, lane);
    let high = entry(rows, lane + 32u);

    let used = splits_of_row(b, s);
    if (used <= 1u) {
        return;
    }
    let low_top = select(LOWEST, low.x, lane < used);
    let high_top = select(LOWEST, high.x, lane + 32u < used);
    var top = max(low_top, high_top);
    for (var step = 1u; step < 32u; step *= 2u) {
        top = max(top, subgroupShuffleXor(top, step));
    }
    var extra = 0.0;
    if (params.sinks != 0u) {
        let logit = f32(sink[h]);
        if (bitcast<u32>(logit) != 0xff800000u) {
            top = max(top, logit);
            extra = exp(logit - top);
        }
    }
    let low_weight = exp(low_top - top);
    let high_weight = exp(high_top - top);
    var sum = select(0.0, low.y * low_weight, lane < used) + select(0.0, high.y * high_weight, lane + 32u < used);
    for (var step = 1u; step < 32u; step *= 2u) {
        sum += subgroupShuffleXor(sum, step);
    }
    sum += extra;

    let at = start + g;
    var x = weighed(x0, subgroupShuffle(low_weight, at), g, used);
    x += weighed(x1, subgroupShuffle(low_weight, at + 8u), g + 8u, used);
    x += weighed(x2, subgroupShuffle(low_weight, at + 16u), g + 16u, used);
    x += weighed(x3, subgroupShuffle(low_weight, at + 24u), g + 24u, used);
    x += weighed(x4, subgroupShuffle(high_weight, at), g + 32u, used);
    x += weighed(x5, subgroupShuffle(high_weight, at + 8u), g + 40u, used);
    x += weighed(x6, subgroupShuffle(high_weight, at + 16u), g + 48u, used);
    x += weighed(x7, subgroupShuffle(high_weight, at + 24u), g + 56u, used);
    x += subgroupShuffleXor(x, 4u);
    x += subgroupShuffleXor(x, 8u);
    x += subgroupShuffleXor(x, 16u);
    if (g == 0u && c < DV4) {
        let norm = select(1.0 / sum, 0.0, sum == 0.0);
        out[((b * params.o_b + s * params.o_s + h * params.o_h) >> 2u) + c] = Out(x * norm);
    }
}
