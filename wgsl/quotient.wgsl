// No kernel: division as the host rounds it, so that codes of quantised numbers are the host's; appended to quantize_cache.wgsl,
// quantize_update.wgsl and, with quantize_range.wgsl, others. Devices may be off by 2.5 units in the last place; a step of Newton's
// method corrects that. Its residue a - q * b is exact also on devices whose fma rounds twice: factors are cut into halves of 12 bits,
// whose products are floats.

fn high_half(x: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(x) & 0xfffff000u);
}

fn quotient(a: f32, b: f32) -> f32 {
    let q = a / b;
    let q_high = high_half(q);
    let b_high = high_half(b);
    let q_low = q - q_high;
    let b_low = b - b_high;
    let residue = fma(-q_low, b_low, fma(-q_low, b_high, fma(-q_high, b_low, fma(-q_high, b_high, a))));
    let better = fma(residue, 1.0 / b, q);
    // where a quotient or a residue leaves the range of floats, there is nothing to correct
    return select(q, better, abs(q) < 1e30 && abs(b) > 1e-30 && abs(b) < 1e30);
}
