// No kernel: logits of a bfloat16 program, which are kept as f32, as the host sees them: rounded to nearest even, as `host.f32_to_bf16` does;
// appended to `choose_argmax`. What is too large becomes infinite by the carry into the exponent.

fn rounded(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) { return x; } // NaN
    return bitcast<f32>((bits + 0x7fffu + ((bits >> 16u) & 1u)) & 0xffff0000u);
}
