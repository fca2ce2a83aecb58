// Few rows from the input of a decoder layer to its attention in one dispatch, for devices with subgroups that bind more than 8 storage buffers:
//
//     query_out[b, s] = rotated(q),  key_cache[b, start_pos + s] = rotated(k),  value_cache[b, start_pos + s] = v
//     q, k, v = xn w_0^T + b_0, xn w_1^T + b_1, xn w_2^T + b_2  of row m = b * S + s of x
//
// xn and the constants are those of gemv_stream.wgsl; `rotated`, cache rows, padding (RAGGED) and `sizes` those of rope_cache.wgsl and
// rope_cache_grids.wgsl. A vector of a head has D elements, of which the first ROT turn.
//
// A workgroup: COLUMNS rows of one weight, for ROWS rows of x; PASSES of them have the same columns. Up to ends.x they are those of query, up to
// ends.y of key, up to ends.z of value, and one more, where SIZED, writes `sizes`. LANES invocations share a run of PER weight rows, neighbours in
// memory. Both elements of a pair are sums of one workgroup: where pairs are neighbours (INTERLEAVED, D even) they are in one run, PER being even;
// where they are ROT / 2 apart, every run of the first half of a head is followed by the run of its partners (WG / LANES is even then), and the runs
// of elements that are copied come after those of all heads. A run that begins near the end of a half or of a head is shorter than PER: what is past
// it is computed and not stored.
//
// Memory traffic: all weights once; x (and norm) once a workgroup; a table row a vector; the results. The elements of the table are asked for before
// the loop over K, so that nothing waits for them after it.
// Unchecked: weight rows are clamped below N_i, rows of x below m, cells are below params.cells; columns stored are below N_i, rows below m; cache
// rows are start_pos .. start_pos + rows - 1 with start_pos in 0 .. last, where last = capacity - rows, or past .. past + new - 1 with new clamped to
// capacity - past; table rows are clamped to table_rows - 1; sizes has 8 elements.
// Versions tried (one NVIDIA H200, one row, K 2,048, 2,048 + 512 + 512 columns of 4 bits, a step of 16 layers): gemv_stream_siblings.wgsl and then
// rope_cache_sizes.wgsl 677 us; this kernel with the table read after the loop 642; as it is 634. See docs/KERNELS.md.
// Appended: those of gemv_stream_siblings.wgsl; gemv_stream_cache_biases.wgsl or gemv_stream_cache_plain.wgsl; ragged_rows.wgsl,
// rope_cache_positions.wgsl, attention_whole.wgsl or attention_ragged.wgsl, attention_rules.wgsl, attention_splits.wgsl, rope_cache_grids.wgsl.

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read> w0: array<Raw>;
@group(0) @binding(2) var<storage, read> w1: array<Raw>;
@group(0) @binding(3) var<storage, read> w2: array<Raw>;
@group(0) @binding(4) var<storage, read> norm: array<Norm>;
@group(0) @binding(5) var<storage, read> cosines: array<Cos>;
@group(0) @binding(6) var<storage, read> sines: array<Sin>;
@group(0) @binding(7) var<storage, read_write> query_out: array<QOut>;
@group(0) @binding(8) var<storage, read_write> key_cache: array<KCache>;
@group(0) @binding(9) var<storage, read_write> value_cache: array<VCache>;
@group(0) @binding(10) var<storage, read_write> sizes: array<u32>;

struct Params {
    n: vec4<u32>,
    ends: vec4<u32>, // workgroups up to the end of query, key and value
    split_grid: vec4<u32>,
    merge_grid: vec4<u32>,
    m: u32,
    cells: u32, // of 16 bytes in a row of weights, scales included
    k: f32,
    eps: f32,
    start_pos: u32, // slot: first cache row that is written
    start: u32, // slot: table row of the first position
    last: i32, // largest start_pos: capacity - rows
    rows: u32, // positions S
    capacity: u32, // rows of the caches
    table_rows: u32,
    batch: u32,
    limit: u32,
    window: u32,
    span: vec4<f32>, // of codes, where x is quantised: low, high, least scale, shift
}
@group(0) @binding(11) var<uniform> params: Params;
@group(0) @binding(12) var<uniform> live: array<vec4<i32>, 16>;
@group(0) @binding(13) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

const RUNS = WG / LANES; // of a workgroup
const SIDE = ROT / 2u;
const TURNING = (SIDE + PER - 1u) / PER; // runs of a half of a head
const COPIED = (D - ROT + PER - 1u) / PER; // runs of the rest of a head
const PAIRS = RUNS * PER / 2u; // of columns of a workgroup

/// Weight rows first .. first + count - 1, and whether they turn with those of the neighbouring run.
struct Run {
    first: u32,
    count: u32,
    turns: bool,
}

/// Run number i of a weight of n rows; `plain`: runs simply follow each other.
fn run_of(i: u32, n: u32, plain: bool) -> Run {
    if (plain) {
        let first = i * PER;
        return Run(first, min(PER, n - min(first, n)), false);
    }
    let turning = n / D * 2u * TURNING;
    if (i < turning) {
        let at = i / 2u % TURNING * PER;
        return Run(i / 2u / TURNING * D + (i & 1u) * SIDE + at, min(PER, SIDE - at), true);
    }
    let at = ROT + (i - turning) % max(COPIED, 1u) * PER;
    let first = (i - turning) / max(COPIED, 1u) * D + at;
    return Run(first, select(0u, min(PER, D - at), first < n), false);
}

