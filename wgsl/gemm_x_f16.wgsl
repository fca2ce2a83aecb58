// No kernel: how `gemm` reads rows of x in 16-bit floats whose number of columns is a multiple of four; appended to it.
// A cell is 8 bytes, four columns; past the end of a row there are zeros. Needs params, EVEN.

alias XCell = vec2<u32>;

fn x_cell(at: u32, row: u32, quad: u32) -> vec4<u32> {
    if (EVEN || quad < params.x_row) {
        return vec4<u32>(x[at + row * params.x_row + quad], 0u, 0u);
    }
    return vec4<u32>();
}

fn x_values(cell: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(cell.x), unpack2x16float(cell.y));
}
