// No kernel: what attention_loads.wgsl is, for caches of packed integers (head sizes that are multiples of 4, for 4 bits of 8); appended to
// attention kernels in its place, after attention_scales.wgsl or attention_scales_zeros.wgsl. `key` and `value` are words. Needs: params.scale; const BITS (8 or 4), D, DV.

/// Columns 4 * c .. 4 * c + 3 of the key row that starts at element `base`.
fn load_key(base: u32, c: u32) -> vec4<f32> {
    if (BITS == 8u) {
        return dequantised(four_bytes(key[(base >> 2u) + c]), key_scale(base));
    }
    return dequantised(four_nibbles(key[(base >> 3u) + (c >> 1u)] >> ((c & 1u) * 16u)), key_scale(base));
}

/// As `load_key`, of a value row.
fn load_value(base: u32, c: u32) -> vec4<f32> {
    if (BITS == 8u) {
        return dequantised(four_bytes(value[(base >> 2u) + c]), value_scale(base));
    }
    return dequantised(four_nibbles(value[(base >> 3u) + (c >> 1u)] >> ((c & 1u) * 16u)), value_scale(base));
}

/// Columns 4 * c .. 4 * c + 3 of the query row that starts at element `base`, times the scale.
fn load_query(base: u32, c: u32) -> vec4<f32> {
    let first = base + 4u * c;
    let x = vec4<f32>(f32(query[first]), f32(query[first + 1u]), f32(query[first + 2u]), f32(query[first + 3u]));
    return x * params.scale;
}
