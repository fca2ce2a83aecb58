// The second half of split attention: combines the partial results of `attention_decode` or `attention_stream`.
//
//   out[row, :] = sum_i exp(top_i - top) partial[row, i, :] / sum_i exp(top_i - top) sum_i,  top = max_i top_i
//
// over the splits that have keys (as many as the live length makes; what stands in the others is not read), with the head's sink as one
// more term of the sum. One workgroup: one row (batch row, query row, head). Lane (sub, column) sums every SUBS-th split of one vec4 column; it
// asks for its first eight partial results before the splits' tops are compared, so that nothing waits for one load after another; wide heads take several rounds.
// ALONE: where only one split has keys, and where a row is padding, the kernel before wrote the result itself; else padding is zero here.
//
// Memory traffic: splits * (DV + 2) * 4 bytes read, DV elements written a row. At most 64 splits.
// Unchecked: splits are below `used` <= SPLITS <= 64, columns below DV, rows are the grid's.
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
    total: u32,
}
@group(0) @binding(4) var<uniform> params: Params;
@group(0) @binding(5) var<uniform> live: array<vec4<i32>, 16>;
@group(0) @binding(6) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

const LOWEST: f32 = -3.4028234663852886e38;
const MOST = 64u; // splits at most
const LANES = max(COLUMNS * SUBS, MOST);
const DV4 = (DV + 3u) / 4u;

var<workgroup> tops: array<vec4<f32>, MOST / 4u>; // tops, then what each split's partial result is multiplied with
var<workgroup> sums: array<vec4<f32>, MOST / 4u>;
var<workgroup> shares: array<vec4<f32>, COLUMNS * SUBS>;

fn fetch(base: u32, i: u32, used: u32, c: u32) -> vec4<f32> {
    if (i < used && c < DV4) {
        return partial[base + i * DV4 + c];
    }
    return vec4<f32>();
}

/// A partial result times its split's factor; what stands in a split without keys does not count.
fn weighed(x: vec4<f32>, i: u32, used: u32) -> vec4<f32> {
    let at = min(i, MOST - 1u);
    return select(vec4<f32>(), x * tops[at >> 2u][at & 3u], i < used);
}

fn total_of(x: vec4<f32>) -> f32 {
    return (x.x + x.y) + (x.z + x.w);
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var h = wid.x;
    var s = wid.y;
    var b = wid.z;
    if (FOLDED) { // more of one than a grid's axis takes
        let number = wid.y * groups.x + wid.x;
        if (number >= params.total) {
            return;
        }
        s = number % params.rows;
        h = (number / params.rows) % params.heads;
        b = number / params.rows / params.heads;
    }
    let flat = (b * params.heads + h) * params.rows + s;
    let column = lane % COLUMNS;
    let sub = lane / COLUMNS;
    let reads = sub < SUBS;
    let limit = select(0u, SPLITS, reads);
    let base = flat * SPLITS * DV4;
    var low = mat4x4<f32>();
    var high = mat4x4<f32>();
    low[0] = fetch(base, sub, limit, column);
    low[1] = fetch(base, sub + SUBS, limit, column);
    low[2] = fetch(base, sub + 2u * SUBS, limit, column);
    low[3] = fetch(base, sub + 3u * SUBS, limit, column);
    high[0] = fetch(base, sub + 4u * SUBS, limit, column);
    high[1] = fetch(base, sub + 5u * SUBS, limit, column);
    high[2] = fetch(base, sub + 6u * SUBS, limit, column);
    high[3] = fetch(base, sub + 7u * SUBS, limit, column);

    var own = vec2<f32>();
    if (lane < SPLITS) {
        own = ml[flat * SPLITS + lane];
    }
    // how many splits have keys is known later than the loads above can begin
    let used = splits_of_row(b, s);
    if (ALONE && used <= 1u) {
        return;
    }
    if (lane >= used) {
        own = vec2<f32>(LOWEST, 0.0);
    }
    if (lane < MOST) {
        tops[lane >> 2u][lane & 3u] = own.x;
    }
    workgroupBarrier();
    var highest = tops[0];
    for (var i = 1u; i < MOST / 4u; i++) {
        highest = max(highest, tops[i]);
    }
    var top = max(max(highest.x, highest.y), max(highest.z, highest.w));
    var extra = 0.0;
    if (params.sinks != 0u) {
        let logit = f32(sink[h]);
        if (bitcast<u32>(logit) != 0xff800000u) {
            top = max(top, logit);
            extra = exp(logit - top);
        }
    }
    workgroupBarrier();
    if (lane < MOST) {
        let weight = select(0.0, exp(own.x - top), lane < used);
        tops[lane >> 2u][lane & 3u] = weight;
        sums[lane >> 2u][lane & 3u] = own.y * weight;
    }
    workgroupBarrier();
    var all = sums[0];
    for (var i = 1u; i < MOST / 4u; i++) {
        all += sums[i];
    }
    let sum = extra + total_of(all);
    let norm = select(1.0 / sum, 0.0, sum == 0.0);

    for (var c0 = 0u; c0 < DV4; c0 += COLUMNS) {
        let c = c0 + column;
        var share = vec4<f32>();
        if (reads) {
            if (c0 > 0u) {
                low[0] = fetch(base, sub, limit, c);
                low[1] = fetch(base, sub + SUBS, limit, c);
                low[2] = fetch(base, sub + 2u * SUBS, limit, c);
                low[3] = fetch(base, sub + 3u * SUBS, limit, c);
                high[0] = fetch(base, sub + 4u * SUBS, limit, c);
                high[1] = fetch(base, sub + 5u * SUBS, limit, c);
                high[2] = fetch(base, sub + 6u * SUBS, limit, c);
                high[3] = fetch(base, sub + 7u * SUBS, limit, c);
            }
            share = weighed(low[0], sub, used) + weighed(low[1], sub + SUBS, used);
            share += weighed(low[2], sub + 2u * SUBS, used) + weighed(low[3], sub + 3u * SUBS, used);
            share += weighed(high[0], sub + 4u * SUBS, used) + weighed(high[1], sub + 5u * SUBS, used);
            share += weighed(high[2], sub + 6u * SUBS, used) + weighed(high[3], sub + 7u * SUBS, used);
            for (var i = sub + 8u * SUBS; i < used; i += SUBS) {
                share += weighed(fetch(base, i, used, c), i, used);
            }
            shares[lane] = share;
        }
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
