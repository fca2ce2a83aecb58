// No kernel: scale, zero point and code of rows that are quantised by their own range, as the host rounds them; appended to quantize_rows.wgsl,
// quantize_activations.wgsl and kernels of the gemv_stream family, with quotient.wgsl.
//
//               s = max((most - least) / (high - low), eps), z = clamp(low - round(least / s), low, high)
//   SYMMETRIC:  s = max(max(-least, most) / ((high - low) / 2), eps), z = the middle of low .. high + 1, towards 0
//   code = clamp(round(x * (1 / s)) + z, low, high)
//
// where least <= 0 <= most, and span = (low, high, eps). Divisions are corrected by one step of Newton's method, so that they round as the host's
// do; ties go to even.

fn range_scale(least: f32, most: f32, span: vec3<f32>) -> f32 {
    if (SYMMETRIC) {
        return max(quotient(max(-least, most), 0.5 * (span.y - span.x)), span.z);
    }
    return max(quotient(most - least, span.y - span.x), span.z);
}

fn range_zero(least: f32, s: f32, span: vec3<f32>) -> f32 {
    if (SYMMETRIC) {
        return trunc(0.5 * (span.x + span.y + 1.0));
    }
    return clamp(span.x - round(quotient(least, s)), span.x, span.y);
}

fn range_codes(x: vec4<f32>, inverse: f32, z: f32, span: vec3<f32>) -> vec4<f32> {
    return clamp(round(x * inverse) + vec4<f32>(z), vec4<f32>(span.x), vec4<f32>(span.y));
}

/// Least and most of four numbers and 0; the most is infinite where one is not finite.
fn range_of(v: vec4<f32>) -> vec2<f32> {
    let bits = bitcast<vec4<u32>>(v) & vec4<u32>(0x7fffffffu);
    let largest = max(max(bits.x, bits.y), max(bits.z, bits.w)); // as integers, so that what is not finite wins
    let most = max(max(max(v.x, v.y), max(v.z, v.w)), 0.0);
    let bad = largest >= 0x7f800000u;
    return vec2<f32>(min(min(min(v.x, v.y), min(v.z, v.w)), 0.0), select(most, bitcast<f32>(min(largest, 0x7f800000u)), bad));
}

/// Two of these, with a sum.
fn range_meet(a: vec3<f32>, b: vec3<f32>) -> vec3<f32> {
    return vec3<f32>(min(a.x, b.x), max(a.y, b.y), a.z + b.z);
}

/// The scale that is stored: a NaN where the row, whose most is `most`, has numbers that are not finite.
fn range_stored(most: f32, s: f32) -> f32 {
    return bitcast<f32>(select(bitcast<u32>(s), 0x7fc00000u, bitcast<u32>(most) >= 0x7f800000u));
}

/// Whether some of four differences of codes and zero are no signed bytes.
fn range_wide(d: vec4<f32>) -> bool {
    return any(d < vec4<f32>(-128.0)) || any(d > vec4<f32>(127.0));
}

/// The bytes of a word.
fn range_word(codes: vec4<f32>) -> u32 {
    let q = vec4<u32>(vec4<i32>(codes)) & vec4<u32>(255u);
    return q.x | (q.y << 8u) | (q.z << 16u) | (q.w << 24u);
}
