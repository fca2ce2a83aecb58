// No kernel: how `gemv_stream` and its relatives cut floats into digits of 8 bits beside packed weights; appended with gemv_stream_packed.wgsl. For
// devices with subgroups of at least 8.
//
// x is multiplied with the norm's weight and cut, cell by cell, into integers and a unit, and these into DIGITS signed digits. With m the largest
// magnitude in a cell, 2^e <= m < 2^(e + 1):
//
//   DIGITS 3: integers below 2^22, the unit is 2^(e - 21); x is off by at most 2^(e - 22), as much as rounding m to 23 bits.
//   DIGITS 2: integers up to 32,512, the unit is 2^(e - 14) * 128 / 127; x is off by at most 2^(e - 15) * 128 / 127 <= 1.008 * 2^-15 * m. For x that
//     the graph has in 16 bits: to round m to the 11 bits of a float16 costs up to 2^(e - 11), to the 8 of a bfloat16 2^(e - 8), so this is
//     at most 1 / 15.8, or 1 / 127, of that. A product with a row of weights w is off by at most 1.008 * 2^-15 * sum over cells of m * sum |w|.
//
// Needs what gemv_stream_packed.wgsl needs and defines.

const STEPS = (CHUNK * CELL_QUADS + WG - 1u) / WG;

var<workgroup> units: array<f32, ROWS * CHUNK>; // of a cell's integers, over FACTOR

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
