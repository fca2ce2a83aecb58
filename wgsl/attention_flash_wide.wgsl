// Attention of many query rows over long rows of keys: `attention_flash` with tiles of 128 keys, without masks and splits.
//
//   out[b, s, h, :] = sum_j p_j value[b, j, h / group, :],  p = softmax_j(cap(scale * query[b, s, h, :] . key[b, j, h / group, :]))
//
// One workgroup: as in attention_flash.wgsl, but a lane has the scores of keys tx + 16 * i (i < 8): of the first half of a tile in x, of the
// second in y. So 16 reads serve 256 multiply-adds instead of 12 for 128, and queries are loaded, stored and maxima exchanged half as often.
// Probabilities of both halves would not fit into workgroup memory: the first half's are stored and taken with the values, then the second's.
// Chunks of values that no row's range cuts take no tests, also in tiles that are cut elsewhere.
//
// Memory traffic: K and V once for each tile of rows, Q once for each tile of keys. Workgroup memory: `flash_memory` in
// ops/attention_flash.py. Versions tried: see docs/KERNELS.md.
// Unchecked: as in attention_flash.wgsl.
// Pruned: with the branches that are false at compile time its variants are slower by 0.5 % (head size 64) to 1.2 % (128).
// Appended: attention_whole.wgsl or ragged_rows.wgsl with attention_ragged.wgsl, attention_rules.wgsl, attention_scores.wgsl,
// attention_flash_ranges.wgsl, attention_flash_rows.wgsl, attention_flash_cells.wgsl or attention_flash_packed.wgsl (with
// attention_scales.wgsl), attention_flash_loads.wgsl, attention_flash_tiles.wgsl, `neighbour`.

@group(0) @binding(0) var<storage, read> queries: array<QVec>;
@group(0) @binding(1) var<storage, read> key: array<K>;
@group(0) @binding(2) var<storage, read> value: array<V>;
@group(0) @binding(3) var<storage, read> mask: array<Mask>;
@group(0) @binding(4) var<storage, read> sink: array<Sink>;
@group(0) @binding(5) var<storage, read_write> out: array<OutVec>;

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

const KEYS = 128u;
const HALF = 64u; // keys whose probabilities are in workgroup memory at a time
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
const V_AT = HALF * P_PITCH; // also of the maxima that lanes exchange
const K_SLOTS = CHUNK / KSTEP; // loads of a key's chunk
const V_SLOTS = VW / VSTEP; // loads of a row of values
const TURN = min(VKEYS, VTURN);
const LOG2E = 1.4426950408889634;
const UNIT = select(LOG2E, 1.0, FOLD != 0u); // of a row's maximum, in powers of two

var<workgroup> shared_tile: array<vec4<f32>, max((QROWS + KEYS) * PITCH, V_AT + max(VKEYS * VW, PARTS * 2u * TY))>;

fn all_finished(x: Scores) -> Scores {
    return Scores(
        finished(x.s0), finished(x.s1), finished(x.s2), finished(x.s3),
        finished(x.t0), finished(x.t1), finished(x.t2), finished(x.t3),
    );
}

/// Where a lane works: its place in the grid, the keys that all rows see, its columns, elements at which tensors start.
struct Place {
    lane: u32,
    ty: u32,
    tx: u32,
    all_from: u32,
    all_to: u32,
    column0: u32,
    k_base: u32,
    v_base: u32,
    q_bases: vec4<u32>,
}

/// What a lane carries from tile to tile: its shares of the sums, and what it has loaded ahead.
struct Flow {
    lo_sum: vec4<f32>,
    hi_sum: vec4<f32>,
    acc: Sums,
    next_q: mat4x4<f32>,
    next: Raw,
}

