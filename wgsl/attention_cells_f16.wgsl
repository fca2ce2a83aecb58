// No kernel: how `attention_stream` reads cache rows of 16-bit floats; appended to it. A cell is 16 bytes, eight columns; lane l of a row has cell l.
// Head sizes are multiples of 8. Needs: const D, DV, L; `key` and `value` as array<vec4<u32>>.

alias Raw = vec4<u32>;

/// First of the four columns that stand in a lane's first (e = 0) or second (e = 1) vector.
fn cell_column(l: u32, e: u32) -> u32 {
    return 8u * l + 4u * e;
}

/// A lane's share of the key row at element `base`; zeros if not `there`.
fn key_cell(there: bool, base: u32, l: u32) -> Raw {
    if (there && 8u * l < D) {
        return key[(base >> 3u) + l];
    }
    return Raw();
}

fn value_cell(there: bool, base: u32, l: u32) -> Raw {
    if (there && 8u * l < DV) {
        return value[(base >> 3u) + l];
    }
    return Raw();
}

fn wide(raw: Raw) -> mat2x4<f32> {
    return mat2x4<f32>(
        vec4<f32>(unpack2x16float(raw.x), unpack2x16float(raw.y)),
        vec4<f32>(unpack2x16float(raw.z), unpack2x16float(raw.w)),
    );
}
