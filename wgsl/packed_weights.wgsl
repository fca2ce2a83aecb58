// No kernel: how a row of packed weights (see ops/packed.py) is read, four columns at a time; appended to kernels that take any format.
//
// Needs: fn packed_word(which: u32, at: u32) -> u32, a word of matrix `which`; fn packed_row(row: u32) -> u32, the first word of a row; and the constants of a format: BITS (2, 4
// or 8), GROUP (columns that share a scale), CELLS (of 16 bytes of codes), SCALE_WORDS, SCALE_F16, ZEROS.

/// The codes of columns 4 * quad to 4 * quad + 3, all of which lie in one word.
fn packed_codes(which: u32, row: u32, quad: u32) -> vec4<u32> {
    let per_word = 8u / BITS; // quads
    let word = packed_word(which, packed_row(row) + quad / per_word) >> (BITS * (quad % per_word));
    return vec4<u32>(word, word >> 8u, word >> 16u, word >> 24u) & vec4<u32>((1u << BITS) - 1u);
}

fn packed_float(which: u32, row: u32, start: u32, group: u32) -> f32 {
    let at = packed_row(row) + 4u * CELLS + start;
    if (SCALE_F16) {
        let both = unpack2x16float(packed_word(which, at + group / 2u));
        return select(both.x, both.y, (group & 1u) == 1u);
    }
    return bitcast<f32>(packed_word(which, at + group));
}

/// Scale and zero of a column.
fn packed_scale(which: u32, row: u32, column: u32) -> vec2<f32> {
    let group = column / GROUP;
    var zero = f32(1u << (BITS - 1u));
    if (ZEROS) {
        zero = packed_float(which, row, SCALE_WORDS, group);
    }
    return vec2<f32>(packed_float(which, row, 0u, group), zero);
}

/// The values of columns 4 * quad to 4 * quad + 3; those past the last column of the matrix are 0.
fn packed_values(which: u32, row: u32, quad: u32, columns: u32) -> vec4<f32> {
    let codes = vec4<f32>(packed_codes(which, row, quad));
    let first = 4u * quad;
    if (GROUP % 4u == 0u) { // then the columns are a multiple of four as well
        let s = packed_scale(which, row, first);
        return s.x * (codes - s.y);
    }
    let last = columns - 1u;
    let a = packed_scale(which, row, first);
    let b = packed_scale(which, row, min(first + 1u, last));
    let c = packed_scale(which, row, min(first + 2u, last));
    let d = packed_scale(which, row, min(first + 3u, last));
    let found = vec4<f32>(a.x, b.x, c.x, d.x) * (codes - vec4<f32>(a.y, b.y, c.y, d.y));
    return select(vec4<f32>(), found, vec4<u32>(first, first + 1u, first + 2u, first + 3u) <= vec4<u32>(last));
}
