// Attention of many query rows: online softmax over tiles of keys, never an S x C score matrix.
//
//   out[b, s, h, :] = sum_j p_j value[b, j, h / group, :],  p = softmax_j(mask + cap(scale * query[b, s, h, :] . key[b, j, h / group, :]))
//
// One workgroup: QROWS query rows of one head, and at most 128 value columns (`PASSES` workgroups share wider heads, each computing the
// scores again). It walks over tiles of 32 keys from the first key that its first row sees to the last that its last row sees; other
// keys are never loaded. Lanes form a grid of GROUPS = QROWS / 4 by 8: lane (ty, tx) owns rows ty + GROUPS * r (r < 4), the scores of keys
// tx + 8 * i (i < 4) and output columns 32 * block + 4 * tx + e, so all its state stands in vectors and matrices of fixed names. Queries,
// keys and values pass through workgroup memory in chunks of at most 32 columns, hence its size depends on QROWS alone, whatever the
// head size. The sum is normalised once at the end; probabilities of hidden keys are -1 in a tile that has any, and are then
// passed over, so that what stands in hidden rows (NaN too) is of no effect.
//
// Memory traffic: K and V once for each tile of rows and each query head (heads of one KV head run next to each other, for the cache's
// sake); Q once for each key tile. Workgroup memory: 9 * 16 * (QROWS + 32) + 16 * 40 * GROUPS bytes (14.4 KiB at 32 rows).
// Versions tried: this one only.
// Appended: attention_whole.wgsl or ragged_rows.wgsl with attention_ragged.wgsl, attention_rules.wgsl, attention_scores.wgsl, attention_loads.wgsl.

@group(0) @binding(0) var<storage, read> query: array<Q>;
@group(0) @binding(1) var<storage, read> key: array<K>;
@group(0) @binding(2) var<storage, read> value: array<V>;
@group(0) @binding(3) var<storage, read> mask: array<Mask>;
@group(0) @binding(4) var<storage, read> sink: array<Sink>;
@group(0) @binding(5) var<storage, read_write> out: array<Out>;

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
}
@group(0) @binding(6) var<uniform> params: Params;
@group(0) @binding(7) var<uniform> live: array<vec4<i32>, 16>;
@group(0) @binding(8) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

const KEYS = 32u;
const CHUNK = 8u; // vec4 columns
const PITCH = 9u; // of a row in workgroup memory: not 8, so that lanes that read one column meet different banks
const GROUPS = QROWS / 4u;
const LANES = GROUPS * 8u;
const D4 = (D + 3u) / 4u;
const DV4 = (DV + 3u) / 4u;
const WIDTH = min(CHUNK, D4);

var<workgroup> q_tile: array<vec4<f32>, QROWS * PITCH>;
var<workgroup> kv_tile: array<vec4<f32>, KEYS * PITCH>;
var<workgroup> probs: array<vec4<f32>, KEYS * GROUPS>; // [key][ty], a component for each of the lane's rows
var<workgroup> exchange: array<vec4<f32>, 8u * GROUPS>; // [tx][ty]

/// The scores of one key against the lane's four rows, after cap, mask and the rows' ranges.
fn judge(dots: vec4<f32>, b: u32, h: u32, row: u32, j: u32, firsts: vec4<u32>, limits: vec4<u32>) -> vec4<f32> {
    var x = vec4<f32>(capped(dots.x), capped(dots.y), capped(dots.z), capped(dots.w));
    if (MASK != 0u && j < params.capacity) {
        let rows = rows_of(b);
        if (row < rows) { x.x = masked(x.x, b, h, row, j); }
        if (row + GROUPS < rows) { x.y = masked(x.y, b, h, row + GROUPS, j); }
        if (row + 2u * GROUPS < rows) { x.z = masked(x.z, b, h, row + 2u * GROUPS, j); }
        if (row + 3u * GROUPS < rows) { x.w = masked(x.w, b, h, row + 3u * GROUPS, j); }
    }
    return select(x, vec4<f32>(params.minus_inf), (vec4<u32>(j) >= limits) | (vec4<u32>(j) < firsts));
}

