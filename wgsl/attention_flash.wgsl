// Attention of many query rows in register tiles: online softmax over tiles of keys, never an S x C score matrix.
//
//   out[b, s, h, :] = sum_j p_j value[b, j, h / group, :],  p = softmax_j(mask + cap(scale * query[b, s, h, :] . key[b, j, h / group, :]))
//
// One workgroup: QROWS rows of one KV head, and at most 128 value columns (`PASSES` workgroups share wider heads, each computing the scores
// again). Rows are (query row, head of the group) pairs, so a KV head's keys and values are loaded once for all heads of its group. It walks
// over tiles of 64 keys from the first key that any of its rows sees to the last one; other keys are never loaded. With SPLIT, a workgroup
// takes one of `splits` equal ranges of the tile's keys and writes its unnormalised sums; `attention_flash_merge` follows.
//
// Lanes form a grid of TY = QROWS / 8 by 16: lane (ty, tx) owns rows 4 * ty + e and QROWS / 2 + 4 * ty + e (e < 4), the scores of keys
// tx + 16 * i (i < 4), and vec4 columns tx and tx + 16 of the values: 32 scores and 64 sums, all in vectors of fixed names. Neighbours are
// lanes of two rows in turn, so that each half of a 32-lane subgroup reads eight different vectors twice: no more than workgroup memory
// gives at once. One array of workgroup memory serves both phases: chunks of CHUNK vec4 columns of queries and keys (12 reads for 128
// multiply-adds), then the probabilities as [key][row] and chunks of VKEYS values (4 reads for 64). Pitches keep lanes in different banks.
// A chunk's global loads are issued before the computation on the one before it. Halves are loaded eight at a time (KSTEP, VSTEP 2: `key`,
// `value` hold four pairs) where the head size permits.
//
// Probabilities are powers of two: scale and log2(e) enter with the exponent's multiply-add (FOLD), unless a cap, mask or negative scale
// needs scores in natural units. A row's maximum is found with shuffles among SUB lanes, then through workgroup memory among the 16 / SUB
// that are left. Tiles that no row's range cuts and that have no mask take no tests; in others the probability of a hidden key is -1 and is
// passed over, so that what stands in hidden rows (NaN too) is of no effect.
//
// Memory traffic: K and V once for each tile of rows, Q once for each tile of keys. Workgroup memory: `flash_memory` in
// ops/attention_flash.py. Versions tried: see docs/KERNELS.md.
// Unchecked: rows are clamped to the last one, keys to the last one below key_limit <= capacity (nothing is loaded where there is none),
// columns are below D4 and DV4; the host has checked that the tensors have these sizes; mask and sink are read at clamped rows and heads;
// indices of workgroup memory follow from lane < LANES.
// Appended: attention_whole.wgsl or ragged_rows.wgsl with attention_ragged.wgsl, attention_rules.wgsl, attention_scores.wgsl,
// attention_flash_ranges.wgsl, attention_flash_rows.wgsl, attention_flash_cells.wgsl or attention_flash_packed.wgsl (with
// attention_scales.wgsl), attention_flash_loads.wgsl, attention_flash_tiles.wgsl, `neighbour`.

@group(0) @binding(0) var<storage, read> queries: array<QVec>;
@group(0) @binding(1) var<storage, read> key: array<K>;
@group(0) @binding(2) var<storage, read> value: array<V>;
@group(0) @binding(3) var<storage, read> mask: array<Mask>;
@group(0) @binding(4) var<storage, read> sink: array<Sink>;
@group(0) @binding(5) var<storage, read_write> out: array<OutVec>; // with SPLIT [row][split][DV4 + 1]: sums, then (top, sum of p)

struct Params {
    batch: u32,
    heads: u32,
    group: u32,
    rows: u32,
    capacity: u32,
    limit: u32,
    window: u32,
    q_b: u32, q_s: u32, q_h: u32,
    k_b: u32, k_s: u32, k_h: u32,
    v_b: u32, v_s: u32, v_h: u32,
    o_b: u32, o_s: u32, o_h: u32,
    mask_b: u32, mask_h: u32, mask_s: u32, mask_k: u32,
    scale: f32,
    softcap: f32,
    minus_inf: f32,
    sinks: u32,
    total: u32,
    tiles: u32,
    splits: u32,
}
@group(0) @binding(6) var<uniform> params: Params;
@group(0) @binding(7) var<uniform> live: array<vec4<i32>, 16>;
@group(0) @binding(8) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

