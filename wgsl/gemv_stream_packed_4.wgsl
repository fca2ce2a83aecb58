// No kernel: four rows of packed weights a lane, for `gemv_stream` and `gemv_stream_siblings`; appended to them.
// For devices with subgroups of at least 8. Needs: fn raw, scale_of, zero_of, source, codes_of, digits_sum; const MEET; var partial.

alias Sums = vec4<f32>;

/// A cell of each row, and the scale and zero of its group.
struct Cells { a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>, scale: Sums, zero: Sums }

struct Decoded { a: Codes, b: Codes, c: Codes, d: Codes }

/// `at`: where each row begins, in cells.
fn load(which: u32, at: vec4<u32>, i: u32) -> Cells {
    return Cells(
        raw(source(which, 0u), at.x + i),
        raw(source(which, 1u), at.y + i),
        raw(source(which, 2u), at.z + i),
        raw(source(which, 3u), at.w + i),
        Sums(
            scale_of(source(which, 0u), at.x, i),
            scale_of(source(which, 1u), at.y, i),
            scale_of(source(which, 2u), at.z, i),
            scale_of(source(which, 3u), at.w, i),
        ),
        Sums(
            zero_of(source(which, 0u), at.x, i),
            zero_of(source(which, 1u), at.y, i),
            zero_of(source(which, 2u), at.z, i),
            zero_of(source(which, 3u), at.w, i),
        ),
    );
}

fn decode(w: Cells) -> Decoded {
    return Decoded(codes_of(w.a), codes_of(w.b), codes_of(w.c), codes_of(w.d));
}

fn products(c: Decoded, d: Digits) -> Sums {
    return Sums(digits_sum(c.a, d), digits_sum(c.b, d), digits_sum(c.c, d), digits_sum(c.d, d));
}

/// Leave the sums of MEET lanes in workgroup memory: after two shuffles a lane has one row of weights.
fn meet(slot: u32, s: Sums, lane: u32) {
    if (MEET < COLS) {
        var sums = s;
        for (var step = 1u; step < MEET; step *= 2u) {
            sums += subgroupShuffleXor(sums, step);
        }
        if (lane % MEET == 0u) {
            partial[slot * COLS] = sums.x;
            partial[slot * COLS + 1u] = sums.y;
            partial[slot * COLS + 2u] = sums.z;
            partial[slot * COLS + 3u] = sums.w;
        }
        return;
    }
    let odd = lane % 2u == 1u;
    let pair = select(s.xz, s.yw, odd) + subgroupShuffleXor(select(s.yw, s.xz, odd), 1u);
    let second = lane % 4u > 1u;
    var sum = select(pair.x, pair.y, second) + subgroupShuffleXor(select(pair.y, pair.x, second), 2u);
    for (var step = 4u; step < MEET; step *= 2u) {
        sum += subgroupShuffleXor(sum, step);
    }
    if (lane % MEET < COLS) {
        partial[slot * COLS + lane % COLS] = sum;
    }
}
