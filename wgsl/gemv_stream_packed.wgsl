// No kernel: the loop over K of `gemv_stream` and `gemv_stream_siblings` for packed weights (ops/packed.py), and how sums meet; appended to them. For
// devices with subgroups of at least 8.
//
// A cell of 16 bytes holds 32 or 16 columns of one group. LANES invocations share COLS rows of weights, a cell each at a time. x goes through
// workgroup memory in chunks of CHUNK cells, multiplied with the norm's weight and cut, cell by cell, into integers and a unit, and these into DIGITS
// signed digits of 8 bits: one instruction then multiplies four codes with a digit of four columns, where floats would need a mask, a subtraction
// and a product for each code. With m the largest magnitude in a cell, 2^e <= m < 2^(e + 1):
//
//   DIGITS 3: integers below 2^22, the unit is 2^(e - 21); x is off by at most 2^(e - 22), as much as rounding m to 23 bits.
//   DIGITS 2: integers up to 32,512, the unit is 2^(e - 14) * 128 / 127; x is off by at most 2^(e - 15) * 128 / 127 <= 1.008 * 2^-15 * m. For x that
//     the graph has in 16 bits: to round m to the 11 bits of a float16 costs up to 2^(e - 11), to the 8 of a bfloat16 2^(e - 8), so this is
//     at most 1 / 15.8, or 1 / 127, of that. A product with a row of weights w is off by at most 1.008 * 2^-15 * sum over cells of m * sum |w|.
//
// Sixteen bytes of the digits of neighbouring cells are neighbours in workgroup memory. Where x is one chunk, it stays for SETS sets of COLS rows.
// Many lanes hide the waits: but for the first weights beside few rows of x (EARLY), what is asked for ahead takes registers that are worth more.
// Sums of a lane's COLS rows meet by shuffles that halve their number, so that lanes end with a row each. Versions: docs/KERNELS.md.
//
// Needs: params.m, params.cells, params.k, params.eps; fn raw(which, at), raw_word(which, at); const WG, LANES, MEET (lanes of LANES that meet by
// shuffles), COLS, ROWS (1 to 8), UNROLL, CHUNK (a multiple of LANES * UNROLL), SETS, DIGITS, GATED, NORM, NORM_WEIGHT; GROUP_CELLS (cells that
// share a scale), SCALE_WORDS, SCALE_F16, ZEROS; X and Norm, vectors of four; what gemv_stream_packed_<COLS> and gemv_stream_bits_4 or _8 define.

alias Raw = vec4<u32>;

const SET = select(COLS, COLS / 2u, GATED); // columns of the result that LANES invocations make at a time
const PER = SETS * SET;
const COLUMNS = WG / LANES * PER;
const SPLIT = LANES / MEET;
const HALF = CELL_QUADS / 4u; // 16 bytes of a digit of a cell
const ROW = CHUNK * DIGITS * HALF; // of digits of a row of x
const EARLY = ROWS < 3u && UNROLL == 1u; // whether a chunk's first weights are asked for before its x is waited for
const STEPS = (CHUNK * CELL_QUADS + WG - 1u) / WG;

var<private> row0: u32; // the first of the ROWS rows of x
var<workgroup> xs: array<vec4<u32>, ROWS * ROW>; // [row][digit][half][cell]
var<workgroup> units: array<f32, ROWS * CHUNK>; // of a cell's integers, over FACTOR
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

/// Digits of four integers, lowest first: bytes of a word each.
struct Cut { a: u32, b: u32, c: u32 }

