// Attention of few query rows over many keys, for devices with subgroups: cache rows stream through registers. `attention_merge` follows
// where there is more than one split.
//
//   partial[row, split, :] = sum_j exp(x_j - top) value[b, j, hkv, :],  ml[row, split] = (top, sum_j exp(x_j - top)),  j in the split
//
// where x_j = mask + cap(scale * query . key_j) and top is the largest x_j of the split; with one split, the result itself. Rows are the
// `group` query heads of a KV head times the query rows. One workgroup: one split of the keys for TILES tiles of ROWS (1, 2 or 4) rows.
// L lanes share a cache row, 8 columns each (16-byte loads); L lanes times TILES tiles make a slot, whose lanes read the same row, so that K
// and V leave memory once for all rows of the tiles. SLOTS slots take FLIGHT = 4 keys each a round, the keys of the next round are fetched before
// the scores of this one are computed. Dot products are summed by shuffles within the L lanes; every lane keeps its row's softmax state
// so the loop has no barrier. Slots meet at the end: by shuffles within SUBGROUP lanes, then in workgroup memory.
//
// Memory traffic: (D + DV) * element size bytes a key and KV head, once; partial results (DV + 2) * 4 bytes a row and split.
// Work a key and row tile, in the 32 lanes of two slots: 4 * (D + DV) / 16 multiply-adds, D / 8 conversions, log2(L) * ROWS shuffles.
// Unchecked: keys are below `end` <= capacity, columns below D and DV, rows below `count`; results and splits are the grid's.
// Versions: docs/KERNELS.md.
// Appended: attention_rules.wgsl, attention_splits.wgsl, attention_scores_only.wgsl, attention_cells_f16.wgsl or attention_cells_f32.wgsl.

@group(0) @binding(0) var<storage, read> query: array<Q>;
@group(0) @binding(1) var<storage, read> key: array<Cell>;
@group(0) @binding(2) var<storage, read> value: array<Cell>;
@group(0) @binding(3) var<storage, read> mask: array<Mask>;
@group(0) @binding(4) var<storage, read> sink: array<Sink>;
@group(0) @binding(5) var<storage, read_write> partial: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> ml: array<vec2<f32>>;
@group(0) @binding(7) var<storage, read_write> out: array<Out>;

struct Params {
    start_pos: u32,
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
    parts: u32, // batch rows times KV heads times row tiles
    row_tiles: u32,
    splits: u32,
    split_tile: u32,
}
@group(0) @binding(8) var<uniform> params: Params;
@group(0) @binding(9) var<uniform> live: array<vec4<i32>, 16>;

const LOG2E: f32 = 1.4426950408889634;
const LN2: f32 = 0.6931471805599453;
const FLIGHT = 4u;
const GROUPS = LANES / L;
const SLOTS = GROUPS / TILES;
const STEP = SLOTS * FLIGHT;
const SPAN = max(min(SUBGROUP, LANES), L * TILES); // lanes whose slots meet by shuffles
const BLOCKS = LANES / SPAN; // what meets in workgroup memory
const DV4 = DV / 4u;

var<workgroup> tops: array<vec4<f32>, BLOCKS * TILES>;
var<workgroup> sums: array<vec4<f32>, BLOCKS * TILES>;
var<workgroup> shares: array<vec4<f32>, max(BLOCKS / 2u, 1u) * TILES * L * ROWS * 2u>;

/// e^x of a difference of scores. Where nothing but the scale is applied to them they are kept in units of ln 2, which saves a product.
fn power(x: vec4<f32>) -> vec4<f32> {
    if (PLAIN) {
        return exp2(x);
    }
    return exp(x);
}