/// Two columns of a row of x, counted from row0: their runs in the workgroup and places in these, their columns in the result (n: none), and, where
/// the two turn, the element of the table row.
struct Two {
    row: u32,
    runs: vec2<u32>,
    places: vec2<u32>,
    columns: vec2<u32>,
    turns: bool,
    pair: u32,
}

/// Columns number j of a workgroup whose first run is `first`.
fn two_of(j: u32, first: u32, which: u32, n: u32) -> Two {
    let plain = INTERLEAVED || which == 2u;
    let p = j % PAIRS;
    var t = Two(j / PAIRS, vec2<u32>(p * 2u / PER), p * 2u % PER + vec2<u32>(0u, 1u), vec2<u32>(n), false, 0u);
    if (!plain) {
        t.runs = p / PER * 2u + vec2<u32>(0u, 1u);
        t.places = vec2<u32>(p % PER);
    }
    let a = run_of(first + t.runs.x, n, plain);
    let b = run_of(first + t.runs.y, n, plain);
    if (t.places.x < a.count) {
        t.columns.x = a.first + t.places.x;
    }
    if (t.places.y < b.count) {
        t.columns.y = b.first + t.places.y;
    }
    let element = t.columns.x % D;
    t.turns = which < 2u && t.columns.x < n && select(a.turns, element < ROT, INTERLEAVED);
    t.pair = select(element, element / 2u, INTERLEAVED);
    return t;
}

/// Cosine and sine of the first column and of the second.
fn table_of(t: Two) -> vec4<f32> {
    let row = row0 + t.row;
    if (!t.turns || row >= params.m) {
        return vec4<f32>();
    }
    let at = table_row(row / params.rows, row % params.rows) * WIDTH + t.pair;
    let second = at + select(0u, SIDE, WIDTH == ROT);
    return vec4<f32>(f32(cosines[at]), f32(sines[at]), f32(cosines[second]), f32(sines[second]));
}

fn sum_of(t: Two, i: u32, which: u32, scale: f32) -> f32 {
    return met(t.runs[i], t.row, t.places[i]) * scale + bias_of(which, t.columns[i]);
}

fn store(which: u32, t: Two, column: u32, n: u32, y: f32) {
    let row = row0 + t.row;
    let b = row / params.rows;
    let s = row % params.rows;
    let padding = is_padding(b, s);
    if (which == 0u) {
        query_out[row * n + column] = QOut(select(y, 0.0, padding));
        return;
    }
    let first = first_row(b);
    if (first < 0 || padding) {
        return;
    }
    let at = (b * params.capacity + u32(first) + s) * n + column;
    if (which == 1u) {
        key_cache[at] = KCache(y);
    } else {
        value_cache[at] = VCache(y);
    }
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.y * grid.x + wid.x;
    let flat = group / PASSES;
    if (flat >= params.ends.z) {
        if (SIZED && group == params.ends.z * PASSES && lane == 0u) {
            write_sizes();
        }
        return;
    }
    row0 = group % PASSES * ROWS;
    var which = 0u;
    var n = params.n.x;
    var first = flat * RUNS;
    if (flat >= params.ends.y) {
        which = 2u;
        n = params.n.z;
        first = (flat - params.ends.y) * RUNS;
    } else if (flat >= params.ends.x) {
        which = 1u;
        n = params.n.y;
        first = (flat - params.ends.x) * RUNS;
    }
    var ready = vec4<f32>();
    if (lane < PAIRS * ROWS) {
        ready = table_of(two_of(lane, first, which, n));
    }
    let column = run_of(first + lane / LANES, n, INTERLEAVED || which == 2u).first;
    // three calls, so that each loop has one buffer to read
    if (which == 0u) {
        stream(0u, column, n, lane);
    } else if (which == 1u) {
        stream(1u, column, n, lane);
    } else {
        stream(2u, column, n, lane);
    }
    workgroupBarrier();
    for (var j = lane; j < PAIRS * ROWS; j += WG) {
        let t = two_of(j, first, which, n);
        var turn = ready;
        if (j != lane) {
            turn = table_of(t);
        }
        if (row0 + t.row < params.m) {
            let scale = factor(t.runs.x, t.row); // that of the other run is the same
            var u = 0.0;
            var v = 0.0;
            if (t.columns.x < n) {
                u = sum_of(t, 0u, which, scale);
            }
            if (t.columns.y < n) {
                v = sum_of(t, 1u, which, scale);
            }
            if (t.turns) {
                let turned = vec2<f32>(u * turn.x - v * turn.y, v * turn.z + u * turn.w);
                u = turned.x;
                v = turned.y;
            }
            if (t.columns.x < n) {
                store(which, t, t.columns.x, n, u);
            }
            if (t.columns.y < n) {
                store(which, t, t.columns.y, n, v);
            }
        }
    }
}
