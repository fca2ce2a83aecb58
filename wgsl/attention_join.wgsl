// The second half of split attention for devices whose subgroups have at least 32 lanes: what `attention_merge` does, without a barrier.
//
//   out[row, :] = sum_i exp(top_i - top) partial[row, i, :] / sum_i exp(top_i - top) sum_i,  top = max_i top_i
//
// One group of 32 lanes: four vec4 columns of one row (batch row, query row, head); a workgroup has four such groups, BLOCKS workgroups a row.
// Lane (g, c) holds the partial results of splits g, g + 8, .. g + 56 in column c, and their tops and sums. All loads are asked for at once, before
// it is known how many splits have keys; tops, then sums and columns, meet by three shuffles each, since every lane weighs what it holds itself.
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
fn weighed(x: vec4<f32>, weight: f32, used: bool) -> vec4<f32> {
    return select(vec4<f32>(), x * weight, used);
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let h = wid.x / BLOCKS;
    let s = wid.y;
    let b = wid.z;
    let lane = index % 32u;
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
    let e0 = entry(rows, g);
    let e1 = entry(rows, g + 8u);
    let e2 = entry(rows, g + 16u);
    let e3 = entry(rows, g + 24u);
    let e4 = entry(rows, g + 32u);
    let e5 = entry(rows, g + 40u);
    let e6 = entry(rows, g + 48u);
    let e7 = entry(rows, g + 56u);

    let used = splits_of_row(b, s);
    if (used <= 1u) {
        return;
    }
    let low_used = vec4<u32>(g, g + 8u, g + 16u, g + 24u) < vec4<u32>(used);
    let high_used = vec4<u32>(g + 32u, g + 40u, g + 48u, g + 56u) < vec4<u32>(used);
    let low_tops = select(vec4<f32>(LOWEST), vec4<f32>(e0.x, e1.x, e2.x, e3.x), low_used);
    let high_tops = select(vec4<f32>(LOWEST), vec4<f32>(e4.x, e5.x, e6.x, e7.x), high_used);
    let tops = max(low_tops, high_tops);
    var top = max(max(tops.x, tops.y), max(tops.z, tops.w));
    top = max(top, subgroupShuffleXor(top, 4u));
    top = max(top, subgroupShuffleXor(top, 8u));
    top = max(top, subgroupShuffleXor(top, 16u));
    var extra = 0.0;
    if (params.sinks != 0u) {
        let logit = f32(sink[h]);
        if (bitcast<u32>(logit) != 0xff800000u) {
            top = max(top, logit);
            extra = exp(logit - top);
        }
    }
    let low = exp(low_tops - top);
    let high = exp(high_tops - top);
    let sums = select(vec4<f32>(), vec4<f32>(e0.y, e1.y, e2.y, e3.y) * low, low_used)
        + select(vec4<f32>(), vec4<f32>(e4.y, e5.y, e6.y, e7.y) * high, high_used);
    var sum = sums.x + sums.y + sums.z + sums.w;
    var x = weighed(x0, low.x, low_used.x);
    x += weighed(x1, low.y, low_used.y);
    x += weighed(x2, low.z, low_used.z);
    x += weighed(x3, low.w, low_used.w);
    x += weighed(x4, high.x, high_used.x);
    x += weighed(x5, high.y, high_used.y);
    x += weighed(x6, high.z, high_used.z);
    x += weighed(x7, high.w, high_used.w);
    sum += subgroupShuffleXor(sum, 4u);
    sum += subgroupShuffleXor(sum, 8u);
    sum += subgroupShuffleXor(sum, 16u);
    sum += extra;
    x += subgroupShuffleXor(x, 4u);
    x += subgroupShuffleXor(x, 8u);
    x += subgroupShuffleXor(x, 16u);
    if (g == 0u && c < DV4) {
        let norm = select(1.0 / sum, 0.0, sum == 0.0);
        out[((b * params.o_b + s * params.o_s + h * params.o_h) >> 2u) + c] = Out(x * norm);
    }
}
