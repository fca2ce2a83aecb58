// No kernel: how `attention_stream` reads cache rows of 32-bit floats; appended to it. A cell is 16 bytes, four columns; lane l of a row has cells l
// and l + L. Head sizes are multiples of 4. Needs: const D, DV, L; `key` and `value` as array<vec4<f32>>.

alias Raw = mat2x4<f32>;

/// First of the four columns that stand in a lane's first (e = 0) or second (e = 1) vector.
fn cell_column(l: u32, e: u32) -> u32 {
    return 4u * (l + L * e);
}

/// A lane's share of the key row at element `base`; zeros if not `there`.
fn key_cell(there: bool, base: u32, l: u32) -> Raw {
    var raw = Raw();
    if (there) {
        if (4u * l < D) { raw[0] = key[(base >> 2u) + l]; }
        if (4u * (l + L) < D) { raw[1] = key[(base >> 2u) + l + L]; }
    }
    return raw;
}

fn value_cell(there: bool, base: u32, l: u32) -> Raw {
    var raw = Raw();
    if (there) {
        if (4u * l < DV) { raw[0] = value[(base >> 2u) + l]; }
        if (4u * (l + L) < DV) { raw[1] = value[(base >> 2u) + l + L]; }
    }
    return raw;
}

fn wide(raw: Raw) -> mat2x4<f32> {
    return raw;
}
