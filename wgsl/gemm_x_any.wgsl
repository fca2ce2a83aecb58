// No kernel: how `gemm` reads rows of x of any type and number of columns, element by element; appended to it. XCell is the element type.
// Needs params.

/// Zero past the last column: chosen after a load that is always allowed, since a branch around each of 32 loads takes
/// SwiftShader minutes to compile.
fn x_element(at: u32, row: u32, k: u32) -> f32 {
    return select(0.0, f32(x[at + row * params.x_row + min(k, params.k - 1u)]), k < params.k);
}

fn x_cell(at: u32, row: u32, quad: u32) -> vec4<u32> {
    let k = 4u * quad;
    return bitcast<vec4<u32>>(vec4<f32>(
        x_element(at, row, k), x_element(at, row, k + 1u), x_element(at, row, k + 2u), x_element(at, row, k + 3u),
    ));
}

fn x_values(cell: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(cell);
}
