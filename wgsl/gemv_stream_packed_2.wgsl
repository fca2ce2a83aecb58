// No kernel: two rows of packed weights a lane, for `gemv_stream` and `gemv_stream_siblings`; appended to them.
// Needs: fn raw, scale_of, zero_of, source, codes_of, digits_sum; var partial.

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

fn keep(at: u32, s: Sums) {
    partial[at] = s.x;
    partial[at + 1u] = s.y;
}