/// The dot products of one lane's 8 columns of a key with those of its rows, summed over the L lanes.
fn score(k: mat2x4<f32>, q0: mat4x4<f32>, q1: mat4x4<f32>) -> vec4<f32> {
    if (ROWS == 1u) {
        var x = dot(k[0], q0[0]) + dot(k[1], q1[0]);
        for (var step = 1u; step < L; step *= 2u) {
            x += subgroupShuffleXor(x, step);
        }
        return vec4<f32>(x, 0.0, 0.0, 0.0);
    }
    if (ROWS == 2u) {
        var x = vec2<f32>(dot(k[0], q0[0]) + dot(k[1], q1[0]), dot(k[0], q0[1]) + dot(k[1], q1[1]));
        for (var step = 1u; step < L; step *= 2u) {
            x += subgroupShuffleXor(x, step);
        }
        return vec4<f32>(x, 0.0, 0.0);
    }
    var x = k[0] * q0 + k[1] * q1;
    for (var step = 1u; step < L; step *= 2u) {
        x += subgroupShuffleXor(x, step);
    }
    return x;
}

fn scaled(acc: mat4x4<f32>, c: vec4<f32>) -> mat4x4<f32> {
    var o = acc;
    o[0] *= c.x;
    if (ROWS > 1u) { o[1] *= c.y; }
    if (ROWS > 2u) { o[2] *= c.z; o[3] *= c.w; }
    return o;
}

/// acc + the products of four columns of four keys (the columns of v) with the weights of each row.
fn added(acc: mat4x4<f32>, v: vec4<f32>, p: vec4<f32>) -> mat4x4<f32> {
    var o = acc;
    o[0] += p.x * v;
    if (ROWS > 1u) { o[1] += p.y * v; }
    if (ROWS > 2u) { o[2] += p.z * v; o[3] += p.w * v; }
    return o;
}

/// As `added`, where what a key that is hidden from a row holds must not reach it.
fn added_seen(acc: mat4x4<f32>, v: vec4<f32>, p: vec4<f32>, hidden: vec4<bool>) -> mat4x4<f32> {
    var o = acc;
    if (!hidden.x) { o[0] += p.x * v; }
    if (ROWS > 1u) { if (!hidden.y) { o[1] += p.y * v; } }
    if (ROWS > 2u) {
        if (!hidden.z) { o[2] += p.z * v; }
        if (!hidden.w) { o[3] += p.w * v; }
    }
    return o;
}

fn exchanged(acc: mat4x4<f32>, step: u32) -> mat4x4<f32> {
    var o = acc;
    o[0] += subgroupShuffleXor(acc[0], step);
    if (ROWS > 1u) { o[1] += subgroupShuffleXor(acc[1], step); }
    if (ROWS > 2u) {
        o[2] += subgroupShuffleXor(acc[2], step);
        o[3] += subgroupShuffleXor(acc[3], step);
    }
    return o;
}

/// Row number -> (query row, head).
fn place(number: u32, kv_head: u32) -> vec2<u32> {
    return vec2<u32>(number / params.group, kv_head * params.group + number % params.group);
}

fn query_columns(number: u32, count: u32, b: u32, kv_head: u32, column: u32) -> vec4<f32> {
    if (number >= count || column >= D) {
        return vec4<f32>();
    }
    let at = place(number, kv_head);
    let x = vec4<f32>(query[(b * params.q_b + at.x * params.q_s + at.y * params.q_h + column) >> 2u]);
    return x * (params.scale * select(1.0, LOG2E, PLAIN));
}

