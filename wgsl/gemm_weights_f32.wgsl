// No kernel: how `gemm` reads weights in 32-bit floats, in rows of a multiple of four elements; appended to it. Needs params, EVEN, GATED.
// What a loader gives is said where 16-bit floats are read.

alias WCell = vec4<u32>;

fn weight_cell(which: u32, at: u32, row: u32, quad: u32) -> vec4<u32> {
    if (EVEN || quad < params.w_row) {
        let i = at + row * params.w_row + quad;
        if (GATED && which == 1u) {
            return w1[i];
        }
        return w0[i];
    }
    return vec4<u32>();
}

fn weight_values(cell: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(cell);
}
