// No kernel: the loop over K of `gemv_stream` and `gemv_stream_siblings` for packed weights (ops/packed.py), and how sums meet; appended to them. For
// devices with subgroups of at least 8.
//
// A cell of 16 bytes holds 32 or 16 columns of one group. LANES invocations share COLS rows of weights, a cell each at a time. x goes through
// workgroup memory in chunks of CHUNK cells, as DIGITS signed digits of 8 bits: one instruction then multiplies four codes with a digit of four
// columns, where floats would need a mask, a subtraction and a product for each code. gemv_stream_packed_digits cuts floats into two or three of
// them; activations of 8 bits are one: gemv_stream_packed_codes takes them (ops/activations.py), gemv_stream_packed_quantize makes them.
//
// Sixteen bytes of the digits of neighbouring cells are neighbours in workgroup memory. Where x is one chunk, it stays for SETS sets of COLS rows.
// Many lanes hide the waits: but for the first weights beside few rows of x (EARLY), what is asked for ahead takes registers that are worth more.
// Sums of a lane's COLS rows meet by shuffles that halve their number, so that lanes end with a row each. Versions: docs/KERNELS.md.
//
// Needs: params.m, params.cells, params.k, params.eps; fn raw(which, at), raw_word(which, at); const WG, LANES, MEET (lanes of LANES that meet by
// shuffles), COLS, ROWS (1 to 8), UNROLL, CHUNK (a multiple of LANES * UNROLL), SETS, DIGITS, GATED, NORM, NORM_WEIGHT; GROUP_CELLS (cells that
// share a scale), SCALE_WORDS, SCALE_F16, ZEROS; X and Norm, vectors of four; what gemv_stream_packed_<COLS>, gemv_stream_packed_digits or _codes,
// and gemv_stream_bits_4 or _8 define.

alias Raw = vec4<u32>;

const SET = select(COLS, COLS / 2u, GATED); // columns of the result that LANES invocations make at a time
const PER = SETS * SET;
const COLUMNS = WG / LANES * PER;
const SPLIT = LANES / MEET;
const HALF = CELL_QUADS / 4u; // 16 bytes of a digit of a cell
const ROW = CHUNK * DIGITS * HALF; // of digits of a row of x
const EARLY = ROWS < 3u && UNROLL == 1u; // whether a chunk's first weights are asked for before its x is waited for

var<private> row0: u32; // the first of the ROWS rows of x
var<workgroup> xs: array<vec4<u32>, ROWS * ROW>; // [row][digit][half][cell]
var<workgroup> totals: array<f32, select(1u, ROWS * CHUNK, ZEROS)>; // of a cell's integers, times FACTOR
var<workgroup> partial: array<f32, WG / MEET * SETS * ROWS * COLS>;
var<workgroup> squares: array<f32, WG / MEET * ROWS>;

/// By row of x: sums of a lane. `low` and `high` are sums of squares of rows 0 to 3 and 4 to 7.
struct State {
    s0: Sums, s1: Sums, s2: Sums, s3: Sums, s4: Sums, s5: Sums, s6: Sums, s7: Sums,
}

struct Squares { low: vec4<f32>, high: vec4<f32> }

/// The weight that the c-th of COLS rows is taken from, where the workgroup's own is `which`.
fn source(which: u32, c: u32) -> u32 {
    return select(which, c / SET, GATED);
}

/// Where the c-th row of weights begins, in cells; a row past the end is the last.
fn begin(first: u32, c: u32, n: u32) -> u32 {
    return min(first + c % SET, n - 1u) * params.cells;
}

/// Cells of codes in a row.
fn code_cells() -> u32 {
    return (u32(params.k) + 4u * CELL_QUADS - 1u) / (4u * CELL_QUADS);
}

/// A number of a group of the row that begins at cell `at`; those of the first begin `words` after the codes.
fn group_float(which: u32, at: u32, words: u32, group: u32) -> f32 {
    let word = words + select(group, group / 2u, SCALE_F16);
    let found = raw_word(which, at + code_cells() + word / 4u, word % 4u);
    if (SCALE_F16) {
        return unpack2x16float(found >> (16u * (group & 1u))).x;
    }
    return bitcast<f32>(found);
}

/// The scale of cell i of the row that begins at cell `at`.
fn scale_of(which: u32, at: u32, i: u32) -> f32 {
    return group_float(which, at, 0u, i / GROUP_CELLS);
}

/// What the sum of a cell's x is multiplied with and taken off: codes come as differences from the middle of their range.
fn zero_of(which: u32, at: u32, i: u32) -> f32 {
    if (ZEROS) {
        return group_float(which, at, SCALE_WORDS, i / GROUP_CELLS) - MIDDLE;
    }
    return 0.0;
}

