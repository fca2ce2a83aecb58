// No kernel: how `gemv_stream` and `gemv_stream_siblings` read cells of 32-bit floats; appended to them. A cell of a weight is 16 bytes, four columns.
// Needs: `x` and `norm` as arrays of vec4.

alias Raw = vec4<f32>;
alias Wide = vec4<f32>;

fn wide(cell: Raw) -> Wide {
    return cell;
}

fn x_cell(at: u32) -> Wide {
    return vec4<f32>(x[at]);
}

fn norm_cell(at: u32) -> Wide {
    return vec4<f32>(norm[at]);
}

fn times(a: Wide, b: Wide) -> Wide {
    return a * b;
}

fn product(a: Wide, b: Wide) -> f32 {
    return dot(a, b);
}