const KEYS = 64u;
const LANES = 2u * QROWS;
const TY = QROWS / 8u;
const D4 = D / 4u;
const DV4 = DV / 4u;
const CHUNKS = (D4 + CHUNK - 1u) / CHUNK;
const PITCH = CHUNK + 1u; // of a row of queries or keys
const P_PITCH = 2u * TY + 2u; // of a key's probabilities
const BLOCKS = min(2u, (DV4 + 15u) / 16u); // of 16 vec4 value columns
const VW = 16u * BLOCKS;
const VTURN = 32u / BLOCKS; // keys of one turn of the value loop
const PARTS = 16u / SUB;
const K_AT = QROWS * PITCH;
const V_AT = KEYS * P_PITCH; // also of the maxima that lanes exchange
const K_SLOTS = CHUNK / KSTEP; // loads of a key's chunk
const V_SLOTS = VW / VSTEP; // loads of a row of values
const LOG2E = 1.4426950408889634;
const UNIT = select(LOG2E, 1.0, FOLD != 0u); // of a row's maximum, in powers of two

var<workgroup> shared_tile: array<vec4<f32>, max((QROWS + KEYS) * PITCH, V_AT + max(VKEYS * VW, PARTS * 2u * TY))>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let flat = wid.y * groups.x + wid.x;
    if (flat >= params.total) {
        return;
    }
    let kv_heads = params.heads / params.group;
    let split = flat % params.splits;
    let kv_head = (flat / params.splits) % kv_heads;
    let b = (flat / params.splits / kv_heads) % params.batch;
    let part = flat / params.splits / kv_heads / params.batch;
    let column0 = (part % PASSES) * 32u;
    let tile = params.tiles - 1u - part / PASSES; // the tiles with most keys first
    let row0 = tile * QROWS;

    let range = tile_keys(b, tile);
    var begin = range.x;
    var end = range.y;
    if (SPLIT != 0u) {
        let size = range_size(end - begin);
        begin += split * size;
        end = min(end, begin + size);
    }
    let row_a = row0 / params.group;
    let row_z = min(row0 + QROWS - 1u, last_number(b)) / params.group;
    let all_from = key_first(b, row_z); // keys in [all_from, all_to) are in the range of every row
    let all_to = key_limit(b, row_a);

    let ty = lane / 32u * 2u + lane % 2u;
    let tx = lane / 2u % 16u;
    let lo_row = row0 + 4u * ty;
    let hi_row = lo_row + QROWS / 2u;
    let k_base = b * params.k_b + kv_head * params.k_h;
    let v_base = b * params.v_b + kv_head * params.v_h;
    let steps = vec4<u32>(0u, 1u, 2u, 3u) * (LANES / CHUNK);
    let loaded = min(row0 + lane / CHUNK + steps, vec4<u32>(last_number(b)));
    let loaded_row = loaded / params.group;
    let loaded_head = kv_head * params.group + (loaded - loaded_row * params.group);
    let q_bases = b * params.q_b + loaded_row * params.q_s + loaded_head * params.q_h;

    var lo_top = vec4<f32>(LOWEST); // the largest score of each row so far
    var hi_top = vec4<f32>(LOWEST);
    var lo_sum = vec4<f32>(); // this lane's share of each row's sum
    var hi_sum = vec4<f32>();
    if (SPLIT == 0u && params.sinks != 0u) {
        let lo_head = rows_at(lo_row, b, kv_head).head;
        let hi_head = rows_at(hi_row, b, kv_head).head;
        let lo = vec4<f32>(f32(sink[lo_head.x]), f32(sink[lo_head.y]), f32(sink[lo_head.z]), f32(sink[lo_head.w]));
        let hi = vec4<f32>(f32(sink[hi_head.x]), f32(sink[hi_head.y]), f32(sink[hi_head.z]), f32(sink[hi_head.w]));
        lo_top = select(lo * (LOG2E / UNIT), lo_top, are_hidden(lo));
        hi_top = select(hi * (LOG2E / UNIT), hi_top, are_hidden(hi));
        let one = vec4<f32>(select(0.0, 1.0, tx == 0u));
        lo_sum = select(one, lo_sum, are_hidden(lo));
        hi_sum = select(one, hi_sum, are_hidden(hi));
    }
    var acc = Sums();
    var next_q = mat4x4<f32>();
    var next = Raw();
    if (begin < end) {
        next_q = fetch_queries(lane, q_bases, 0u);
        next = fetch_keys(lane, begin, end, k_base, 0u);
    }
    for (var key0 = begin; key0 < end; key0 += KEYS) {
        let full = MASK == 0u && key0 >= all_from && key0 + KEYS <= all_to;
        var x = Scores();
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            workgroupBarrier();
            place_queries(lane, next_q);
            place_keys(lane, next);
            workgroupBarrier();
            if (chunk + 1u < CHUNKS) {
                next_q = fetch_queries(lane, q_bases, chunk + 1u);
                next = fetch_keys(lane, key0, end, k_base, chunk + 1u);
            } else {
                next = fetch_values(lane, key0, end, v_base, column0);
            }
            let q_at = 4u * ty * PITCH;
            let k_at = K_AT + tx * PITCH;
            for (var c = 0u; c < CHUNK; c += 4u) {
                x = with_column(x, q_at + c, k_at + c);
                x = with_column(x, q_at + c + 1u, k_at + c + 1u);
                x = with_column(x, q_at + c + 2u, k_at + c + 2u);
                x = with_column(x, q_at + c + 3u, k_at + c + 3u);
            }
        }

        if (full) {
            x.s0 = finished(x.s0);
            x.s1 = finished(x.s1);
            x.s2 = finished(x.s2);
            x.s3 = finished(x.s3);
            x.t0 = finished(x.t0);
            x.t1 = finished(x.t1);
            x.t2 = finished(x.t2);
            x.t3 = finished(x.t3);
        } else {
            let j = key0 + tx;
            let lo = rows_at(lo_row, b, kv_head);
            let lo_firsts = firsts_of(b, lo.row);
            let lo_limits = limits_of(b, lo.row);
            x.s0 = judge(x.s0, b, lo, j, lo_firsts, lo_limits);
            x.s1 = judge(x.s1, b, lo, j + 16u, lo_firsts, lo_limits);
            x.s2 = judge(x.s2, b, lo, j + 32u, lo_firsts, lo_limits);
            x.s3 = judge(x.s3, b, lo, j + 48u, lo_firsts, lo_limits);
            let hi = rows_at(hi_row, b, kv_head);
            let hi_firsts = firsts_of(b, hi.row);
            let hi_limits = limits_of(b, hi.row);
            x.t0 = judge(x.t0, b, hi, j, hi_firsts, hi_limits);
            x.t1 = judge(x.t1, b, hi, j + 16u, hi_firsts, hi_limits);
            x.t2 = judge(x.t2, b, hi, j + 32u, hi_firsts, hi_limits);
            x.t3 = judge(x.t3, b, hi, j + 48u, hi_firsts, hi_limits);
        }
        var lo_raised = max(lo_top, factor() * shuffled_max(max(max(x.s0, x.s1), max(x.s2, x.s3))));
        var hi_raised = max(hi_top, factor() * shuffled_max(max(max(x.t0, x.t1), max(x.t2, x.t3))));
        workgroupBarrier();
        if (PARTS > 1u) {
            give(lo_raised, hi_raised, ty, tx);
            workgroupBarrier();
            for (var i = 0u; i < PARTS; i++) {
                lo_raised = max(lo_raised, shared_tile[V_AT + i * 2u * TY + ty]);
                hi_raised = max(hi_raised, shared_tile[V_AT + i * 2u * TY + TY + ty]);
            }
        }
        let lo_change = exp2((lo_top - lo_raised) * UNIT);
        let hi_change = exp2((hi_top - hi_raised) * UNIT);
        lo_top = lo_raised;
        hi_top = hi_raised;

        lo_sum *= lo_change;
        hi_sum *= hi_change;
        let p_at = tx * P_PITCH + ty;
        if (full) {
            lo_sum += put(p_at, x.s0, lo_top);
            lo_sum += put(p_at + 16u * P_PITCH, x.s1, lo_top);
            lo_sum += put(p_at + 32u * P_PITCH, x.s2, lo_top);
            lo_sum += put(p_at + 48u * P_PITCH, x.s3, lo_top);
            hi_sum += put(p_at + TY, x.t0, hi_top);
            hi_sum += put(p_at + 16u * P_PITCH + TY, x.t1, hi_top);
            hi_sum += put(p_at + 32u * P_PITCH + TY, x.t2, hi_top);
            hi_sum += put(p_at + 48u * P_PITCH + TY, x.t3, hi_top);
        } else {
            lo_sum += put_visible(p_at, x.s0, lo_top);
            lo_sum += put_visible(p_at + 16u * P_PITCH, x.s1, lo_top);
            lo_sum += put_visible(p_at + 32u * P_PITCH, x.s2, lo_top);
            lo_sum += put_visible(p_at + 48u * P_PITCH, x.s3, lo_top);
            hi_sum += put_visible(p_at + TY, x.t0, hi_top);
            hi_sum += put_visible(p_at + 16u * P_PITCH + TY, x.t1, hi_top);
            hi_sum += put_visible(p_at + 32u * P_PITCH + TY, x.t2, hi_top);
            hi_sum += put_visible(p_at + 48u * P_PITCH + TY, x.t3, hi_top);
        }
        acc.lo_a = rescaled(acc.lo_a, lo_change);
        acc.hi_a = rescaled(acc.hi_a, hi_change);
        if (BLOCKS > 1u) {
            acc.lo_b = rescaled(acc.lo_b, lo_change);
            acc.hi_b = rescaled(acc.hi_b, hi_change);
        }

        let stop = min(KEYS, end - key0);
        for (var first = 0u; first < stop; first += VKEYS) {
            if (PARTS > 1u || first > 0u) {
                workgroupBarrier();
            }
            place_values(lane, next);
            workgroupBarrier();
            if (first + VKEYS < stop) {
                next = fetch_values(lane, key0 + first + VKEYS, end, v_base, column0);
            } else if (key0 + KEYS < end) {
                next_q = fetch_queries(lane, q_bases, 0u);
                next = fetch_keys(lane, key0 + KEYS, end, k_base, 0u);
            }
            if (full) {
                for (var j = 0u; j < VKEYS; j += min(VKEYS, VTURN)) {
                    let p = (first + j) * P_PITCH + ty;
                    let v = V_AT + j * VW + tx;
                    acc = with_keys(acc, p, v);
                    acc = with_keys(acc, p + 4u * P_PITCH, v + 4u * VW);
                    if (VKEYS > 8u) {
                        acc = with_keys(acc, p + 8u * P_PITCH, v + 8u * VW);
                        acc = with_keys(acc, p + 12u * P_PITCH, v + 12u * VW);
                    }
                    if (min(VKEYS, VTURN) > 16u) {
                        acc = with_keys(acc, p + 16u * P_PITCH, v + 16u * VW);
                        acc = with_keys(acc, p + 20u * P_PITCH, v + 20u * VW);
                        acc = with_keys(acc, p + 24u * P_PITCH, v + 24u * VW);
                        acc = with_keys(acc, p + 28u * P_PITCH, v + 28u * VW);
                    }
                }
            } else {
                for (var j = 0u; j < VKEYS; j++) {
                    acc = with_visible_key(acc, (first + j) * P_PITCH + ty, V_AT + j * VW + tx);
                }
            }
        }
    }

    lo_sum = shuffled_sum(lo_sum);
    hi_sum = shuffled_sum(hi_sum);
    if (PARTS > 1u) {
        workgroupBarrier();
        give(lo_sum, hi_sum, ty, tx);
        workgroupBarrier();
        lo_sum = vec4<f32>();
        hi_sum = vec4<f32>();
        for (var i = 0u; i < PARTS; i++) {
            lo_sum += shared_tile[V_AT + i * 2u * TY + ty];
            hi_sum += shared_tile[V_AT + i * 2u * TY + TY + ty];
        }
    }
    if (SPLIT != 0u && begin >= end) {
        return; // not earlier: a driver's compiler crashes on a return in front of loops with barriers
    }
    var lo_norm = vec4<f32>(1.0);
    var hi_norm = vec4<f32>(1.0);
    if (SPLIT == 0u) {
        lo_norm = select(1.0 / lo_sum, vec4<f32>(), lo_sum == vec4<f32>());
        hi_norm = select(1.0 / hi_sum, vec4<f32>(), hi_sum == vec4<f32>());
    } else if (tx == 0u && column0 == 0u) {
        store_state(lo_top, lo_sum, lo_row, b, kv_head, split);
        store_state(hi_top, hi_sum, hi_row, b, kv_head, split);
    }
    let c = column0 + tx;
    store(rescaled(acc.lo_a, lo_norm), lo_row, b, kv_head, split, c);
    store(rescaled(acc.hi_a, hi_norm), hi_row, b, kv_head, split, c);
    if (BLOCKS > 1u) {
        store(rescaled(acc.lo_b, lo_norm), lo_row, b, kv_head, split, c + 16u);
        store(rescaled(acc.hi_b, hi_norm), hi_row, b, kv_head, split, c + 16u);
    }
}
