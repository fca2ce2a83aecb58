// No kernel: division as the host rounds it, so that codes of quantised numbers are the host's; appended to quantize_cache.wgsl,
// quantize_update.wgsl and, with quantize_range.wgsl, others. Devices may be off by 2.5 units in the last place; a step of Newton's
// method corrects that.

fn quotient(a: f32, b: f32) -> f32 {
    let q = a / b;
    let better = fma(fma(-q, b, a), 1.0 / b, q);
    // where a quotient or a residue leaves the range of floats, there is nothing to correct
    return select(q, better, abs(q) < 1e30 && abs(b) > 1e-30 && abs(b) < 1e30);
}
