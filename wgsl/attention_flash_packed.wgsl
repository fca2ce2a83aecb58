// No kernel: how `attention_flash` reads caches of packed integers; appended to it in the place of attention_flash_cells.wgsl, after
// attention_scales.wgsl or attention_scales_zeros.wgsl. One load is one vec4 column of a row (KSTEP and VSTEP are 1), dequantised on the way to registers.
// Needs: `key`, `value` as words; const BITS (8 or 4).

/// Vec4 column c of the key row that starts at element `row`: the bits of four floats.
fn key_bits(row: u32, c: u32) -> vec4<u32> {
    var x = vec4<f32>();
    if (BITS == 8u) {
        x = four_bytes(key[(row >> 2u) + c]);
    } else {
        x = four_nibbles(key[(row >> 3u) + (c >> 1u)] >> ((c & 1u) * 16u));
    }
    return bitcast<vec4<u32>>(dequantised(x, key_scale(row)));
}

fn value_bits(row: u32, c: u32) -> vec4<u32> {
    var x = vec4<f32>();
    if (BITS == 8u) {
        x = four_bytes(value[(row >> 2u) + c]);
    } else {
        x = four_nibbles(value[(row >> 3u) + (c >> 1u)] >> ((c & 1u) * 16u));
    }
    return bitcast<vec4<u32>>(dequantised(x, value_scale(row)));
}
