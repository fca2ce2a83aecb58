// No kernel: the loop over K of `gemv_stream` and `gemv_stream_siblings` for packed weights (ops/packed.py), and how sums meet; appended to them. For
// devices with subgroups of at least 8.
//
// A cell of 16 bytes holds 32 or 16 columns of one group. LANES invocations share COLS rows of weights, a cell each at a time. x goes through
// workgroup memory in chunks of LANES * UNROLL cells, multiplied with the norm's weight and cut, cell by cell, into integers of 22 bits and a power
// of two, which is as exact as 32-bit floats are, and these into three signed digits of 8 bits: one instruction then multiplies four codes with a
// digit of four columns, where floats would need a mask, a subtraction and a product for each code. A cell in workgroup memory is an odd number of
// 16 bytes, so that eight lanes meet different banks. Many lanes hide the waits: weights asked for ahead take registers. Where x is
// one chunk, it stays for SETS sets of COLS rows.
//
// Needs: params.m, params.cells, params.k, params.eps; fn raw(which, at), raw_word(which, at); const WG, LANES, MEET (lanes of LANES that meet by
// shuffles), COLS, ROWS, UNROLL, SETS, GATED, NORM, NORM_WEIGHT; GROUP_CELLS (cells that share a scale), SCALE_WORDS, SCALE_F16, ZEROS; X and Norm, vectors
// of four; what gemv_stream_packed_<COLS> and gemv_stream_bits_4 or _8 define.

alias Raw = vec4<u32>;

const SET = select(COLS, COLS / 2u, GATED); // columns of the result that LANES invocations make at a time
const PER = SETS * SET;
const COLUMNS = WG / LANES * PER;
const SPLIT = LANES / MEET;
const CHUNK = LANES * UNROLL; // cells
const HALF = CELL_QUADS / 4u; // 16 bytes of a digit of a cell
const INFO = 3u * HALF; // where a cell's power of two and its sum stand
const CELL = INFO + 1u + INFO % 2u;
const ROW = CHUNK * CELL;
const STEPS = (CHUNK * CELL_QUADS + WG - 1u) / WG;

var<workgroup> xs: array<vec4<u32>, ROWS * ROW>;
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

fn group_float(which: u32, words: u32, group: u32) -> f32 {
    if (SCALE_F16) {
        let both = unpack2x16float(raw_word(which, words + group / 2u));
        return select(both.x, both.y, (group & 1u) == 1u);
    }
    return bitcast<f32>(raw_word(which, words + group));
}

/// The scale of cell i of the row that begins at cell `at`.
fn scale_of(which: u32, at: u32, i: u32) -> f32 {
    return group_float(which, 4u * (at + code_cells()), i / GROUP_CELLS);
}

/// What the sum of a cell's x is multiplied with and taken off: codes come as differences from the middle of their range.
fn zero_of(which: u32, at: u32, i: u32) -> f32 {
    if (ZEROS) {
        return group_float(which, 4u * (at + code_cells()) + SCALE_WORDS, i / GROUP_CELLS) - MIDDLE;
    }
    return 0.0;
}

/// The digits of four integers in base 256, from -128 to 127: in x the lowest of the four, in z the highest.
fn digits_of(whole: vec4<u32>) -> vec3<u32> {
    let y = (whole + vec4<u32>(0x808080u)) ^ vec4<u32>(0x808080u);
    return vec3<u32>(
        (y.x & 0xffu) | ((y.y & 0xffu) << 8u) | ((y.z & 0xffu) << 16u) | (y.w << 24u),
        ((y.x >> 8u) & 0xffu) | (y.y & 0xff00u) | ((y.z & 0xff00u) << 8u) | ((y.w & 0xff00u) << 16u),
        ((y.x >> 16u) & 0xffu) | ((y.y >> 8u) & 0xff00u) | (y.z & 0xff0000u) | ((y.w & 0xff0000u) << 8u),
    );
}

