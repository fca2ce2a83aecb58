// Remainders, floored division, shifts and integer powers: a part of elementwise.wgsl.
//
// Float remainders are exact. SPIR-V leaves the sign of % open where an operand is negative, so that integers are divided and multiplied
// back. No memory traffic of its own. Versions tried: this one only.

// SPIR-V leaves the sign of % open where an operand is negative, and drivers differ; division is exact everywhere.
fn fmod_i(x: i32, y: i32) -> i32 {
    return x - (x / y) * y;
}

// The exact remainder of |x| / |y| with the sign of x: long division of the significands, eight bits of quotient a turn.
fn fmod_(x: f32, y: f32) -> f32 {
    if (is_nan(x) || is_nan(y) || is_inf(x) || y == 0.0) { return params.nan; }
    let n = abs(x);
    let d = abs(y);
    if (n < d) { return x; }
    if (n == d) { return copy_sign(0.0, x); }
    let nb = bitcast<u32>(n);
    let db = bitcast<u32>(d);
    // significand and exponent; a subnormal has no hidden bit
    let dm = select((db & 0x007fffffu) | 0x00800000u, db, db < 0x00800000u);
    var rest = select((nb & 0x007fffffu) | 0x00800000u, nb, nb < 0x00800000u) % dm;
    let exponent = max(db >> 23u, 1u);
    var turns = max(nb >> 23u, 1u) - exponent;
    loop {
        if (turns == 0u || rest == 0u) { break; }
        let step = min(turns, 8u);
        rest = (rest << step) % dm;
        turns -= step;
    }
    // rest < 2^24, times 2^(exponent - 150)
    return copy_sign(scale2(f32(rest), i32(exponent) - 150), x);
}

fn remainder_(x: f32, y: f32) -> f32 {
    if (is_inf(y) && !is_inf(x) && !is_nan(x)) { return select(x, y, x != 0.0 && (x < 0.0) != (y < 0.0)); }
    let r = fmod_(x, y);
    return select(r, r + y, r != 0.0 && (r < 0.0) != (y < 0.0));
}

fn floor_divide_(x: f32, y: f32) -> f32 {
    if (y == 0.0) { return x / y; }
    let r = fmod_(x, y);
    var q = (x - r) / y;
    if (r != 0.0 && (r < 0.0) != (y < 0.0)) { q -= 1.0; }
    if (q == 0.0) { return copy_sign(0.0, x / y); }
    return select(q, round(q), abs(q) < 8388608.0);
}

fn remainder_i(x: i32, y: i32) -> i32 {
    let r = fmod_i(x, y);
    return select(r, r + y, r != 0 && (r < 0) != (y < 0));
}

fn floor_divide_i(x: i32, y: i32) -> i32 {
    let q = x / y;
    return select(q, q - 1, fmod_i(x, y) != 0 && (x < 0) != (y < 0));
}

fn shift_left(x: i32, y: i32) -> i32 { return select(x << (u32(y) & 31u), 0, y < 0 || y > 31); }
fn shift_right(x: i32, y: i32) -> i32 { return x >> select(u32(y), 31u, y < 0 || y > 31); }

fn pow_i(x: i32, y: i32) -> i32 {
    if (y < 0) { return select(select(0, select(-1, 1, (y & 1) == 0), x == -1), 1, x == 1); }
    var base = x;
    var r = 1;
    for (var n = u32(y); n > 0u; n >>= 1u) {
        if ((n & 1u) == 1u) { r *= base; }
        base *= base;
    }
    return r;
}