/// acc + probs * values for one block of 32 columns; acc[r] holds the lane's four columns of its row r.
fn weigh(acc: mat4x4<f32>, block: u32, key0: u32, end: u32, base: u32, lane: u32, full: bool) -> mat4x4<f32> {
    workgroupBarrier();
    for (var i = lane; i < KEYS * CHUNK; i += LANES) {
        let j = key0 + i / CHUNK;
        let c = block * CHUNK + i % CHUNK;
        var x = vec4<f32>();
        if (j < end && c < DV4) {
            x = load_value(base + j * params.v_s, c);
        }
        kv_tile[(i / CHUNK) * PITCH + i % CHUNK] = x;
    }
    workgroupBarrier();
    let ty = lane / 8u;
    let tx = lane % 8u;
    var o = acc;
    if (full) {
        for (var j = 0u; j < KEYS; j++) {
            let p = probs[j * GROUPS + ty];
            let v = kv_tile[j * PITCH + tx];
            o[0] += p.x * v;
            o[1] += p.y * v;
            o[2] += p.z * v;
            o[3] += p.w * v;
        }
    } else {
        let none = vec4<f32>();
        for (var j = 0u; j < KEYS; j++) {
            let p = probs[j * GROUPS + ty];
            let v = kv_tile[j * PITCH + tx];
            o[0] += select(p.x * v, none, p.x < 0.0);
            o[1] += select(p.y * v, none, p.y < 0.0);
            o[2] += select(p.z * v, none, p.z < 0.0);
            o[3] += select(p.w * v, none, p.w < 0.0);
        }
    }
    return o;
}

fn rescaled(acc: mat4x4<f32>, by: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(acc[0] * by.x, acc[1] * by.y, acc[2] * by.z, acc[3] * by.w);
}

fn store_row(own: vec4<f32>, b: u32, h: u32, row: u32, c: u32) {
    if (row >= params.rows || c >= DV) {
        return;
    }
    var x = own;
    if (RAGGED && row >= rows_of(b)) {
        x = vec4<f32>(); // padding
    }
    let at = b * params.o_b + row * params.o_s + h * params.o_h + c;
    out[at] = Out(x.x);
    if (c + 1u < DV) { out[at + 1u] = Out(x.y); }
    if (c + 2u < DV) { out[at + 2u] = Out(x.z); }
    if (c + 3u < DV) { out[at + 3u] = Out(x.w); }
}

