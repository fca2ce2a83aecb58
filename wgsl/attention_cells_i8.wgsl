// No kernel: how `attention_stream` reads cache rows of 8-bit integers; appended to it after attention_scales.wgsl. A cell is 8 bytes, eight columns;
// lane l of a row has cell l. Head sizes are multiples of 8. Needs: const D, DV, L; `key` and `value` as array<vec2<u32>>.

alias Raw = vec3<u32>; // a cell and the bits of the row's scale

/// First of the four columns that stand in a lane's first (e = 0) or second (e = 1) vector.
fn cell_column(l: u32, e: u32) -> u32 {
    return 8u * l + 4u * e;
}

/// A lane's share of the key row at element `base`; zeros if not `there`.
fn key_cell(there: bool, base: u32, l: u32) -> Raw {
    if (there && 8u * l < D) {
        return Raw(key[(base >> 3u) + l], bitcast<u32>(key_scale(base)));
    }
    return Raw();
}

fn value_cell(there: bool, base: u32, l: u32) -> Raw {
    if (there && 8u * l < DV) {
        return Raw(value[(base >> 3u) + l], bitcast<u32>(value_scale(base)));
    }
    return Raw();
}

fn wide(raw: Raw) -> mat2x4<f32> {
    return bitcast<f32>(raw.z) * mat2x4<f32>(four_bytes(raw.x), four_bytes(raw.y));
}
