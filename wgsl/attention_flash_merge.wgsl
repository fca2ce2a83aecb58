// The second half of `attention_flash` with split keys: combines the sums of the splits.
//
//   out[row, :] = sum_i 2^(top_i - top) part[row, i, :] / sum_i 2^(top_i - top) sum_i,  top = max_i top_i
//
// over the splits that have keys (as many as the live length makes for the tile that the row was in; what stands in the others is not read),
// with the head's sink as one more term of the sum; e instead of 2 where the scores are in natural units (FOLD 0). One workgroup: ROWS rows
// (batch row, head, query row), SUBS lanes for each vec4 column. The lanes load all tops and sums side by side; then lane (row, sub, column)
// sums every SUBS-th split of one column, so the loads do not wait for one another. Wide heads take several rounds.
//
// Memory traffic: splits * (DV + 4) * 4 bytes read, DV elements written a row. Versions tried: this one only.
// Unchecked: flat is below total, so rows, heads and batch rows exist; splits < used <= params.splits; columns below DV4; `states` has
// ROWS * params.splits <= LANES entries, since ops/attention_flash.py takes ROWS = 1 where SUBS is less than the splits, and 64 splits at most.
// Appended: attention_whole.wgsl or ragged_rows.wgsl with attention_ragged.wgsl, attention_rules.wgsl, attention_flash_ranges.wgsl.

@group(0) @binding(0) var<storage, read> partial: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> sink: array<Sink>;
@group(0) @binding(2) var<storage, read_write> out: array<OutVec>;

struct Params {
    heads: u32,
    group: u32,
    rows: u32,
    capacity: u32,
    limit: u32,
    window: u32,
    o_b: u32, o_s: u32, o_h: u32,
    sinks: u32,
    total: u32,
    splits: u32,
}
@group(0) @binding(3) var<uniform> params: Params;
@group(0) @binding(4) var<uniform> live: array<vec4<i32>, 16>;
@group(0) @binding(5) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

const LOWEST: f32 = -3.4028234663852886e38;
const LOG2E = 1.4426950408889634;
const UNIT = select(LOG2E, 1.0, FOLD != 0u); // of a score, in powers of two
const KEYS = 64u;
const LANES = 128u;
const DV4 = DV / 4u;

var<workgroup> states: array<vec2<f32>, LANES>; // (top, sum) of each row's splits
var<workgroup> shares: array<vec4<f32>, LANES>;

/// Splits of the row that have keys.
fn used_splits(flat: u32) -> u32 {
    let s = flat % params.rows;
    let h = (flat / params.rows) % params.heads;
    let b = flat / params.rows / params.heads;
    if (RAGGED && s >= rows_of(b)) {
        return 0u; // padding: zero
    }
    let range = tile_keys(b, (s * params.group + h % params.group) / QROWS);
    let size = max(range_size(range.y - range.x), 1u);
    return (range.y - range.x + size - 1u) / size;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let flat0 = (wid.y * groups.x + wid.x) * ROWS;
    if (flat0 >= params.total) {
        return;
    }
    if (lane < ROWS * params.splits) {
        let flat = flat0 + lane / params.splits;
        let i = lane % params.splits;
        if (flat < params.total) {
            if (i < used_splits(flat)) {
                states[lane] = partial[(flat * params.splits + i) * (DV4 + 1u) + DV4].xy;
            }
        }
    }
    workgroupBarrier();

    let own = lane / (SUBS * COLUMNS); // the lane's row
    let sub = lane / COLUMNS % SUBS;
    let flat = flat0 + own;
    let works = own < ROWS && flat < params.total;
    var used = 0u;
    var top = LOWEST;
    var sum = 0.0;
    if (works) {
        used = used_splits(flat);
        for (var i = 0u; i < used; i++) {
            top = max(top, states[own * params.splits + i].x);
        }
        if (params.sinks != 0u) {
            let logit = f32(sink[(flat / params.rows) % params.heads]);
            if (bitcast<u32>(logit) != 0xff800000u) {
                top = max(top, logit * (LOG2E / UNIT));
                sum = exp2((logit * (LOG2E / UNIT) - top) * UNIT);
            }
        }
        for (var i = 0u; i < used; i++) {
            let state = states[own * params.splits + i];
            sum += exp2((state.x - top) * UNIT) * state.y;
        }
    }
    let norm = select(1.0 / sum, 0.0, sum == 0.0);

    for (var c0 = 0u; c0 < DV4; c0 += COLUMNS) {
        let c = c0 + lane % COLUMNS;
        var share = vec4<f32>();
        if (works && c < DV4) {
            for (var i = sub; i < used; i += SUBS) {
                let factor = exp2((states[own * params.splits + i].x - top) * UNIT);
                share += factor * partial[(flat * params.splits + i) * (DV4 + 1u) + c];
            }
        }
        if (SUBS > 1u) {
            workgroupBarrier();
            shares[lane] = share;
            workgroupBarrier();
            if (sub == 0u && works) {
                for (var k = 1u; k < SUBS; k++) {
                    share += shares[lane + k * COLUMNS];
                }
            }
        }
        if (sub == 0u && works && c < DV4) {
            let s = flat % params.rows;
            let h = (flat / params.rows) % params.heads;
            let b = flat / params.rows / params.heads;
            out[((b * params.o_b + s * params.o_s + h * params.o_h) >> 2u) + c] = OutVec(share * norm);
        }
    }
}
