// No kernel: how `gemv_stream` and `gemv_stream_siblings` read cells of 16-bit floats; appended to them. A cell of a weight is 16 bytes, eight columns.
// Needs: `x` and `norm` as arrays of vec4.

alias Raw = vec4<u32>;
alias Wide = mat2x4<f32>;

fn wide(cell: Raw) -> Wide {
    return mat2x4<f32>(
        vec4<f32>(unpack2x16float(cell.x), unpack2x16float(cell.y)),
        vec4<f32>(unpack2x16float(cell.z), unpack2x16float(cell.w)),
    );
}

fn x_cell(at: u32) -> Wide {
    return mat2x4<f32>(vec4<f32>(x[2u * at]), vec4<f32>(x[2u * at + 1u]));
}

fn norm_cell(at: u32) -> Wide {
    return mat2x4<f32>(vec4<f32>(norm[2u * at]), vec4<f32>(norm[2u * at + 1u]));
}

fn times(a: Wide, b: Wide) -> Wide {
    return mat2x4<f32>(a[0] * b[0], a[1] * b[1]);
}

fn product(a: Wide, b: Wide) -> f32 {
    return dot(a[0], b[0]) + dot(a[1], b[1]);
}
