// Attention of few query rows over many keys, for devices with subgroups: cache rows stream through registers. `attention_merge` follows
// where there is more than one split.
//
//   partial[row, split, :] = sum_j exp(x_j - top) value[b, j, hkv, :],  ml[row, split] = (top, sum_j exp(x_j - top)),  j in the split
//
// where x_j = mask + cap(scale * query . key_j) and top is the largest x_j of the split; with one split, the result itself. Rows are the
// GROUP query heads of a KV head times the query rows. One workgroup: one split of the keys for TILES tiles of ROWS (1, 2 or 4) rows.
// L lanes share a cache row, 8 columns each (16-byte loads); L lanes times TILES tiles make a slot, whose lanes read the same row, so that K
// and V leave memory once for all rows of the tiles. Each of SLOTS slots takes four keys a round. The dot products of four keys are summed over
// the L lanes by shuffles so that each lane of a quad ends with one of the keys, and OVER quads with ROWS / OVER of the rows each: it alone applies
// mask and exponential, and the weights go back to all lanes by shuffles between quads and quad broadcasts. The softmax state is in registers and
// rescaled only when a maximum rises by more than SLACK: the loop has no barrier.
// Slots meet at the end: by shuffles within SUBGROUP lanes, then in workgroup memory, after one barrier. Multiply-adds are written out, so that
// variants of the text (with and without lengths) round alike.
//
// Ragged batches: a batch row's keys are split by its own length, so the workgroups past its splits leave, as do those of which all rows are
// padding; split 0 writes zeros for the padding.
//
// Memory traffic: (D + DV) * element size bytes a key and KV head, once; partial results (DV + 2) * 4 bytes a row and split.
// Unchecked: keys are below `end` <= capacity, columns below D and DV, rows below `count`; splits, heads and batch rows are the grid's.
// Versions: docs/KERNELS.md.
// Appended: attention_whole.wgsl or ragged_rows.wgsl with attention_ragged.wgsl, attention_rules.wgsl, attention_splits.wgsl, attention_scores.wgsl,
// attention_rows_<ROWS>.wgsl, attention_own_rows.wgsl or attention_own_<n>_of_<ROWS>.wgsl,
// attention_stream_plain.wgsl or attention_stream_judged.wgsl, attention_stream_whole.wgsl or attention_stream_ragged.wgsl, and
// attention_cells_<type of the caches>.wgsl: f16, f32; i8, i4 with attention_scales.wgsl, which need a device that binds 10 storage buffers.

@group(0) @binding(0) var<storage, read> query: array<Q>;
@group(0) @binding(1) var<storage, read> key: array<Cell>;
@group(0) @binding(2) var<storage, read> value: array<Cell>;
@group(0) @binding(3) var<storage, read> mask: array<Mask>;
@group(0) @binding(4) var<storage, read> sink: array<Sink>;
@group(0) @binding(5) var<storage, read_write> partial: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> ml: array<vec2<f32>>;
@group(0) @binding(7) var<storage, read_write> out: array<Out>;

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
}
@group(0) @binding(8) var<uniform> params: Params;
@group(0) @binding(9) var<uniform> live: array<vec4<i32>, 16>;
@group(0) @binding(10) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

const GROUPS = LANES / L;
const SLOTS = GROUPS / TILES;
const STEP = SLOTS * 4u;
const SPAN = max(min(SUBGROUP, LANES), L * TILES); // lanes whose slots meet by shuffles
const BLOCKS = LANES / SPAN; // what meets in workgroup memory
const PAIRS = SPAN > L * TILES; // more than one slot meets by shuffles
const WIDTH = 2u * L; // vec4 columns that the lanes of a row hold
const DV4 = DV / 4u;

var<workgroup> shares: array<vec4<f32>, BLOCKS * TILES * ROWS * WIDTH>;
var<workgroup> tops: array<f32, BLOCKS * TILES * ROWS>;
var<workgroup> sums: array<f32, BLOCKS * TILES * ROWS>;

