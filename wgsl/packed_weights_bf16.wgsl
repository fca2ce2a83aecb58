// No kernel: how a row of bfloat16 in words (ops/packed.py) is read, four columns at a time; appended to kernels that take any packed format.
// A bfloat16 is the upper half of a 32-bit float. Needs packed_word and packed_row as packed_weights.wgsl does.

/// The values of columns 4 * quad to 4 * quad + 3; those past the last column of the matrix are 0, as they are stored.
fn packed_values(which: u32, row: u32, quad: u32, columns: u32) -> vec4<f32> {
    let at = packed_row(row) + 2u * quad;
    let low = packed_word(which, at);
    let high = packed_word(which, at + 1u);
    return bitcast<vec4<f32>>(vec4<u32>(low << 16u, low & 0xffff0000u, high << 16u, high & 0xffff0000u));
}
