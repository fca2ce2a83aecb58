// No kernel: how `gemm` reads the residual and writes results of any number of columns, element by element; appended to it.
// Nothing is read or written past the last column. Needs params.

fn residual_at(at: u32, col: u32) -> vec4<f32> {
    let left = params.n - 1u - col;
    return vec4<f32>(
        f32(residual[at]),
        f32(residual[at + min(1u, left)]),
        f32(residual[at + min(2u, left)]),
        f32(residual[at + min(3u, left)]),
    );
}

fn put(at: u32, col: u32, y: vec4<f32>) {
    out[at] = Out(y.x);
    if (col + 1u < params.n) { out[at + 1u] = Out(y.y); }
    if (col + 2u < params.n) { out[at + 2u] = Out(y.z); }
    if (col + 3u < params.n) { out[at + 3u] = Out(y.w); }
}