/// The dot product of eight columns. A chain of multiply-adds: a vector times a matrix costs an addition more.
fn chained(k: mat2x4<f32>, a: vec4<f32>, b: vec4<f32>) -> f32 {
    let x = fma(k[0].w, a.w, fma(k[0].z, a.z, fma(k[0].y, a.y, k[0].x * a.x)));
    return fma(k[1].w, b.w, fma(k[1].z, b.z, fma(k[1].y, b.y, fma(k[1].x, b.x, x))));
}

/// The scores of four keys, summed over the L lanes that share them: lane l of a slot gets those of its rows and of key l % 4.
fn scattered(s0: Rows, s1: Rows, s2: Rows, s3: Rows, lane: u32) -> Own {
    let x0 = own_of(s0);
    let x1 = own_of(s1);
    let x2 = own_of(s2);
    let x3 = own_of(s3);
    let upper = (lane & 2u) != 0u;
    let a = select(x0, x2, upper) + subgroupShuffleXor(select(x2, x0, upper), 2u);
    let b = select(x1, x3, upper) + subgroupShuffleXor(select(x3, x1, upper), 2u);
    let odd = (lane & 1u) != 0u;
    var x = select(a, b, odd) + subgroupShuffleXor(select(b, a, odd), 1u);
    for (var step = 4u * OVER; step < L; step *= 2u) {
        x += subgroupShuffleXor(x, step);
    }
    return x;
}

/// The largest over the four keys of a quad.
fn quad_max(x: Own) -> Own {
    let y = max(x, subgroupShuffleXor(x, 1u));
    return max(y, subgroupShuffleXor(y, 2u));
}

/// Row number -> (query row, head).
fn place(number: u32, kv_head: u32) -> vec2<u32> {
    return vec2<u32>(number / GROUP, kv_head * GROUP + number % GROUP);
}

fn query_columns(number: u32, count: u32, b: u32, kv_head: u32, column: u32) -> vec4<f32> {
    if (number >= count || column >= D) {
        return vec4<f32>();
    }
    let at = place(number, kv_head);
    return vec4<f32>(query[(b * params.q_b + at.x * params.q_s + at.y * params.q_h + column) >> 2u]);
}

