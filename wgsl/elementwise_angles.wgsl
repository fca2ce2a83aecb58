// Sines, cosines, tangents and their inverses: a part of elementwise.wgsl.
//
// The built-ins are not used: WGSL allows sin an absolute error of 2^-11 on [-pi, pi] and leaves larger angles open. The series are fits
// for f32; large angles are reduced with those bits of 2/pi that matter. No memory traffic of its own. Versions tried: this one only.

const HALF_PI: f32 = 1.57079633;

// (high word, low word) of a * b.
fn mul_wide(m: u32, n: u32) -> vec2<u32> {
    let low = (m & 0xffffu) * (n & 0xffffu);
    let cross = (m >> 16u) * (n & 0xffffu) + (low >> 16u);
    let other = (m & 0xffffu) * (n >> 16u) + (cross & 0xffffu);
    return vec2<u32>((m >> 16u) * (n >> 16u) + (cross >> 16u) + (other >> 16u), (other << 16u) | (low & 0xffffu));
}

// For |x| >= 2^15: the significand times those 96 bits of 2/pi that matter for this exponent, modulo 4 quarter turns.
fn reduce_large(x: f32) -> vec2<f32> {
    var table = array<u32, 8>(0u, 0xa2f9836eu, 0x4e441529u, 0xfc2757d1u, 0xf534ddc0u, 0xdb629599u, 0x3c439041u, 0xfe600000u);
    let bits = bitcast<u32>(x) & 0x7fffffffu;
    let m = (bits & 0x007fffffu) | 0x00800000u;
    let start = (bits >> 23u) - 120u; // exponent of the last bit (- 150), less 2, plus the leading zero word
    let word = min(start >> 5u, 4u);
    let shift = start & 31u;
    var w = vec3<u32>(table[word], table[word + 1u], table[word + 2u]);
    if (shift != 0u) {
        let next = vec3<u32>(w.y, w.z, table[word + 3u]);
        w = (w << vec3<u32>(shift)) | (next >> vec3<u32>(32u - shift));
    }
    let low = mul_wide(w.z, m);
    let mid = mul_wide(w.y, m);
    let p1 = mid.y + low.x;
    let p2 = w.x * m + mid.x + select(0u, 1u, p1 < mid.y);
    var quarter = p2 >> 30u;
    var high = (p2 << 2u) | (p1 >> 30u);
    var rest = (p1 << 2u) | (low.y >> 30u);
    let above = high >= 0x80000000u;
    if (above) {
        quarter += 1u;
        rest = ~rest;
        high = ~high;
    }
    let size = (f32(high) * 2.3283064365386963e-10 + f32(rest) * 5.421010862427522e-20) * HALF_PI;
    let turned = select(size, -size, above);
    return select(vec2<f32>(turned, f32(quarter & 3u)), vec2<f32>(-turned, f32((4u - (quarter & 3u)) & 3u)), x < 0.0);
}

// (r, q): x = q pi/2 + r modulo 2 pi, |r| <= pi/4, q in 0..3. Below 2^15 by a three-part pi/2 whose first two products are exact.
fn reduce_angle(x: f32) -> vec2<f32> {
    if (is_nan(x) || is_inf(x)) { return vec2<f32>(params.nan, 0.0); }
    if (abs(x) >= 32768.0) { return reduce_large(x); }
    let n = round(x * 0.636619772);
    let r = ((x - n * 1.5703125) - n * 0.00048351287841796875) - n * 3.13916473e-07;
    return vec2<f32>(r, f32(i32(n) & 3));
}

fn sin_series(r: f32) -> f32 {
    let z = r * r;
    return r + r * z * (-0.166666672 + z * (0.00833332911 + z * (-0.000198392561 + z * 2.71756448e-06)));
}

fn cos_series(r: f32) -> f32 {
    let z = r * r;
    return 1.0 - (0.5 * z - z * z * (0.0416666679 + z * (-0.00138888834 + z * (2.47994358e-05 + z * -2.72033049e-07))));
}

fn sin_quarter(r: f32, quarter: u32) -> f32 {
    let s = select(sin_series(r), cos_series(r), (quarter & 1u) == 1u);
    return select(s, -s, (quarter & 2u) == 2u);
}

fn sin_(x: f32) -> f32 {
    let v = reduce_angle(x);
    return sin_quarter(v.x, u32(v.y));
}

fn cos_(x: f32) -> f32 {
    let v = reduce_angle(x);
    return sin_quarter(v.x, u32(v.y) + 1u);
}

fn tan_(x: f32) -> f32 {
    let v = reduce_angle(x);
    let t = sin_series(v.x) / cos_series(v.x);
    return select(t, -1.0 / t, (u32(v.y) & 1u) == 1u);
}

fn atan_(x: f32) -> f32 {
    let size = abs(x);
    let big = size > 2.41421356;
    let middle = size > 0.414213562 && !big;
    let u = select(select(size, (size - 1.0) / (size + 1.0), middle), -1.0 / size, big);
    let z = u * u;
    let p = -0.333333313 + z * (0.19999896 + z * (-0.142817751 + z * (0.11041633 + z * (-0.0845830142 + z * 0.0470520705))));
    let base = select(select(0.0, 0.5 * HALF_PI, middle), HALF_PI, big);
    return select(copy_sign(base + (u + u * z * p), x), x, is_nan(x));
}

fn atan2_(y: f32, x: f32) -> f32 {
    if (is_nan(x) || is_nan(y)) { return params.nan; }
    var r = 0.0;
    if (is_inf(x) && is_inf(y)) {
        r = 0.5 * HALF_PI;
    } else if (y == 0.0) {
        r = 0.0;
    } else if (x == 0.0) {
        r = HALF_PI;
    } else if (abs(y) > abs(x)) { // the quotient may overflow the other way round
        r = HALF_PI - atan_(abs(x) / abs(y));
    } else {
        r = atan_(abs(y) / abs(x));
    }
    return copy_sign(select(r, 2.0 * HALF_PI - r, negative(x)), y);
}

fn asin_series(x: f32) -> f32 {
    let z = x * x;
    let p = 0.166666582 + z * (0.0750057474 + z * (0.0445027277 + z * (0.0319315493 + z * (0.0139529053 + z * 0.0382207297))));
    return x + x * z * p;
}

fn asin_(x: f32) -> f32 {
    let size = abs(x);
    if (size <= 0.5) { return asin_series(x); }
    if (!(size <= 1.0)) { return params.nan; }
    return copy_sign(HALF_PI - 2.0 * asin_series(sqrt(0.5 * (1.0 - size))), x);
}

fn acos_(x: f32) -> f32 {
    let size = abs(x);
    if (size <= 0.5) { return HALF_PI - asin_series(x); }
    if (!(size <= 1.0)) { return params.nan; }
    let r = 2.0 * asin_series(sqrt(0.5 * (1.0 - size)));
    return select(r, 2.0 * HALF_PI - r, x < 0.0);
}
