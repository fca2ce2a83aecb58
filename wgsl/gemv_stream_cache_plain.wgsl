// No kernel: projections without biases, appended to `gemv_stream_cache`, so that their bindings need not be there.
// gemv_stream_cache_biases.wgsl is the same for those with biases.

fn bias_of(which: u32, column: u32) -> f32 {
    return 0.0;
}
