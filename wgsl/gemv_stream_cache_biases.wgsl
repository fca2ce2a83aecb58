// No kernel: the biases of query, key and value, as far as BIAS0, BIAS1 and BIAS2 say that there are some, appended to `gemv_stream_cache`, for
// devices that bind 14 storage buffers.

@group(0) @binding(14) var<storage, read> bias0: array<Bias0>;
@group(0) @binding(15) var<storage, read> bias1: array<Bias1>;
@group(0) @binding(16) var<storage, read> bias2: array<Bias2>;

fn bias_of(which: u32, column: u32) -> f32 {
    if (BIAS0 && which == 0u) {
        return f32(bias0[column]);
    }
    if (BIAS1 && which == 1u) {
        return f32(bias1[column]);
    }
    if (BIAS2 && which == 2u) {
        return f32(bias2[column]);
    }
    return 0.0;
}