/// Put CHUNK cells of a row of x into workgroup memory, from cell `first` on; returns the lane's sum of squares.
fn stage_row(row: u32, first: u32, lane: u32) -> f32 {
    let quads = u32(params.k) / 4u;
    let start = min(row, params.m - 1u) * quads;
    var square = 0.0;
    for (var step = 0u; step < STEPS; step++) {
        let j = step * WG + lane;
        let quad = first * CELL_QUADS + j;
        var v = vec4<f32>();
        if (j < CHUNK * CELL_QUADS && quad < quads) {
            v = vec4<f32>(x[start + quad]);
            if (NORM) {
                square += dot(v, v);
            }
            if (NORM_WEIGHT) {
                v *= vec4<f32>(norm[quad]);
            }
        }
        var most = max(bitcast<vec4<u32>>(v).xy & vec2<u32>(0x7fffffffu), bitcast<vec4<u32>>(v).zw & vec2<u32>(0x7fffffffu));
        most.x = max(most.x, most.y); // as an integer, so that what is not finite wins
        for (var hop = 1u; hop < CELL_QUADS; hop *= 2u) {
            most.x = max(most.x, subgroupShuffleXor(most.x, hop));
        }
        let power = max(most.x >> 23u, 32u);
        // integers below 2^22: the sum with 1.5 * 2^23 rounds them
        let whole = bitcast<vec4<u32>>(v * bitcast<f32>((275u - power) << 23u) + vec4<f32>(12582912.0)) - vec4<u32>(0x4b400000u);
        var sum = 0;
        if (ZEROS) {
            let i = bitcast<vec4<i32>>(whole);
            sum = i.x + i.y + i.z + i.w;
            for (var hop = 1u; hop < CELL_QUADS; hop *= 2u) {
                sum += subgroupShuffleXor(sum, hop);
            }
        }
        if (j < CHUNK * CELL_QUADS) {
            let place = j % CELL_QUADS;
            let at = row * ROW + j / CELL_QUADS * CELL;
            let d = digits_of(whole);
            xs[at + place / 4u][place % 4u] = d.x;
            xs[at + HALF + place / 4u][place % 4u] = d.y;
            xs[at + 2u * HALF + place / 4u][place % 4u] = d.z;
            if (place == 0u) {
                // the unit of the integers; a NaN where x is not finite
                let unit = select(bitcast<u32>(bitcast<f32>((power - 21u) << 23u) / FACTOR), 0x7fc00000u, power == 255u);
                xs[at + INFO] = vec4<u32>(unit, bitcast<u32>(FACTOR * f32(sum)), 0u, 0u);
            }
        }
    }
    return square;
}

fn stage(before: Squares, first: u32, lane: u32) -> Squares {
    var t = before;
    t.low.x += stage_row(0u, first, lane);
    if (ROWS > 1u) {
        t.low.y += stage_row(1u, first, lane);
    }
    if (ROWS > 2u) {
        t.low.z += stage_row(2u, first, lane);
        t.low.w += stage_row(3u, first, lane);
    }
    if (ROWS > 4u) {
        t.high.x += stage_row(4u, first, lane);
        t.high.y += stage_row(5u, first, lane);
        t.high.z += stage_row(6u, first, lane);
        t.high.w += stage_row(7u, first, lane);
    }
    return t;
}

/// The digits of a cell of x, lowest first, and their unit and sum.
struct Digits { a0: vec4<u32>, b0: vec4<u32>, a1: vec4<u32>, b1: vec4<u32>, a2: vec4<u32>, b2: vec4<u32>, info: vec4<f32> }

fn digits_at(at: u32) -> Digits {
    return Digits(
        xs[at], xs[at + HALF - 1u], xs[at + HALF], xs[at + 2u * HALF - 1u], xs[at + 2u * HALF], xs[at + INFO - 1u],
        bitcast<vec4<f32>>(xs[at + INFO]),
    );
}

