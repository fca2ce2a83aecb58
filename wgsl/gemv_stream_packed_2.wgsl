// No kernel: two rows of packed weights a lane, for `gemv_stream` and `gemv_stream_siblings`; appended to them.
// For devices with subgroups of at least 8. Needs: fn raw, scale_of, zero_of, source, codes_of, digits_sum; const MEET; var partial.

alias Sums = vec2<f32>;

/// A cell of each row, and the scale and zero of its group.
struct Cells { a: vec4<u32>, b: vec4<u32>, scale: Sums, zero: Sums }

struct Decoded { a: Codes, b: Codes }

/// `at`: where each row begins, in cells.
fn load(which: u32, at: vec4<u32>, i: u32) -> Cells {
    return Cells(
        raw(source(which, 0u), at.x + i),
        raw(source(which, 1u), at.y + i),
        Sums(scale_of(source(which, 0u), at.x, i), scale_of(source(which, 1u), at.y, i)),
        Sums(zero_of(source(which, 0u), at.x, i), zero_of(source(which, 1u), at.y, i)),
    );
}

fn decode(w: Cells) -> Decoded {
    return Decoded(codes_of(w.a), codes_of(w.b));
}

fn products(c: Decoded, d: Digits) -> Sums {
    return Sums(digits_sum(c.a, d), digits_sum(c.b, d));
}

/// Leave the sums of MEET lanes in workgroup memory: after the first shuffle a lane has one row of weights.
fn meet(slot: u32, s: Sums, lane: u32) {
    if (MEET == 1u) {
        partial[slot * COLS] = s.x;
        partial[slot * COLS + 1u] = s.y;
        return;
    }
    let odd = lane % 2u == 1u;
    var sum = select(s.x, s.y, odd) + subgroupShuffleXor(select(s.y, s.x, odd), 1u);
    for (var step = 2u; step < MEET; step *= 2u) {
        sum += subgroupShuffleXor(sum, step);
    }
    if (lane % MEET < COLS) {
        partial[slot * COLS + lane % COLS] = sum;
    }
}
