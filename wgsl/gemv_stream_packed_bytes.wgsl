// No kernel: how `gemv_stream` and its relatives multiply packed weights with activations of 8 bits, which gemv_stream_packed_codes or _quantize put
// into workgroup memory; appended with gemv_stream_packed.wgsl. For devices with subgroups of at least 8.
//
// One digit: sums of a cell are exact. Only in cells some of whose numbers need nine bits are they codes above a zero that is not 0: there, and
// nowhere else, the sum of the weights' codes is taken as well. What is added up is multiplied with the row's scale at the end.
//
// Needs what gemv_stream_packed.wgsl needs and defines.

var<workgroup> cell_zeros: array<i32, ROWS * CHUNK>;
var<workgroup> scales: array<f32, ROWS>; // of rows of x, over FACTOR

/// A cell of x: its first and its last sixteen columns, what their zero is, and the sum of what they stand for.
struct Digits { a: vec4<u32>, b: vec4<u32>, zero: i32, total: f32 }

fn digits_at(row: u32, i: u32) -> Digits {
    var d: Digits;
    d.a = xs[row * ROW + i];
    d.b = xs[row * ROW + i + (HALF - 1u) * CHUNK];
    d.zero = cell_zeros[row * CHUNK + i];
    if (ZEROS) {
        d.total = totals[row * CHUNK + i];
    }
    return d;
}

/// The product of a cell of weights with a cell of x, without scales.
fn digits_sum(c: Codes, d: Digits) -> f32 {
    var sum = digit_sum(c, d.a, d.b);
    if (d.zero != 0) {
        sum -= d.zero * digit_sum(c, vec4<u32>(0x01010101u), vec4<u32>(0x01010101u));
    }
    return f32(sum);
}

fn scaled(w: Cells, c: Decoded, row: u32, i: u32) -> Sums {
    let d = digits_at(row, i);
    let p = products(c, d);
    if (ZEROS) {
        return w.scale * (p - w.zero * d.total);
    }
    return w.scale * p;
}

/// After a barrier: the scale of a row of x.
fn factor(group: u32, row: u32) -> f32 {
    return scales[row];
}