/// Four columns of a cell whose largest exponent is `power`; adding a large number rounds to integers, and adds to each digit but the highest 128.
fn cut(v: vec4<f32>, power: u32) -> Cut {
    if (DIGITS == 2u) {
        let y = bitcast<vec4<u32>>(v * bitcast<f32>(0x85fe0000u - (power << 23u)) + vec4<f32>(12583040.0));
        let even = (y.x & 0xffffu) | (y.z << 16u);
        let odd = (y.y & 0xffffu) | (y.w << 16u);
        return Cut(lower(even, odd) ^ 0x80808080u, upper(even, odd), 0u);
    }
    let y = bitcast<vec4<u32>>(v * bitcast<f32>((275u - power) << 23u) + vec4<f32>(12582912.0)) + vec4<u32>(0xb5408080u);
    let even = (y.x & 0xffffu) | (y.z << 16u);
    let odd = (y.y & 0xffffu) | (y.w << 16u);
    let high = lower((y.x >> 16u) | (y.z & 0xffff0000u), (y.y >> 16u) | (y.w & 0xffff0000u));
    return Cut(lower(even, odd) ^ 0x80808080u, upper(even, odd) ^ 0x80808080u, high ^ 0x80808080u);
}

/// The lower bytes of four numbers of 16 bits.
fn lower(even: u32, odd: u32) -> u32 {
    return (even & 0xff00ffu) | ((odd & 0xff00ffu) << 8u);
}

fn upper(even: u32, odd: u32) -> u32 {
    return ((even >> 8u) & 0xff00ffu) | (odd & 0xff00ff00u);
}

/// The unit of integers of that power, over FACTOR; a NaN where x is not finite.
fn unit_of(power: u32) -> f32 {
    var bits = (power - 21u) << 23u;
    if (DIGITS == 2u) {
        bits = ((power - 14u) << 23u) | 0x10204u; // 128 / 127
    }
    return bitcast<f32>(select(bits, 0x7fc00000u, power == 255u)) / FACTOR;
}

/// The sum of the integers that c was cut from, of four columns.
fn total_of(c: Cut) -> i32 {
    var sum = dot4I8Packed(c.a, 0x01010101u) + 256 * dot4I8Packed(c.b, 0x01010101u);
    if (DIGITS > 2u) {
        sum += 65536 * dot4I8Packed(c.c, 0x01010101u);
    }
    return sum;
}

/// Four columns of row `row0 + row` of x, the `quad`-th; 0 where not `valid`.
fn fetch(row: u32, quad: u32, valid: bool) -> vec4<f32> {
    let quads = u32(params.k) / 4u;
    return select(vec4<f32>(), vec4<f32>(x[min(row0 + row, params.m - 1u) * quads + min(quad, quads - 1u)]), valid);
}

/// Put four columns, the j-th of a chunk, of a row of x into workgroup memory; returns the sum of their squares before g.
fn place(row: u32, j: u32, given: vec4<f32>, g: vec4<f32>) -> f32 {
    var v = given;
    if (NORM_WEIGHT) {
        v *= g;
    }
    let bits = bitcast<vec4<u32>>(v) & vec4<u32>(0x7fffffffu);
    var most = max(max(bits.x, bits.y), max(bits.z, bits.w)); // as integers, so that what is not finite wins
    for (var hop = 1u; hop < CELL_QUADS; hop *= 2u) {
        most = max(most, subgroupShuffleXor(most, hop));
    }
    let power = max(most >> 23u, 32u);
    let c = cut(v, power);
    var total = 0;
    if (ZEROS) {
        total = total_of(c);
        for (var hop = 1u; hop < CELL_QUADS; hop *= 2u) {
            total += subgroupShuffleXor(total, hop);
        }
    }
    if (STEPS * WG == CHUNK * CELL_QUADS || j < CHUNK * CELL_QUADS) {
        let cell = j / CELL_QUADS;
        let at = row * ROW + j % CELL_QUADS / 4u * CHUNK + cell;
        let word = j % 4u;
        xs[at][word] = c.a;
        xs[at + HALF * CHUNK][word] = c.b;
        if (DIGITS > 2u) {
            xs[at + 2u * HALF * CHUNK][word] = c.c;
        }
        if (j % CELL_QUADS == 0u) {
            units[row * CHUNK + cell] = unit_of(power);
            if (ZEROS) {
                totals[row * CHUNK + cell] = FACTOR * f32(total);
            }
        }
    }
    if (NORM) {
        return dot(given, given);
    }
    return 0.0;
}