/// The sums with the keys key0 + half .. key0 + half + HALF - 1, of which `x` has the scores: stores their probabilities, then takes VKEYS
/// values at a time. Loads the next ones ahead, at the tile's end the next tile's queries and keys. `full`: all rows see all keys of the tile.
fn with_half(
    before: Flow, x: Scores, at: Place, key0: u32, half: u32, end: u32, full: bool, lo_top: vec4<f32>, hi_top: vec4<f32>,
) -> Flow {
    var flow = before;
    let p_at = at.tx * P_PITCH + at.ty;
    if (full) {
        flow.lo_sum += put(p_at, x.s0, lo_top);
        flow.lo_sum += put(p_at + 16u * P_PITCH, x.s1, lo_top);
        flow.lo_sum += put(p_at + 32u * P_PITCH, x.s2, lo_top);
        flow.lo_sum += put(p_at + 48u * P_PITCH, x.s3, lo_top);
        flow.hi_sum += put(p_at + TY, x.t0, hi_top);
        flow.hi_sum += put(p_at + 16u * P_PITCH + TY, x.t1, hi_top);
        flow.hi_sum += put(p_at + 32u * P_PITCH + TY, x.t2, hi_top);
        flow.hi_sum += put(p_at + 48u * P_PITCH + TY, x.t3, hi_top);
    } else {
        flow.lo_sum += put_visible(p_at, x.s0, lo_top);
        flow.lo_sum += put_visible(p_at + 16u * P_PITCH, x.s1, lo_top);
        flow.lo_sum += put_visible(p_at + 32u * P_PITCH, x.s2, lo_top);
        flow.lo_sum += put_visible(p_at + 48u * P_PITCH, x.s3, lo_top);
        flow.hi_sum += put_visible(p_at + TY, x.t0, hi_top);
        flow.hi_sum += put_visible(p_at + 16u * P_PITCH + TY, x.t1, hi_top);
        flow.hi_sum += put_visible(p_at + 32u * P_PITCH + TY, x.t2, hi_top);
        flow.hi_sum += put_visible(p_at + 48u * P_PITCH + TY, x.t3, hi_top);
    }
    let stop = min(HALF, end - key0 - half);
    for (var first = 0u; first < stop; first += VKEYS) {
        let key = key0 + half + first;
        if (PARTS > 1u || first > 0u) {
            workgroupBarrier();
        }
        place_values(at.lane, flow.next);
        workgroupBarrier();
        if (half + first + VKEYS < KEYS && key + VKEYS < end) {
            flow.next = fetch_values(at.lane, key + VKEYS, end, at.v_base, at.column0);
        } else if (key0 + KEYS < end) {
            flow.next_q = fetch_queries(at.lane, at.q_bases, 0u);
            flow.next = fetch_keys(at.lane, key0 + KEYS, end, at.k_base, 0u);
        }
        if (full || (key >= at.all_from && key + VKEYS <= at.all_to)) {
            for (var j = 0u; j < VKEYS; j += TURN) {
                let p = (first + j) * P_PITCH + at.ty;
                let v = V_AT + j * VW + at.tx;
                flow.acc = with_keys(flow.acc, p, v);
                flow.acc = with_keys(flow.acc, p + 4u * P_PITCH, v + 4u * VW);
                if (VKEYS > 8u) {
                    flow.acc = with_keys(flow.acc, p + 8u * P_PITCH, v + 8u * VW);
                    flow.acc = with_keys(flow.acc, p + 12u * P_PITCH, v + 12u * VW);
                }
                if (TURN > 16u) {
                    flow.acc = with_keys(flow.acc, p + 16u * P_PITCH, v + 16u * VW);
                    flow.acc = with_keys(flow.acc, p + 20u * P_PITCH, v + 20u * VW);
                    flow.acc = with_keys(flow.acc, p + 24u * P_PITCH, v + 24u * VW);
                    flow.acc = with_keys(flow.acc, p + 28u * P_PITCH, v + 28u * VW);
                }
            }
        } else {
            for (var j = 0u; j < VKEYS; j++) {
                flow.acc = with_visible_key(flow.acc, (first + j) * P_PITCH + at.ty, V_AT + j * VW + at.tx);
            }
        }
    }
    return flow;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let flat = wid.y * groups.x + wid.x;
    if (flat >= params.total) {
        return;
    }
    let kv_heads = params.heads / params.group;
    let kv_head = flat % kv_heads;
    let b = (flat / kv_heads) % params.batch;
    let part = flat / kv_heads / params.batch;
    let column0 = (part % PASSES) * 32u;
    let tile = params.tiles - 1u - part / PASSES; // the tiles with most keys first
    let row0 = tile * QROWS;

    let range = tile_keys(b, tile);
    let begin = range.x;
    let end = range.y;
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
    var flow = Flow();
    if (params.sinks != 0u) {
        let lo_head = rows_at(lo_row, b, kv_head).head;
        let hi_head = rows_at(hi_row, b, kv_head).head;
        let lo = vec4<f32>(f32(sink[lo_head.x]), f32(sink[lo_head.y]), f32(sink[lo_head.z]), f32(sink[lo_head.w]));
        let hi = vec4<f32>(f32(sink[hi_head.x]), f32(sink[hi_head.y]), f32(sink[hi_head.z]), f32(sink[hi_head.w]));
        lo_top = select(lo * (LOG2E / UNIT), lo_top, are_hidden(lo));
        hi_top = select(hi * (LOG2E / UNIT), hi_top, are_hidden(hi));
        let one = vec4<f32>(select(0.0, 1.0, tx == 0u));
        flow.lo_sum = select(one, flow.lo_sum, are_hidden(lo));
        flow.hi_sum = select(one, flow.hi_sum, are_hidden(hi));
    }
    let place = Place(lane, ty, tx, all_from, all_to, column0, k_base, v_base, q_bases);
    if (begin < end) {
        flow.next_q = fetch_queries(lane, q_bases, 0u);
        flow.next = fetch_keys(lane, begin, end, k_base, 0u);
    }
    for (var key0 = begin; key0 < end; key0 += KEYS) {
        let full = key0 >= all_from && key0 + KEYS <= all_to;
        var x = Scores();
        var y = Scores(); // of a wide tile's second half
        for (var chunk = 0u; chunk < CHUNKS; chunk++) {
            workgroupBarrier();
            place_queries(lane, flow.next_q);
            place_keys(lane, flow.next);
            workgroupBarrier();
            if (chunk + 1u < CHUNKS) {
                flow.next_q = fetch_queries(lane, q_bases, chunk + 1u);
                flow.next = fetch_keys(lane, key0, end, k_base, chunk + 1u);
            } else {
                flow.next = fetch_values(lane, key0, end, v_base, column0);
            }
            let q_at = 4u * ty * PITCH;
            let k_at = K_AT + tx * PITCH;
            for (var c = 0u; c < CHUNK; c += 4u) {
                x = with_column(x, q_at + c, k_at + c);
                y = with_column(y, q_at + c, k_at + c + HALF * PITCH);
                x = with_column(x, q_at + c + 1u, k_at + c + 1u);
                y = with_column(y, q_at + c + 1u, k_at + c + 1u + HALF * PITCH);
                x = with_column(x, q_at + c + 2u, k_at + c + 2u);
                y = with_column(y, q_at + c + 2u, k_at + c + 2u + HALF * PITCH);
                x = with_column(x, q_at + c + 3u, k_at + c + 3u);
                y = with_column(y, q_at + c + 3u, k_at + c + 3u + HALF * PITCH);
            }
        }

        if (full) {
            x = all_finished(x);
            y = all_finished(y);
        } else {
            let lo = rows_at(lo_row, b, kv_head);
            let lo_firsts = firsts_of(b, lo.row);
            let lo_limits = limits_of(b, lo.row);
            let hi = rows_at(hi_row, b, kv_head);
            let hi_firsts = firsts_of(b, hi.row);
            let hi_limits = limits_of(b, hi.row);
            for (var j = key0 + tx; j < key0 + KEYS; j += HALF) {
                x.s0 = judge(x.s0, b, lo, j, lo_firsts, lo_limits);
                x.s1 = judge(x.s1, b, lo, j + 16u, lo_firsts, lo_limits);
                x.s2 = judge(x.s2, b, lo, j + 32u, lo_firsts, lo_limits);
                x.s3 = judge(x.s3, b, lo, j + 48u, lo_firsts, lo_limits);
                x.t0 = judge(x.t0, b, hi, j, hi_firsts, hi_limits);
                x.t1 = judge(x.t1, b, hi, j + 16u, hi_firsts, hi_limits);
                x.t2 = judge(x.t2, b, hi, j + 32u, hi_firsts, hi_limits);
                x.t3 = judge(x.t3, b, hi, j + 48u, hi_firsts, hi_limits);
                let other = y; // twice, so that each is where it was
                y = x;
                x = other;
            }
        }
        var lo_largest = max(max(x.s0, x.s1), max(x.s2, x.s3));
        var hi_largest = max(max(x.t0, x.t1), max(x.t2, x.t3));
        lo_largest = max(lo_largest, max(max(y.s0, y.s1), max(y.s2, y.s3)));
        hi_largest = max(hi_largest, max(max(y.t0, y.t1), max(y.t2, y.t3)));
        var lo_raised = max(lo_top, factor() * shuffled_max(lo_largest));
        var hi_raised = max(hi_top, factor() * shuffled_max(hi_largest));
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

        flow.lo_sum *= lo_change;
        flow.hi_sum *= hi_change;
        flow.acc.lo_a = rescaled(flow.acc.lo_a, lo_change);
        flow.acc.hi_a = rescaled(flow.acc.hi_a, hi_change);
        if (BLOCKS > 1u) {
            flow.acc.lo_b = rescaled(flow.acc.lo_b, lo_change);
            flow.acc.hi_b = rescaled(flow.acc.hi_b, hi_change);
        }
        flow = with_half(flow, x, place, key0, 0u, end, full, lo_top, hi_top);
        if (key0 + HALF < end) {
            workgroupBarrier();
            flow = with_half(flow, y, place, key0, HALF, end, full, lo_top, hi_top);
        }
    }

    var lo_sum = shuffled_sum(flow.lo_sum);
    var hi_sum = shuffled_sum(flow.hi_sum);
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
    let lo_norm = select(1.0 / lo_sum, vec4<f32>(), lo_sum == vec4<f32>());
    let hi_norm = select(1.0 / hi_sum, vec4<f32>(), hi_sum == vec4<f32>());
    let c = column0 + tx;
    store(rescaled(flow.acc.lo_a, lo_norm), lo_row, b, kv_head, 0u, c);
    store(rescaled(flow.acc.hi_a, hi_norm), hi_row, b, kv_head, 0u, c);
    if (BLOCKS > 1u) {
        store(rescaled(flow.acc.lo_b, lo_norm), lo_row, b, kv_head, 0u, c + 16u);
        store(rescaled(flow.acc.hi_b, hi_norm), hi_row, b, kv_head, 0u, c + 16u);
    }
}
