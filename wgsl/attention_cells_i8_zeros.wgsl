// No kernel: as attention_cells_i8.wgsl, after attention_scales_zeros.wgsl: rows have a zero point beside the scale.
// Needs: const D, DV, L; `key` and `value` as array<vec2<u32>>.

alias Raw = vec4<u32>; // a cell, and the bits of the row's scale and zero point

/// First of the four columns that stand in a lane's first (e = 0) or second (e = 1) vector.
fn cell_column(l: u32, e: u32) -> u32 {
    return 8u * l + 4u * e;
}

/// A lane's share of the key row at element `base`; zeros if not `there`.
fn key_cell(there: bool, base: u32, l: u32) -> Raw {
    if (there && 8u * l < D) {
        return Raw(key[(base >> 3u) + l], bitcast<vec2<u32>>(key_scale(base)));
    }
    return Raw();
}

fn value_cell(there: bool, base: u32, l: u32) -> Raw {
    if (there && 8u * l < DV) {
        return Raw(value[(base >> 3u) + l], bitcast<vec2<u32>>(value_scale(base)));
    }
    return Raw();
}

fn wide(raw: Raw) -> mat2x4<f32> {
    let scale = bitcast<vec2<f32>>(raw.zw);
    return mat2x4<f32>(dequantised(four_bytes(raw.x), scale), dequantised(four_bytes(raw.y), scale));
}
