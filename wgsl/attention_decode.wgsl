// Attention of few query rows over many keys: one split of the keys, for all query heads of a KV head. `attention_merge` follows.
//
//   partial[row, split, :] = sum_j exp(x_j - top) value[b, j, hkv, :],  ml[row, split] = (top, sum_j exp(x_j - top)),  j in the split
//
// where x_j = mask + cap(scale * query . key_j) and top is the largest x_j of the split. Rows are the `group` query heads of the KV head
// times the query rows; one workgroup serves ROWS (1, 2, 4 or 8) of them, so K and V are read once for them all. `PASSES` workgroups share a
// value head of more than 256 columns. The range of each split follows from the live length: `split_keys` keys a split, a multiple of 32, the same
// in the merge; splits past the end leave at once and write nothing. Keys that no row sees are never loaded.
//
// 64 lanes walk over tiles of 32 keys. Scores: lane (g, x), x < 8, multiplies keys 4 * g .. 4 * g + 3 with the rows in vec4 columns x, x + 8, ..;
// the eight shares meet in workgroup memory, where lane (r, g) sums those of row r, applies cap and mask, and keeps the row's softmax state.
// Values: lane (sub, column) owns one vec4 column and every SUBS-th group of four keys; the shares are summed at the end.
//
// Memory traffic: K and V once for each ROWS rows, coalesced in 128-byte runs; partial results (DV + 2) * 4 bytes a row and split.
// Workgroup memory: ROWS * (1284 + 4 * D) bytes about; ops/attention_lower.py picks ROWS by it. Versions tried: this one only.
// Appended: attention_whole.wgsl or ragged_rows.wgsl with attention_ragged.wgsl, attention_rules.wgsl, attention_splits.wgsl, attention_scores.wgsl, attention_loads.wgsl.

@group(0) @binding(0) var<storage, read> query: array<Q>;
@group(0) @binding(1) var<storage, read> key: array<K>;
@group(0) @binding(2) var<storage, read> value: array<V>;
@group(0) @binding(3) var<storage, read> mask: array<Mask>;
@group(0) @binding(4) var<storage, read_write> partial: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> ml: array<vec2<f32>>;

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
    mask_b: u32, mask_h: u32, mask_s: u32, mask_k: u32,
    scale: f32,
    softcap: f32,
    minus_inf: f32,
    total: u32,
    row_tiles: u32,
}
@group(0) @binding(6) var<uniform> params: Params;
@group(0) @binding(7) var<uniform> live: array<vec4<i32>, 16>;
@group(0) @binding(8) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

const KEYS = 32u;
const LANES = 64u;
const D4 = (D + 3u) / 4u;
const DV4 = (DV + 3u) / 4u;

var<workgroup> queries: array<vec4<f32>, ROWS * D4>;
var<workgroup> shares: array<vec4<f32>, ROWS * 64u>; // [x][row][g] for scores; [sub][row][column] for values
var<workgroup> scores: array<vec4<f32>, ROWS * 8u>; // [row][g], a component for each of four keys
var<workgroup> probs: array<vec4<f32>, ROWS * 8u>;
var<workgroup> corrections: array<f32, ROWS>;

/// acc + the dot products of one vec4 column of four keys (the columns of k) with up to four rows from `first`.
fn multiply(acc: mat4x4<f32>, first: u32, c: u32, k: mat4x4<f32>) -> mat4x4<f32> {
    var s = acc;
    s[0] += queries[first * D4 + c] * k;
    if (ROWS > 1u) {
        s[1] += queries[(first + 1u) * D4 + c] * k;
    }
    if (ROWS > 2u) {
        s[2] += queries[(first + 2u) * D4 + c] * k;
        s[3] += queries[(first + 3u) * D4 + c] * k;
    }
    return s;
}

fn weighted(v: mat4x4<f32>, p: vec4<f32>, full: bool) -> vec4<f32> {
    if (full) {
        return v * p;
    }
    let none = vec4<f32>();
    return select(v[0] * p.x, none, p.x < 0.0) + select(v[1] * p.y, none, p.y < 0.0)
        + select(v[2] * p.z, none, p.z < 0.0) + select(v[3] * p.w, none, p.w < 0.0);
}

/// acc + the values of four keys (the columns of v) weighted for up to four rows from `first`.
fn weigh(acc: mat4x4<f32>, first: u32, g: u32, v: mat4x4<f32>, full: bool) -> mat4x4<f32> {
    var o = acc;
    o[0] += weighted(v, probs[first * 8u + g], full);
    if (ROWS > 1u) {
        o[1] += weighted(v, probs[(first + 1u) * 8u + g], full);
    }
    if (ROWS > 2u) {
        o[2] += weighted(v, probs[(first + 2u) * 8u + g], full);
        o[3] += weighted(v, probs[(first + 3u) * 8u + g], full);
    }
    return o;
}

