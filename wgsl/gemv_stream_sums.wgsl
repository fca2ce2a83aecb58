// No kernel: the loop over K of `gemv_stream` and `gemv_stream_siblings` and how their sums meet; appended to them. For devices with subgroups.
//
// Needs: params.m, params.cells, params.k, params.eps; fn raw(which, at): 16 bytes of a weight; const WG, LANES, MEET (lanes of LANES that meet by
// shuffles), COLS, ROWS, UNROLL, GATED, NORM, NORM_WEIGHT; what gemv_stream_columns_<COLS> and gemv_stream_f16 or _f32 define.

const PER = select(COLS, COLS / 2u, GATED); // columns of the result that LANES invocations make
const COLUMNS = WG / LANES * PER;
const SPLIT = LANES / MEET;

var<private> row0: u32; // the first of the ROWS rows of x
var<workgroup> partial: array<f32, WG / MEET * ROWS * COLS>;
var<workgroup> squares: array<f32, WG / MEET * ROWS>;

/// Sums of a lane: of products by row of x, and of squares of rows 0 to 3 and 4 to 7.
struct State {
    s0: Sums, s1: Sums, s2: Sums, s3: Sums, s4: Sums, s5: Sums, s6: Sums, s7: Sums,
    low: vec4<f32>,
    high: vec4<f32>,
}

/// The weight that the c-th of COLS rows is taken from, where the workgroup's own is `which`.
fn source(which: u32, c: u32) -> u32 {
    return select(which, c / PER, GATED);
}

/// Where the c-th row of weights begins, in cells; a row past the end is the last.
fn begin(first: u32, c: u32, n: u32) -> u32 {
    return min(first + c % PER, n - 1u) * params.cells;
}

fn x_of(row: u32, i: u32) -> Wide {
    return x_cell(min(row0 + row, params.m - 1u) * params.cells + i);
}

fn scaled(v: Wide, g: Wide) -> Wide {
    if (NORM_WEIGHT) {
        return times(v, g);
    }
    return v;
}

fn square(v: Wide) -> f32 {
    if (NORM) {
        return product(v, v);
    }
    return 0.0;
}

/// The sums with cell i of all rows added.
fn add(before: State, w: Cells, i: u32) -> State {
    var t = before;
    var g = Wide();
    if (NORM_WEIGHT) {
        g = norm_cell(i);
    }
    let v0 = x_of(0u, i);
    t.s0 += products(w, scaled(v0, g));
    t.low.x += square(v0);
    if (ROWS > 1u) {
        let v1 = x_of(1u, i);
        t.s1 += products(w, scaled(v1, g));
        t.low.y += square(v1);
    }
    if (ROWS > 2u) {
        let v2 = x_of(2u, i);
        let v3 = x_of(3u, i);
        t.s2 += products(w, scaled(v2, g));
        t.s3 += products(w, scaled(v3, g));
        t.low.z += square(v2);
        t.low.w += square(v3);
    }
    if (ROWS > 4u) {
        let v4 = x_of(4u, i);
        let v5 = x_of(5u, i);
        let v6 = x_of(6u, i);
        let v7 = x_of(7u, i);
        t.s4 += products(w, scaled(v4, g));
        t.s5 += products(w, scaled(v5, g));
        t.s6 += products(w, scaled(v6, g));
        t.s7 += products(w, scaled(v7, g));
        t.high += vec4<f32>(square(v4), square(v5), square(v6), square(v7));
    }
    return t;
}

/// Sums of this lane's LANES invocations over PER columns from `first` on, left in workgroup memory.
fn stream(which: u32, first: u32, n: u32, lane: u32) {
    let at = vec4<u32>(begin(first, 0u, n), begin(first, 1u, n), begin(first, 2u, n), begin(first, 3u, n));
    var t = State();
    var i = lane % LANES;
    for (; i + (UNROLL - 1u) * LANES < params.cells; i += UNROLL * LANES) {
        let c0 = cells(which, at, i);
        var c1 = Cells();
        var c2 = Cells();
        var c3 = Cells();
        if (UNROLL > 1u) {
            c1 = cells(which, at, i + LANES);
        }
        if (UNROLL > 2u) {
            c2 = cells(which, at, i + 2u * LANES);
            c3 = cells(which, at, i + 3u * LANES);
        }
        t = add(t, c0, i);
        if (UNROLL > 1u) {
            t = add(t, c1, i + LANES);
        }
        if (UNROLL > 2u) {
            t = add(t, c2, i + 2u * LANES);
            t = add(t, c3, i + 3u * LANES);
        }
    }
    if (UNROLL > 1u) {
        for (; i < params.cells; i += LANES) {
            t = add(t, cells(which, at, i), i);
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
        if (NORM) {
            t.low += subgroupShuffleXor(t.low, step);
            if (ROWS > 4u) {
                t.high += subgroupShuffleXor(t.high, step);
            }
        }
    }
    if (lane % MEET == 0u) {
        let row = lane / MEET * ROWS;
        keep(row * COLS, t.s0);
        squares[row] = t.low.x;
        if (ROWS > 1u) {
            keep((row + 1u) * COLS, t.s1);
            squares[row + 1u] = t.low.y;
        }
        if (ROWS > 2u) {
            keep((row + 2u) * COLS, t.s2);
            keep((row + 3u) * COLS, t.s3);
            squares[row + 2u] = t.low.z;
            squares[row + 3u] = t.low.w;
        }
        if (ROWS > 4u) {
            keep((row + 4u) * COLS, t.s4);
            keep((row + 5u) * COLS, t.s5);
            keep((row + 6u) * COLS, t.s6);
            keep((row + 7u) * COLS, t.s7);
            squares[row + 4u] = t.high.x;
            squares[row + 5u] = t.high.y;
            squares[row + 6u] = t.high.z;
            squares[row + 7u] = t.high.w;
        }
    }
}

/// After a barrier: the dot product of a row of x with the c-th of the COLS rows of weights of a group of LANES invocations.
fn met(group: u32, row: u32, c: u32) -> f32 {
    var sum = 0.0;
    for (var k = 0u; k < SPLIT; k++) {
        sum += partial[((group * SPLIT + k) * ROWS + row) * COLS + c];
    }
    return sum;
}

/// After a barrier: what the norm multiplies a row of x with.
fn factor(group: u32, row: u32) -> f32 {
    if (!NORM) {
        return 1.0;
    }
    var sum = 0.0;
    for (var k = 0u; k < SPLIT; k++) {
        sum += squares[(group * SPLIT + k) * ROWS + row];
    }
    return 1.0 / sqrt(sum / params.k + params.eps);
}
