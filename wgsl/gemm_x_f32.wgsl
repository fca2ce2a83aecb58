// No kernel: how `gemm` reads rows of x in 32-bit floats whose number of columns is a multiple of four; appended to it.
// A cell is 16 bytes, four columns; past the end of a row there are zeros. Needs params, EVEN.

alias XCell = vec4<u32>;

fn x_cell(at: u32, row: u32, quad: u32) -> vec4<u32> {
    if (EVEN || quad < params.x_row) {
        return x[at + row * params.x_row + quad];
    }
    return vec4<u32>();
}

fn x_values(cell: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(cell);
}