/// Put CHUNK cells of x into workgroup memory, from cell `first` on; returns the lane's sums of squares.
fn stage(before: Squares, first: u32, lane: u32) -> Squares {
    let quads = u32(params.k) / 4u;
    var t = before;
    for (var step = 0u; step < STEPS; step++) {
        let j = step * WG + lane;
        let quad = first * CELL_QUADS + j;
        let valid = j < CHUNK * CELL_QUADS && quad < quads;
        var g = vec4<f32>();
        if (NORM_WEIGHT) {
            g = vec4<f32>(norm[min(quad, quads - 1u)]);
        }
        // all rows are asked for before the first is waited for
        let v0 = fetch(0u, quad, valid);
        var v1 = vec4<f32>();
        var v2 = vec4<f32>();
        var v3 = vec4<f32>();
        if (ROWS > 1u) { v1 = fetch(1u, quad, valid); }
        if (ROWS > 2u) { v2 = fetch(2u, quad, valid); }
        if (ROWS > 3u) { v3 = fetch(3u, quad, valid); }
        t.low.x += place(0u, j, v0, g);
        if (ROWS > 1u) { t.low.y += place(1u, j, v1, g); }
        if (ROWS > 2u) { t.low.z += place(2u, j, v2, g); }
        if (ROWS > 3u) { t.low.w += place(3u, j, v3, g); }
        if (ROWS > 4u) {
            let v4 = fetch(4u, quad, valid);
            if (ROWS > 5u) { v1 = fetch(5u, quad, valid); }
            if (ROWS > 6u) { v2 = fetch(6u, quad, valid); }
            if (ROWS > 7u) { v3 = fetch(7u, quad, valid); }
            t.high.x += place(4u, j, v4, g);
            if (ROWS > 5u) { t.high.y += place(5u, j, v1, g); }
            if (ROWS > 6u) { t.high.z += place(6u, j, v2, g); }
            if (ROWS > 7u) { t.high.w += place(7u, j, v3, g); }
        }
    }
    return t;
}

/// The digits of a cell of x, lowest first, and the unit and sum of its integers.
struct Digits { a0: vec4<u32>, b0: vec4<u32>, a1: vec4<u32>, b1: vec4<u32>, a2: vec4<u32>, b2: vec4<u32>, unit: f32, total: f32 }

fn digits_at(row: u32, i: u32) -> Digits {
    let at = row * ROW + i;
    var d: Digits;
    d.a0 = xs[at];
    d.b0 = xs[at + (HALF - 1u) * CHUNK];
    d.a1 = xs[at + HALF * CHUNK];
    d.b1 = xs[at + (2u * HALF - 1u) * CHUNK];
    if (DIGITS > 2u) {
        d.a2 = xs[at + 2u * HALF * CHUNK];
        d.b2 = xs[at + (3u * HALF - 1u) * CHUNK];
    }
    d.unit = units[row * CHUNK + i];
    if (ZEROS) {
        d.total = totals[row * CHUNK + i];
    }
    return d;
}

/// The product of a cell of weights with a cell of x, without scale and unit.
fn digits_sum(c: Codes, d: Digits) -> f32 {
    let low = f32(digit_sum(c, d.a1, d.b1) * 256 + digit_sum(c, d.a0, d.b0));
    if (DIGITS > 2u) {
        return f32(digit_sum(c, d.a2, d.b2)) * 65536.0 + low;
    }
    return low;
}

fn scaled(w: Cells, c: Decoded, row: u32, i: u32) -> Sums {
    let d = digits_at(row, i);
    let p = products(c, d);
    if (ZEROS) {
        return w.scale * d.unit * (p - w.zero * d.total);
    }
    return w.scale * d.unit * p;
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

/// After a barrier: what the norm multiplies a row of x with.
fn factor(group: u32, row: u32) -> f32 {
    if (!NORM) {
        return 1.0;
    }
    var sum = 0.0;
    for (var k = 0u; k < WG / MEET; k++) {
        sum += squares[k * ROWS + row];
    }
    return 1.0 / sqrt(sum / params.k + params.eps);
}