/// Four columns of the rows of a tile, row r ^ turn in the place of row r.
fn query_tile(tile0: u32, turn: u32, count: u32, b: u32, kv_head: u32, column: u32) -> Tile {
    var x1 = vec4<f32>();
    var x2 = vec4<f32>();
    var x3 = vec4<f32>();
    if (ROWS > 1u) { x1 = query_columns(tile0 + (1u ^ turn), count, b, kv_head, column); }
    if (ROWS > 2u) {
        x2 = query_columns(tile0 + (2u ^ turn), count, b, kv_head, column);
        x3 = query_columns(tile0 + (3u ^ turn), count, b, kv_head, column);
    }
    return tile_of(query_columns(tile0 + turn, count, b, kv_head, column), x1, x2, x3);
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    // tiles of rows that read the same keys, then heads whose keys lie side by side, run next to each other
    let flat = wid.y * groups.x + wid.x;
    let split = flat / HEAD_TILES;
    let first_row = (flat % ROW_TILES) * (TILES * ROWS);
    let kv_head = flat % HEAD_TILES / ROW_TILES;
    let b = wid.z;
    if (without_rows(lane, first_row, split, b, kv_head)) {
        return;
    }

    // the split's share of the keys that any row sees
    let size = split_keys(b);
    let split_begin = key_first(b, 0u) + split * size;
    let split_end = min(split_begin + size, key_limit(b, rows_of(b) - 1u));
    let alone = seen_keys(b) <= size; // no merge follows: this is the result
    if (split_begin >= split_end && !(alone && split == 0u)) {
        return;
    }
    // ... and what of it the rows of this workgroup see
    let count = GROUP * rows_of(b); // row number = query row * group + head in the group
    let last_row = min(first_row + TILES * ROWS, count) - 1u;
    let begin = max(split_begin, key_first(b, first_row / GROUP));
    let end = min(split_end, key_limit(b, last_row / GROUP));

    let l = lane % L;
    let tile = (lane / L) % TILES;
    let slot = lane / L / TILES;
    let tile0 = first_row + tile * ROWS;
    let turn = turn_of(lane);
    let k_base = b * params.k_b + kv_head * params.k_h;
    let v_base = b * params.v_b + kv_head * params.v_h;
    var j = begin + slot;
    var k0 = Raw();
    var k1 = Raw();
    var k2 = Raw();
    var k3 = Raw();
    if (PREFETCH) {
        k0 = key_cell(j < end, k_base + j * params.k_s, l);
        k1 = key_cell(j + SLOTS < end, k_base + (j + SLOTS) * params.k_s, l);
        k2 = key_cell(j + 2u * SLOTS < end, k_base + (j + 2u * SLOTS) * params.k_s, l);
        k3 = key_cell(j + 3u * SLOTS < end, k_base + (j + 3u * SLOTS) * params.k_s, l);
    }
    let q0 = query_tile(tile0, turn, count, b, kv_head, cell_column(l, 0u));
    let q1 = query_tile(tile0, turn, count, b, kv_head, cell_column(l, 1u));

    var top = Rows(FLOOR);
    var own_sum = Own();
    var acc0 = Tile();
    var acc1 = Tile();
    for (var key0 = begin; key0 < end; key0 += STEP) {
        j = key0 + slot;
        if (!PREFETCH) {
            k0 = key_cell(j < end, k_base + j * params.k_s, l);
            k1 = key_cell(j + SLOTS < end, k_base + (j + SLOTS) * params.k_s, l);
            k2 = key_cell(j + 2u * SLOTS < end, k_base + (j + 2u * SLOTS) * params.k_s, l);
            k3 = key_cell(j + 3u * SLOTS < end, k_base + (j + 3u * SLOTS) * params.k_s, l);
        }
        let v0 = value_cell(j < end, v_base + j * params.v_s, l);
        let v1 = value_cell(j + SLOTS < end, v_base + (j + SLOTS) * params.v_s, l);
        let v2 = value_cell(j + 2u * SLOTS < end, v_base + (j + 2u * SLOTS) * params.v_s, l);
        let v3 = value_cell(j + 3u * SLOTS < end, v_base + (j + 3u * SLOTS) * params.v_s, l);
        let s0 = products(wide(k0), q0, q1);
        let s1 = products(wide(k1), q0, q1);
        let s2 = products(wide(k2), q0, q1);
        let s3 = products(wide(k3), q0, q1);
        if (PREFETCH) { // the keys of the next round
            let n = j + STEP;
            k0 = key_cell(n < end, k_base + n * params.k_s, l);
            k1 = key_cell(n + SLOTS < end, k_base + (n + SLOTS) * params.k_s, l);
            k2 = key_cell(n + 2u * SLOTS < end, k_base + (n + 2u * SLOTS) * params.k_s, l);
            k3 = key_cell(n + 3u * SLOTS < end, k_base + (n + 3u * SLOTS) * params.k_s, l);
        }
        let own = j + (lane % 4u) * SLOTS; // the key that this lane judges
        let x = judged(scattered(s0, s1, s2, s3, lane), b, tile0 + turn, count, kv_head, own, end);
        let most = quad_max(x);
        let own_top = kept(top); // maxima so far, less SLACK at most
        let raised = spread(select(own_top, most, most > own_top + Own(SLACK)));
        if (differ(raised, top)) {
            let correction = power(top - raised);
            own_sum *= kept(correction);
            acc0 = scaled(acc0, correction);
            acc1 = scaled(acc1, correction);
            top = raised;
        }
        let own_p = weights(x, kept(top));
        own_sum += mass(own_p);
        let p = spread(own_p);
        let p0 = quadBroadcast(p, 0u);
        let p1 = quadBroadcast(p, 1u);
        let p2 = quadBroadcast(p, 2u);
        let p3 = quadBroadcast(p, 3u);
        let w0 = wide(v0);
        let w1 = wide(v1);
        let w2 = wide(v2);
        let w3 = wide(v3);
        acc0 = gathered(gathered(gathered(gathered(acc0, w0[0], p0), w1[0], p1), w2[0], p2), w3[0], p3);
        acc1 = gathered(gathered(gathered(gathered(acc1, w0[1], p0), w1[1], p1), w2[1], p2), w3[1], p3);
    }

    // the keys of a quad, then the slots of one subgroup, of which two exchange halves of their columns first
    own_sum += subgroupShuffleXor(own_sum, 1u);
    own_sum += subgroupShuffleXor(own_sum, 2u);
    var sum = spread(own_sum);
    let upper = PAIRS && (lane & (L * TILES)) != 0u;
    for (var step = L * TILES; step < SPAN; step *= 2u) {
        let highest = max(top, subgroupShuffleXor(top, step));
        let correction = power(top - highest);
        top = highest;
        sum = fma(sum, correction, subgroupShuffleXor(sum * correction, step));
        if (step == L * TILES) {
            acc0 = exchanged(acc0, acc1, correction, upper, step);
        } else {
            acc0 = summed(acc0, correction, step);
        }
    }
    let block = lane / SPAN;
    if (lane % SPAN < select(1u, 2u, PAIRS) * L * TILES) {
        for (var r = 0u; r < ROWS; r++) {
            let at = (block * TILES + tile) * ROWS + (r ^ turn);
            shares[at * WIDTH + (cell_column(l, select(0u, 1u, upper)) >> 2u)] = row_of(acc0, r);
            if (!PAIRS) {
                shares[at * WIDTH + (cell_column(l, 1u) >> 2u)] = row_of(acc1, r);
            }
            if (l == 0u && !upper) {
                tops[at] = number_of(top, r);
                sums[at] = number_of(sum, r);
            }
        }
    }
    workgroupBarrier();

    for (var i = lane; i < TILES * ROWS * DV4; i += LANES) {
        let row = i / DV4;
        let c = i % DV4;
        let number = first_row + row;
        if (number >= count) {
            continue;
        }
        var highest = tops[row];
        for (var k = 1u; k < BLOCKS; k++) {
            highest = max(highest, tops[k * TILES * ROWS + row]);
        }
        var total = 0.0;
        var result = vec4<f32>();
        for (var k = 0u; k < BLOCKS; k++) {
            let at = k * TILES * ROWS + row;
            let correction = number_of(power(Rows(tops[at] - highest)), 0u);
            total = fma(sums[at], correction, total);
            result = fma(shares[at * WIDTH + c], vec4<f32>(correction), result);
        }
        store(place(number, kv_head), b, split, c, alone, result, highest * UNIT, total);
    }
}

/// Column c (of vec4) of a row's result, or partial result, whose scores' maximum is `top`.
fn store(at: vec2<u32>, b: u32, split: u32, c: u32, alone: bool, x: vec4<f32>, top: f32, sum: f32) {
    if (alone) {
        var total = sum;
        var factor = 1.0;
        if (params.sinks != 0u) {
            let logit = f32(sink[at.y]);
            if (!is_hidden(logit)) {
                let raised = max(top, logit);
                factor = exp(top - raised);
                total = fma(sum, factor, exp(logit - raised));
            }
        }
        let norm = select(factor / total, 0.0, total == 0.0);
        out[((b * params.o_b + at.x * params.o_s + at.y * params.o_h) >> 2u) + c] = Out(x * norm);
        return;
    }
    let result = ((b * params.heads + at.y) * params.rows + at.x) * SPLITS + split;
    partial[result * DV4 + c] = x;
    if (c == 0u) {
        ml[result] = vec2<f32>(top, sum);
    }
}