/// Scores of one key after cap, mask and the rows' ranges; hidden ones are -inf.
fn judged(x: vec4<f32>, b: u32, tile0: u32, count: u32, kv_head: u32, j: u32) -> vec4<f32> {
    var s = vec4<f32>(capped(x.x), capped(x.y), capped(x.z), capped(x.w));
    for (var r = 0u; r < ROWS; r++) {
        let number = tile0 + r;
        if (number >= count) {
            continue;
        }
        let at = place(number, kv_head);
        if (j >= key_limit(b, at.x) || j < key_first(b, at.x)) {
            s[r] = params.minus_inf;
        } else if (MASK != 0u) {
            s[r] = masked(s[r], b, at.y, at.x, j);
        }
    }
    return s;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let part = wid.z * groups.y + wid.y;
    if (part >= params.parts) {
        return;
    }
    let split = wid.x;
    let first_row = (part % params.row_tiles) * (TILES * ROWS);
    let kv_heads = params.heads / params.group;
    let kv_head = (part / params.row_tiles) % kv_heads;
    let b = part / params.row_tiles / kv_heads;

    // the split's share of the keys that any row sees
    let split_begin = key_first(b, 0u) + split * split_keys(b);
    let split_end = min(split_begin + split_keys(b), key_limit(b, rows_of(b) - 1u));
    let alone = used_splits(b) <= 1u; // no merge follows: this is the result
    if (split_begin >= split_end && !(alone && split == 0u)) {
        return;
    }
    // ... and what of it the rows of this workgroup see
    let count = params.group * rows_of(b); // row number = query row * group + head in the group
    let last_row = min(first_row + TILES * ROWS, count) - 1u;
    let begin = max(split_begin, key_first(b, first_row / params.group));
    let end = min(split_end, key_limit(b, last_row / params.group));

    let l = lane % L;
    let tile = (lane / L) % TILES;
    let slot = lane / L / TILES;
    let tile0 = first_row + tile * ROWS;
    let k_base = b * params.k_b + kv_head * params.k_h;
    let v_base = b * params.v_b + kv_head * params.v_h;
    let c0 = cell_column(l, 0u);
    let c1 = cell_column(l, 1u);
    var q0 = mat4x4<f32>();
    var q1 = mat4x4<f32>();
    q0[0] = query_columns(tile0, count, b, kv_head, c0);
    q1[0] = query_columns(tile0, count, b, kv_head, c1);
    if (ROWS > 1u) {
        q0[1] = query_columns(tile0 + 1u, count, b, kv_head, c0);
        q1[1] = query_columns(tile0 + 1u, count, b, kv_head, c1);
    }
    if (ROWS > 2u) {
        q0[2] = query_columns(tile0 + 2u, count, b, kv_head, c0);
        q1[2] = query_columns(tile0 + 2u, count, b, kv_head, c1);
        q0[3] = query_columns(tile0 + 3u, count, b, kv_head, c0);
        q1[3] = query_columns(tile0 + 3u, count, b, kv_head, c1);
    }

    var top = vec4<f32>(LOWEST);
    var sum = vec4<f32>();
    var acc0 = mat4x4<f32>();
    var acc1 = mat4x4<f32>();
    var j = begin + slot;
    var k0 = load_key(j < end, k_base + j * params.k_s, l);
    var k1 = load_key(j + SLOTS < end, k_base + (j + SLOTS) * params.k_s, l);
    var k2 = load_key(j + 2u * SLOTS < end, k_base + (j + 2u * SLOTS) * params.k_s, l);
    var k3 = load_key(j + 3u * SLOTS < end, k_base + (j + 3u * SLOTS) * params.k_s, l);
    for (var key0 = begin; key0 < end; key0 += STEP) {
        j = key0 + slot;
        let v0 = load_value(j < end, v_base + j * params.v_s, l);
        let v1 = load_value(j + SLOTS < end, v_base + (j + SLOTS) * params.v_s, l);
        let v2 = load_value(j + 2u * SLOTS < end, v_base + (j + 2u * SLOTS) * params.v_s, l);
        let v3 = load_value(j + 3u * SLOTS < end, v_base + (j + 3u * SLOTS) * params.v_s, l);
        let n = j + STEP;
        let n0 = load_key(n < end, k_base + n * params.k_s, l);
        let n1 = load_key(n + SLOTS < end, k_base + (n + SLOTS) * params.k_s, l);
        let n2 = load_key(n + 2u * SLOTS < end, k_base + (n + 2u * SLOTS) * params.k_s, l);
        let n3 = load_key(n + 3u * SLOTS < end, k_base + (n + 3u * SLOTS) * params.k_s, l);

        var s0 = score(wide(k0), q0, q1);
        var s1 = score(wide(k1), q0, q1);
        var s2 = score(wide(k2), q0, q1);
        var s3 = score(wide(k3), q0, q1);
        let out_of_range = vec4<bool>(j >= end, j + SLOTS >= end, j + 2u * SLOTS >= end, j + 3u * SLOTS >= end);
        if (PLAIN) {
            // every row sees every key: only what lies past the end is left out
            s0 = select(s0, vec4<f32>(LOWEST), out_of_range.x);
            s1 = select(s1, vec4<f32>(LOWEST), out_of_range.y);
            s2 = select(s2, vec4<f32>(LOWEST), out_of_range.z);
            s3 = select(s3, vec4<f32>(LOWEST), out_of_range.w);
        } else {
            if (!out_of_range.x) { s0 = judged(s0, b, tile0, count, kv_head, j); }
            if (!out_of_range.y) { s1 = judged(s1, b, tile0, count, kv_head, j + SLOTS); }
            if (!out_of_range.z) { s2 = judged(s2, b, tile0, count, kv_head, j + 2u * SLOTS); }
            if (!out_of_range.w) { s3 = judged(s3, b, tile0, count, kv_head, j + 3u * SLOTS); }
        }
        let h0 = are_hidden(s0) | vec4<bool>(out_of_range.x);
        let h1 = are_hidden(s1) | vec4<bool>(out_of_range.y);
        let h2 = are_hidden(s2) | vec4<bool>(out_of_range.z);
        let h3 = are_hidden(s3) | vec4<bool>(out_of_range.w);
        let raised = max(top, max(max(select(s0, top, h0), select(s1, top, h1)), max(select(s2, top, h2), select(s3, top, h3))));
        let correction = power(top - raised);
        top = raised;
        let p0 = select(power(s0 - top), vec4<f32>(), h0);
        let p1 = select(power(s1 - top), vec4<f32>(), h1);
        let p2 = select(power(s2 - top), vec4<f32>(), h2);
        let p3 = select(power(s3 - top), vec4<f32>(), h3);
        sum = sum * correction + ((p0 + p1) + (p2 + p3));
        acc0 = scaled(acc0, correction);
        acc1 = scaled(acc1, correction);
        let w0 = wide(v0);
        let w1 = wide(v1);
        let w2 = wide(v2);
        let w3 = wide(v3);
        if (PLAIN) {
            acc0 = added(added(added(added(acc0, w0[0], p0), w1[0], p1), w2[0], p2), w3[0], p3);
            acc1 = added(added(added(added(acc1, w0[1], p0), w1[1], p1), w2[1], p2), w3[1], p3);
        } else {
            acc0 = added_seen(added_seen(added_seen(added_seen(acc0, w0[0], p0, h0), w1[0], p1, h1), w2[0], p2, h2), w3[0], p3, h3);
            acc1 = added_seen(added_seen(added_seen(added_seen(acc1, w0[1], p0, h0), w1[1], p1, h1), w2[1], p2, h2), w3[1], p3, h3);
        }
        k0 = n0;
        k1 = n1;
        k2 = n2;
        k3 = n3;
    }

    // slots of one subgroup
    for (var step = L * TILES; step < SPAN; step *= 2u) {
        let highest = max(top, subgroupShuffleXor(top, step));
        let correction = power(top - highest);
        top = highest;
        sum *= correction;
        sum += subgroupShuffleXor(sum, step);
        acc0 = exchanged(scaled(acc0, correction), step);
        acc1 = exchanged(scaled(acc1, correction), step);
    }
    // blocks of lanes: a tree in workgroup memory
    let block = lane / SPAN;
    let leads = lane % SPAN < L * TILES;
    if (BLOCKS > 1u) {
        if (leads && l == 0u) {
            tops[block * TILES + tile] = top;
        }
        workgroupBarrier();
        var highest = top;
        for (var i = 0u; i < BLOCKS; i++) {
            highest = max(highest, tops[i * TILES + tile]);
        }
        let correction = power(top - highest);
        top = highest;
        sum *= correction;
        acc0 = scaled(acc0, correction);
        acc1 = scaled(acc1, correction);
        if (leads && l == 0u) {
            sums[block * TILES + tile] = sum;
        }
        for (var half = BLOCKS / 2u; half > 0u; half /= 2u) {
            if (leads && block >= half && block < 2u * half) {
                let at = (((block - half) * TILES + tile) * L + l) * (ROWS * 2u);
                shares[at] = acc0[0];
                shares[at + 1u] = acc1[0];
                if (ROWS > 1u) {
                    shares[at + 2u] = acc0[1];
                    shares[at + 3u] = acc1[1];
                }
                if (ROWS > 2u) {
                    shares[at + 4u] = acc0[2];
                    shares[at + 5u] = acc1[2];
                    shares[at + 6u] = acc0[3];
                    shares[at + 7u] = acc1[3];
                }
            }
            workgroupBarrier();
            if (leads && block < half) {
                let at = ((block * TILES + tile) * L + l) * (ROWS * 2u);
                acc0[0] += shares[at];
                acc1[0] += shares[at + 1u];
                if (ROWS > 1u) {
                    acc0[1] += shares[at + 2u];
                    acc1[1] += shares[at + 3u];
                }
                if (ROWS > 2u) {
                    acc0[2] += shares[at + 4u];
                    acc1[2] += shares[at + 5u];
                    acc0[3] += shares[at + 6u];
                    acc1[3] += shares[at + 7u];
                }
            }
            workgroupBarrier();
        }
        if (block == 0u) {
            sum = sums[tile];
            for (var i = 1u; i < BLOCKS; i++) {
                sum += sums[i * TILES + tile];
            }
        }
    }
    if (!leads || block != 0u) {
        return;
    }
    store_row(tile0, count, b, kv_head, split, l, alone, acc0[0], acc1[0], top.x, sum.x);
    if (ROWS > 1u) {
        store_row(tile0 + 1u, count, b, kv_head, split, l, alone, acc0[1], acc1[1], top.y, sum.y);
    }
    if (ROWS > 2u) {
        store_row(tile0 + 2u, count, b, kv_head, split, l, alone, acc0[2], acc1[2], top.z, sum.z);
        store_row(tile0 + 3u, count, b, kv_head, split, l, alone, acc0[3], acc1[3], top.w, sum.w);
    }
}