fn store(acc: mat4x4<f32>, b: u32, h: u32, row: u32, c: u32) {
    store_row(acc[0], b, h, row, c);
    store_row(acc[1], b, h, row + GROUPS, c);
    store_row(acc[2], b, h, row + 2u * GROUPS, c);
    store_row(acc[3], b, h, row + 3u * GROUPS, c);
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let flat = wid.y * groups.x + wid.x;
    if (flat >= params.total) {
        return;
    }
    let h = flat % params.heads;
    let b = (flat / params.heads) % params.batch;
    let part = flat / params.heads / params.batch;
    let block0 = (part % PASSES) * 4u;
    let row0 = (params.tiles - 1u - part / PASSES) * QROWS; // the tiles with most keys first
    let last = min(row0 + QROWS, rows_of(b)) - 1u;
    let begin = key_first(b, row0);
    var end = key_limit(b, last);
    if (RAGGED && row0 >= rows_of(b)) {
        end = begin; // all rows are padding
    }
    let all_from = key_first(b, last); // keys in [all_from, all_to) are in the range of every row
    let all_to = key_limit(b, row0);

    let ty = lane / 8u;
    let tx = lane % 8u;
    let row = row0 + ty;
    let firsts = vec4<u32>(key_first(b, row), key_first(b, row + GROUPS), key_first(b, row + 2u * GROUPS), key_first(b, row + 3u * GROUPS));
    let limits = vec4<u32>(key_limit(b, row), key_limit(b, row + GROUPS), key_limit(b, row + 2u * GROUPS), key_limit(b, row + 3u * GROUPS));
    let q_base = b * params.q_b + h * params.q_h;
    let k_base = b * params.k_b + (h / params.group) * params.k_h;
    let v_base = b * params.v_b + (h / params.group) * params.v_h;

    var top = vec4<f32>(LOWEST); // the largest score of each row so far
    var sum = vec4<f32>(); // this lane's share of each row's sum
    if (params.sinks != 0u) {
        let logit = f32(sink[h]);
        if (!is_hidden(logit)) {
            top = vec4<f32>(logit);
            sum = vec4<f32>(select(0.0, 1.0, tx == 0u));
        }
    }
    var acc0 = mat4x4<f32>();
    var acc1 = mat4x4<f32>();
    var acc2 = mat4x4<f32>();
    var acc3 = mat4x4<f32>();

    for (var key0 = begin; key0 < end; key0 += KEYS) {
        let full = MASK == 0u && key0 >= all_from && key0 + KEYS <= all_to;
        var s = mat4x4<f32>(); // s[i][r]: key tx + 8 * i, row ty + GROUPS * r
        for (var chunk = 0u; chunk < D4; chunk += WIDTH) {
            workgroupBarrier();
            for (var i = lane; i < QROWS * WIDTH; i += LANES) {
                let c = chunk + i % WIDTH;
                var x = vec4<f32>();
                if (row0 + i / WIDTH <= last && c < D4) {
                    x = load_query(q_base + (row0 + i / WIDTH) * params.q_s, c);
                }
                q_tile[(i / WIDTH) * PITCH + i % WIDTH] = x;
            }
            for (var i = lane; i < KEYS * WIDTH; i += LANES) {
                let j = key0 + i / WIDTH;
                let c = chunk + i % WIDTH;
                var x = vec4<f32>();
                if (j < end && c < D4) {
                    x = load_key(k_base + j * params.k_s, c);
                }
                kv_tile[(i / WIDTH) * PITCH + i % WIDTH] = x;
            }
            workgroupBarrier();
            for (var c = 0u; c < WIDTH; c++) {
                let q = mat4x4<f32>(
                    q_tile[ty * PITCH + c],
                    q_tile[(ty + GROUPS) * PITCH + c],
                    q_tile[(ty + 2u * GROUPS) * PITCH + c],
                    q_tile[(ty + 3u * GROUPS) * PITCH + c],
                );
                s[0] += kv_tile[tx * PITCH + c] * q;
                s[1] += kv_tile[(tx + 8u) * PITCH + c] * q;
                s[2] += kv_tile[(tx + 16u) * PITCH + c] * q;
                s[3] += kv_tile[(tx + 24u) * PITCH + c] * q;
            }
        }

        let s0 = judge(s[0], b, h, row, key0 + tx, firsts, limits);
        let s1 = judge(s[1], b, h, row, key0 + tx + 8u, firsts, limits);
        let s2 = judge(s[2], b, h, row, key0 + tx + 16u, firsts, limits);
        let s3 = judge(s[3], b, h, row, key0 + tx + 24u, firsts, limits);
        exchange[tx * GROUPS + ty] = max(max(s0, s1), max(s2, s3));
        workgroupBarrier();
        var raised = top;
        for (var i = 0u; i < 8u; i++) {
            raised = max(raised, exchange[i * GROUPS + ty]);
        }
        let correction = exp(top - raised);
        top = raised;

        let zero = vec4<f32>();
        let hidden = vec4<f32>(select(-1.0, 0.0, full)); // a full tile's -inf is a score like others
        let p0 = exp(s0 - top);
        let p1 = exp(s1 - top);
        let p2 = exp(s2 - top);
        let p3 = exp(s3 - top);
        let h0 = are_hidden(s0);
        let h1 = are_hidden(s1);
        let h2 = are_hidden(s2);
        let h3 = are_hidden(s3);
        sum = sum * correction + select(p0, zero, h0) + select(p1, zero, h1) + select(p2, zero, h2) + select(p3, zero, h3);
        probs[tx * GROUPS + ty] = select(p0, hidden, h0);
        probs[(tx + 8u) * GROUPS + ty] = select(p1, hidden, h1);
        probs[(tx + 16u) * GROUPS + ty] = select(p2, hidden, h2);
        probs[(tx + 24u) * GROUPS + ty] = select(p3, hidden, h3);

        acc0 = weigh(rescaled(acc0, correction), block0, key0, end, v_base, lane, full);
        if (DV4 > 8u) {
            acc1 = weigh(rescaled(acc1, correction), block0 + 1u, key0, end, v_base, lane, full);
        }
        if (DV4 > 16u) {
            acc2 = weigh(rescaled(acc2, correction), block0 + 2u, key0, end, v_base, lane, full);
        }
        if (DV4 > 24u) {
            acc3 = weigh(rescaled(acc3, correction), block0 + 3u, key0, end, v_base, lane, full);
        }
    }

    workgroupBarrier();
    exchange[tx * GROUPS + ty] = sum;
    workgroupBarrier();
    var sums = vec4<f32>();
    for (var i = 0u; i < 8u; i++) {
        sums += exchange[i * GROUPS + ty];
    }
    let norm = select(1.0 / sums, vec4<f32>(), sums == vec4<f32>());
    let column = block0 * 32u + tx * 4u;
    store(rescaled(acc0, norm), b, h, row, column);
    if (DV4 > 8u) {
        store(rescaled(acc1, norm), b, h, row, column + 32u);
    }
    if (DV4 > 16u) {
        store(rescaled(acc2, norm), b, h, row, column + 64u);
    }
    if (DV4 > 24u) {
        store(rescaled(acc3, norm), b, h, row, column + 96u);
    }
}
