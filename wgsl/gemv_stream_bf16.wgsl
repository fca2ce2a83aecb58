// No kernel: how `gemv_stream` and `gemv_stream_siblings` read cells of bfloat16; appended to them. A cell of a weight is 16 bytes, eight columns.
// A bfloat16 is the upper half of a 32-bit float: the even column of a word is shifted up, the odd one masked.
// Needs: `x` and `norm` as arrays of vec4.

alias Raw = vec4<u32>;
alias Wide = mat2x4<f32>;

fn wide(cell: Raw) -> Wide {
    let even = cell << vec4<u32>(16u);
    let odd = cell & vec4<u32>(0xffff0000u);
    return mat2x4<f32>(
        bitcast<vec4<f32>>(vec4<u32>(even.x, odd.x, even.y, odd.y)),
        bitcast<vec4<f32>>(vec4<u32>(even.z, odd.z, even.w, odd.w)),
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
