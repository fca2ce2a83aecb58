// No kernel: how `gemm` reads weights in bfloat16, in rows filled up with zeros to 16 bytes; appended to it. Needs params, EVEN, GATED.
// What a loader gives is said where 16-bit floats are read. A bfloat16 is the upper half of a 32-bit float.

alias WCell = vec2<u32>;

fn weight_cell(which: u32, at: u32, row: u32, quad: u32) -> vec4<u32> {
    if (EVEN || quad < params.w_row) {
        let i = at + row * params.w_row + quad;
        if (GATED && which == 1u) {
            return vec4<u32>(w1[i], 0u, 0u);
        }
        return vec4<u32>(w0[i], 0u, 0u);
    }
    return vec4<u32>();
}

fn weight_values(cell: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(cell.x << 16u, cell.x & 0xffff0000u, cell.y << 16u, cell.y & 0xffff0000u));
}
