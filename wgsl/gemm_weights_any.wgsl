// No kernel: how `gemm` reads weights of any type in rows of any number of elements, one by one; appended to it. WCell is the element type.
// Needs params, GATED. What a loader gives is said where 16-bit floats are read.

/// Zero past the row's last element, as `x_element` does it.
fn weight_element(which: u32, at: u32, row: u32, i: u32) -> f32 {
    let here = at + row * params.w_row + min(i, params.w_row - 1u);
    if (GATED && which == 1u) {
        return select(0.0, f32(w1[here]), i < params.w_row);
    }
    return select(0.0, f32(w0[here]), i < params.w_row);
}

fn weight_cell(which: u32, at: u32, row: u32, quad: u32) -> vec4<u32> {
    let i = 4u * quad;
    return bitcast<vec4<u32>>(vec4<f32>(
        weight_element(which, at, row, i),
        weight_element(which, at, row, i + 1u),
        weight_element(which, at, row, i + 2u),
        weight_element(which, at, row, i + 3u),
    ));
}

fn weight_values(cell: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(cell);
}