/// The product of a cell of weights with a cell of x, without scale and unit.
fn digits_sum(c: Codes, d: Digits) -> f32 {
    let low = digit_sum(c, d.a1, d.b1) * 256 + digit_sum(c, d.a0, d.b0);
    return f32(digit_sum(c, d.a2, d.b2)) * 65536.0 + f32(low);
}

fn scaled(w: Cells, c: Decoded, at: u32) -> Sums {
    let d = digits_at(at);
    let p = products(c, d);
    if (ZEROS) {
        return w.scale * d.info.x * (p - w.zero * d.info.y);
    }
    return w.scale * d.info.x * p;
}

/// The sums with a cell of each row of weights; its columns of x begin at xs[at].
fn add(before: State, w: Cells, at: u32) -> State {
    let c = decode(w);
    var t = before;
    t.s0 += scaled(w, c, at);
    if (ROWS > 1u) {
        t.s1 += scaled(w, c, at + ROW);
    }
    if (ROWS > 2u) {
        t.s2 += scaled(w, c, at + 2u * ROW);
        t.s3 += scaled(w, c, at + 3u * ROW);
    }
    if (ROWS > 4u) {
        t.s4 += scaled(w, c, at + 4u * ROW);
        t.s5 += scaled(w, c, at + 5u * ROW);
        t.s6 += scaled(w, c, at + 6u * ROW);
        t.s7 += scaled(w, c, at + 7u * ROW);
    }
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
            if (turn == 0u || !single) {
                let found = stage(sq, chunk, lane);
                if (turn == 0u) {
                    sq = found;
                }
                workgroupBarrier();
            }
            let w0 = load_cell(which, at, chunk + own);
            var w1 = Cells();
            if (UNROLL > 1u) {
                w1 = load_cell(which, at, chunk + own + LANES);
            }
            t = add(t, w0, own * CELL);
            if (UNROLL > 1u) {
                t = add(t, w1, (own + LANES) * CELL);
            }
            if (!single) {
                workgroupBarrier();
            }
        }
        for (var step = 1u; step < MEET; step *= 2u) {
            t.s0 += subgroupShuffleXor(t.s0, step);
            if (ROWS > 1u) {
                t.s1 += subgroupShuffleXor(t.s1, step);
            }
            if (ROWS > 2u) {
                t.s2 += subgroupShuffleXor(t.s2, step);
                t.s3 += subgroupShuffleXor(t.s3, step);
            }
            if (ROWS > 4u) {
                t.s4 += subgroupShuffleXor(t.s4, step);
                t.s5 += subgroupShuffleXor(t.s5, step);
                t.s6 += subgroupShuffleXor(t.s6, step);
                t.s7 += subgroupShuffleXor(t.s7, step);
            }
        }
        if (lane % MEET == 0u) {
            let slot = (lane / MEET * SETS + turn) * ROWS;
            keep(slot * COLS, t.s0);
            if (ROWS > 1u) {
                keep((slot + 1u) * COLS, t.s1);
            }
            if (ROWS > 2u) {
                keep((slot + 2u) * COLS, t.s2);
                keep((slot + 3u) * COLS, t.s3);
            }
            if (ROWS > 4u) {
                keep((slot + 4u) * COLS, t.s4);
                keep((slot + 5u) * COLS, t.s5);
                keep((slot + 6u) * COLS, t.s6);
                keep((slot + 7u) * COLS, t.s7);
            }
        }
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
            if (ROWS > 1u) {
                squares[slot + 1u] = sq.low.y;
            }
            if (ROWS > 2u) {
                squares[slot + 2u] = sq.low.z;
                squares[slot + 3u] = sq.low.w;
            }
            if (ROWS > 4u) {
                squares[slot + 4u] = sq.high.x;
                squares[slot + 5u] = sq.high.y;
                squares[slot + 6u] = sq.high.z;
                squares[slot + 7u] = sq.high.w;
            }
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
