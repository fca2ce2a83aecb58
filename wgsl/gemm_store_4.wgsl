// No kernel: how `gemm` reads the residual and writes results whose number of columns is a multiple of four; appended to it. Out and Residual
// are vectors of four.

fn residual_at(at: u32, col: u32) -> vec4<f32> {
    return vec4<f32>(residual[at / 4u]);
}

fn put(at: u32, col: u32, y: vec4<f32>) {
    out[at / 4u] = Out(y);
}