fn store_row(number: u32, count: u32, b: u32, kv_head: u32, split: u32, l: u32, alone: bool, x0: vec4<f32>, x1: vec4<f32>, top: f32, sum: f32) {
    if (number >= count) {
        return;
    }
    let at = place(number, kv_head);
    let natural = top * select(1.0, LN2, PLAIN);
    let c0 = cell_column(l, 0u);
    let c1 = cell_column(l, 1u);
    if (alone) {
        var total = sum;
        var factor = 1.0;
        if (params.sinks != 0u) {
            let logit = f32(sink[at.y]);
            if (!is_hidden(logit)) {
                let raised = max(natural, logit);
                factor = exp(natural - raised);
                total = sum * factor + exp(logit - raised);
            }
        }
        let norm = select(factor / total, 0.0, total == 0.0);
        let o = b * params.o_b + at.x * params.o_s + at.y * params.o_h;
        if (c0 < DV) { out[(o + c0) >> 2u] = Out(x0 * norm); }
        if (c1 < DV) { out[(o + c1) >> 2u] = Out(x1 * norm); }
        return;
    }
    let result = ((b * params.heads + at.y) * params.rows + at.x) * params.splits + split;
    if (c0 < DV) { partial[result * DV4 + (c0 >> 2u)] = x0; }
    if (c1 < DV) { partial[result * DV4 + (c1 >> 2u)] = x1; }
    if (l == 0u) {
        ml[result] = vec2<f32>(natural, sum);
    }
}