/// The sums with a cell of each row of weights, the i-th of the chunk.
fn add(before: State, w: Cells, i: u32) -> State {
    let c = decode(w);
    var t = before;
    t.s0 += scaled(w, c, 0u, i);
    if (ROWS > 1u) { t.s1 += scaled(w, c, 1u, i); }
    if (ROWS > 2u) { t.s2 += scaled(w, c, 2u, i); }
    if (ROWS > 3u) { t.s3 += scaled(w, c, 3u, i); }
    if (ROWS > 4u) { t.s4 += scaled(w, c, 4u, i); }
    if (ROWS > 5u) { t.s5 += scaled(w, c, 5u, i); }
    if (ROWS > 6u) { t.s6 += scaled(w, c, 6u, i); }
    if (ROWS > 7u) { t.s7 += scaled(w, c, 7u, i); }
    return t;
}

/// Cell i of the rows that begin at `at`; past the end the last one, whose x is 0.
fn load_cell(which: u32, at: vec4<u32>, i: u32) -> Cells {
    return load(which, at, min(i, code_cells() - 1u));
}

fn rows_at(first: u32, n: u32) -> vec4<u32> {
    return vec4<u32>(begin(first, 0u, n), begin(first, 1u, n), begin(first, 2u, n), begin(first, 3u, n));
}

/// Sums of this lane's LANES invocations over PER columns from `first` on, left in workgroup memory.
fn stream(which: u32, first: u32, n: u32, lane: u32) {
    let own = lane % LANES;
    let cells = code_cells();
    let single = cells <= CHUNK;
    var sq = Squares();
    for (var turn = 0u; turn < SETS; turn++) {
        let at = rows_at(first + turn * SET, n);
        var t = State();
        for (var chunk = 0u; chunk < cells; chunk += CHUNK) {
            var w0 = Cells();
            if (EARLY) {
                w0 = load_cell(which, at, chunk + own);
            }
            if (turn == 0u || !single) {
                let found = stage(sq, chunk, lane);
                if (turn == 0u) {
                    sq = found;
                }
                workgroupBarrier();
            }
            for (var i = 0u; i < CHUNK; i += UNROLL * LANES) {
                if (!EARLY || i > 0u) {
                    w0 = load_cell(which, at, chunk + i + own);
                }
                var w1 = Cells();
                if (UNROLL > 1u) {
                    w1 = load_cell(which, at, chunk + i + own + LANES);
                }
                t = add(t, w0, i + own);
                if (UNROLL > 1u) {
                    t = add(t, w1, i + own + LANES);
                }
            }
            if (!single) {
                workgroupBarrier();
            }
        }
        let slot = (lane / MEET * SETS + turn) * ROWS;
        meet(slot, t.s0, lane);
        if (ROWS > 1u) { meet(slot + 1u, t.s1, lane); }
        if (ROWS > 2u) { meet(slot + 2u, t.s2, lane); }
        if (ROWS > 3u) { meet(slot + 3u, t.s3, lane); }
        if (ROWS > 4u) { meet(slot + 4u, t.s4, lane); }
        if (ROWS > 5u) { meet(slot + 5u, t.s5, lane); }
        if (ROWS > 6u) { meet(slot + 6u, t.s6, lane); }
        if (ROWS > 7u) { meet(slot + 7u, t.s7, lane); }
    }
    if (NORM) {
        for (var step = 1u; step < MEET; step *= 2u) {
            sq.low += subgroupShuffleXor(sq.low, step);
            if (ROWS > 4u) {
                sq.high += subgroupShuffleXor(sq.high, step);
            }
        }
        if (lane % MEET == 0u) {
            let slot = lane / MEET * ROWS;
            squares[slot] = sq.low.x;
            if (ROWS > 1u) { squares[slot + 1u] = sq.low.y; }
            if (ROWS > 2u) { squares[slot + 2u] = sq.low.z; }
            if (ROWS > 3u) { squares[slot + 3u] = sq.low.w; }
            if (ROWS > 4u) { squares[slot + 4u] = sq.high.x; }
            if (ROWS > 5u) { squares[slot + 5u] = sq.high.y; }
            if (ROWS > 6u) { squares[slot + 6u] = sq.high.z; }
            if (ROWS > 7u) { squares[slot + 7u] = sq.high.w; }
        }
    }
}

/// After a barrier: the dot product of a row of x with the c-th row of weights of a group of LANES invocations; where GATED, those of the second
/// weight follow after PER.
fn met(group: u32, row: u32, c: u32) -> f32 {
    let place = c % PER;
    let turn = place / SET;
    let column = place % SET + c / PER * SET;
    var sum = 0.0;
    for (var k = 0u; k < SPLIT; k++) {
        sum += partial[(((group * SPLIT + k) * SETS + turn) * ROWS + row) * COLS + column];
    }
    return sum;
}