fn rescaled(acc: mat4x4<f32>, first: u32) -> mat4x4<f32> {
    var o = acc;
    o[0] *= corrections[first];
    if (ROWS > 1u) {
        o[1] *= corrections[first + 1u];
    }
    if (ROWS > 2u) {
        o[2] *= corrections[first + 2u];
        o[3] *= corrections[first + 3u];
    }
    return o;
}

/// The four rows of a lane, put where the lanes of the other key groups find them: [sub][row][column].
fn share(acc: mat4x4<f32>, first: u32, sub: u32, column: u32) {
    let at = (sub * ROWS + first) * COLUMNS + column;
    shares[at] = acc[0];
    if (ROWS > 1u) {
        shares[at + COLUMNS] = acc[1];
    }
    if (ROWS > 2u) {
        shares[at + 2u * COLUMNS] = acc[2];
        shares[at + 3u * COLUMNS] = acc[3];
    }
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let flat = wid.y * groups.x + wid.x;
    if (flat >= params.total) {
        return;
    }
    let split = flat % SPLITS;
    let pass_index = (flat / SPLITS) % PASSES;
    let part = flat / SPLITS / PASSES;
    let tile0 = (part % params.row_tiles) * ROWS;
    let kv_heads = params.heads / params.group;
    let kv_head = (part / params.row_tiles) % kv_heads;
    let b = part / params.row_tiles / kv_heads;

    // the split's share of the keys that any row sees, then what of it the rows of this workgroup see
    let count = params.group * rows_of(b); // row number = query row * group + head in the group
    let seen = key_first(b, 0u);
    let split_begin = seen + split * split_keys(b);
    let split_end = min(split_begin + split_keys(b), key_limit(b, rows_of(b) - 1u));
    if (split_begin >= split_end || (RAGGED && tile0 >= count)) {
        return;
    }
    let row_a = tile0 / params.group;
    let row_z = (min(tile0 + ROWS, count) - 1u) / params.group;
    let begin = max(split_begin, key_first(b, row_a));
    let end = min(split_end, key_limit(b, row_z));
    let all_from = key_first(b, row_z); // keys in [all_from, all_to) are in the range of every row
    let all_to = key_limit(b, row_a);

    let k_base = b * params.k_b + kv_head * params.k_h;
    let v_base = b * params.v_b + kv_head * params.v_h;
    for (var i = lane; i < ROWS * D4; i += LANES) {
        let number = tile0 + i / D4;
        var q = vec4<f32>();
        if (number < count) {
            let h = kv_head * params.group + number % params.group;
            q = load_query(b * params.q_b + (number / params.group) * params.q_s + h * params.q_h, i % D4);
        }
        queries[i] = q;
    }
    workgroupBarrier();

    let x = lane % 8u; // of (g, x) while multiplying keys; lane (r, g) has r = lane / 8, g = lane % 8
    let number = tile0 + lane / 8u;
    let row = number / params.group;
    let h = kv_head * params.group + number % params.group;
    let holds = lane / 8u < ROWS && number < count;
    let row_first = key_first(b, row);
    let row_limit = key_limit(b, row);
    let column = lane % COLUMNS;
    let sub = lane / COLUMNS;
    let v_column = pass_index * 64u + column;
    let weighs = sub < SUBS && v_column < DV4;

    var top = LOWEST;
    var sum = 0.0; // this lane's share
    var low = mat4x4<f32>();
    var high = mat4x4<f32>();
    for (var key0 = begin; key0 < end; key0 += KEYS) {
        let full = MASK == 0u && key0 >= all_from && key0 + KEYS <= min(all_to, end);
        var s_low = mat4x4<f32>(); // s[r]: row r against the four keys
        var s_high = mat4x4<f32>();
        let j0 = key0 + 4u * (lane / 8u);
        for (var c = x; c < D4; c += 8u) {
            var k = mat4x4<f32>();
            if (j0 < end) { k[0] = load_key(k_base + j0 * params.k_s, c); }
            if (j0 + 1u < end) { k[1] = load_key(k_base + (j0 + 1u) * params.k_s, c); }
            if (j0 + 2u < end) { k[2] = load_key(k_base + (j0 + 2u) * params.k_s, c); }
            if (j0 + 3u < end) { k[3] = load_key(k_base + (j0 + 3u) * params.k_s, c); }
            s_low = multiply(s_low, 0u, c, k);
            if (ROWS > 4u) {
                s_high = multiply(s_high, 4u, c, k);
            }
        }
        let at = x * ROWS * 8u + lane / 8u;
        shares[at] = s_low[0];
        if (ROWS > 1u) {
            shares[at + 8u] = s_low[1];
        }
        if (ROWS > 2u) {
            shares[at + 16u] = s_low[2];
            shares[at + 24u] = s_low[3];
        }
        if (ROWS > 4u) {
            shares[at + 32u] = s_high[0];
            shares[at + 40u] = s_high[1];
            shares[at + 48u] = s_high[2];
            shares[at + 56u] = s_high[3];
        }
        workgroupBarrier();

        var s = vec4<f32>(params.minus_inf);
        let mine = key0 + 4u * x;
        if (holds) {
            s = shares[lane];
            for (var i = 1u; i < 8u; i++) {
                s += shares[i * ROWS * 8u + lane];
            }
            s = vec4<f32>(capped(s.x), capped(s.y), capped(s.z), capped(s.w));
            let keys = vec4<u32>(mine, mine + 1u, mine + 2u, mine + 3u);
            let limit = min(row_limit, end);
            if (MASK != 0u) {
                if (keys.x < limit) { s.x = masked(s.x, b, h, row, keys.x); }
                if (keys.y < limit) { s.y = masked(s.y, b, h, row, keys.y); }
                if (keys.z < limit) { s.z = masked(s.z, b, h, row, keys.z); }
                if (keys.w < limit) { s.w = masked(s.w, b, h, row, keys.w); }
            }
            let out_of_range = (keys >= vec4<u32>(limit)) | (keys < vec4<u32>(row_first));
            s = select(s, vec4<f32>(params.minus_inf), out_of_range);
        }
        if (lane < ROWS * 8u) {
            scores[lane] = s;
        }
        workgroupBarrier();

        if (lane < ROWS * 8u) {
            var raised = vec4<f32>(top);
            for (var i = 0u; i < 8u; i++) {
                raised = max(raised, scores[(lane / 8u) * 8u + i]);
            }
            let highest = max(max(raised.x, raised.y), max(raised.z, raised.w));
            let correction = exp(top - highest);
            top = highest;
            let p = exp(s - top);
            let hidden = are_hidden(s);
            let counted = select(p, vec4<f32>(), hidden);
            sum = sum * correction + (counted.x + counted.y + counted.z + counted.w);
            probs[lane] = select(p, vec4<f32>(select(-1.0, 0.0, full)), hidden);
            if (x == 0u) {
                corrections[lane / 8u] = correction;
            }
        }
        workgroupBarrier();

        if (weighs) {
            low = rescaled(low, 0u);
            if (ROWS > 4u) {
                high = rescaled(high, 4u);
            }
            for (var g = sub; g < 8u; g += SUBS) {
                let j = key0 + 4u * g;
                var v = mat4x4<f32>();
                if (j < end) { v[0] = load_value(v_base + j * params.v_s, v_column); }
                if (j + 1u < end) { v[1] = load_value(v_base + (j + 1u) * params.v_s, v_column); }
                if (j + 2u < end) { v[2] = load_value(v_base + (j + 2u) * params.v_s, v_column); }
                if (j + 3u < end) { v[3] = load_value(v_base + (j + 3u) * params.v_s, v_column); }
                low = weigh(low, 0u, g, v, full);
                if (ROWS > 4u) {
                    high = weigh(high, 4u, g, v, full);
                }
            }
        }
    }

    workgroupBarrier();
    if (lane < ROWS * 8u) {
        scores[lane] = vec4<f32>(top, sum, 0.0, 0.0);
    }
    if (weighs) {
        share(low, 0u, sub, column);
        if (ROWS > 4u) {
            share(high, 4u, sub, column);
        }
    }
    workgroupBarrier();

    // row `number` of this KV head is row (b * heads + h) * rows + s of the partial results
    for (var i = lane; i < ROWS * COLUMNS; i += LANES) {
        let n = tile0 + i / COLUMNS;
        let c = pass_index * 64u + i % COLUMNS;
        if (n < count && c < DV4) {
            var total = vec4<f32>();
            for (var k = 0u; k < SUBS; k++) {
                total += shares[k * ROWS * COLUMNS + i];
            }
            let head = kv_head * params.group + n % params.group;
            let result = (b * params.heads + head) * params.rows + n / params.group;
            partial[(result * SPLITS + split) * DV4 + c] = total;
        }
    }
    if (holds && x == 0u && pass_index == 0u) {
        var total = 0.0;
        for (var k = 0u; k < 8u; k++) {
            total += scores[lane + k].y;
        }
        let result = (b * params.heads + h) * params.rows + row;
        ml[result * SPLITS + split] = vec2<f32>(top, total);
    }
}
