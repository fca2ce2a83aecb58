// out[i] = finish(apply(x, y, z)): every elementwise operator, with up to three operands.
//
// Appended by the host for each operator (ops/elementwise.py):
//   alias A, B, C, Out   storage types of the operands and of the result
//   alias T              type in which operands are loaded and computed: f32 or i32
//   alias R              type of apply's result: f32, i32 or bool
//   fn apply(x: T, y: T, z: T) -> R     the operator; may use params.p, params.inf, params.nan and the functions below
//   fn finish(v: R) -> Out              rounding or wrapping into the result's dtype
//
// An operand is (its MODE) 0 a tensor of the result's shape, 1 a one-element tensor, 2 a tensor that is broadcast (strides), 3 a number in
// params (its bits), 4 a live scalar. Only mode 2 does index arithmetic: RANK dimensions, already merged by the host.
//
// One workgroup: WG consecutive elements, one per invocation. Memory traffic: each operand read once (coalesced in modes 0 and mostly 2),
// the result written once. The built-in exp, log, sin, tanh, ... are not used: WGSL allows sin an absolute error of 2^-11 on [-pi, pi] and
// leaves larger angles and overflow open. The series are fits for f32. Tried: nothing else yet (next: four elements per invocation).

@group(0) @binding(0) var<storage, read> a: array<A>;
@group(0) @binding(1) var<storage, read> b: array<B>;
@group(0) @binding(2) var<storage, read> c: array<C>;
@group(0) @binding(3) var<storage, read_write> out: array<Out>;

struct Params {
    count: u32,
    scalar_a: u32,
    scalar_b: u32,
    scalar_c: u32,
    inf: f32,
    nan: f32,
    p: vec4<f32>,
    shape: array<vec4<u32>, 2>,
    strides_a: array<vec4<u32>, 2>,
    strides_b: array<vec4<u32>, 2>,
    strides_c: array<vec4<u32>, 2>,
}
@group(0) @binding(4) var<uniform> params: Params;
@group(0) @binding(5) var<uniform> live: array<vec4<i32>, 16>;

override WG: u32 = 64u;
override A_MODE: u32 = 0u;
override B_MODE: u32 = 3u;
override C_MODE: u32 = 3u;
override RANK: u32 = 0u;

const LN2_HIGH: f32 = 0.693115234375; // 12 bits: a product with an exponent is exact
const LN2_LOW: f32 = 3.19461849e-05;
const LN2: f32 = 0.693147181;
const LOG2_E: f32 = 1.44269504;
const HALF_PI: f32 = 1.57079633;

fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }
fn is_inf(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) == 0x7f800000u; }
fn negative(x: f32) -> bool { return (bitcast<u32>(x) >> 31u) == 1u; }
fn copy_sign(x: f32, sign_of: f32) -> f32 {
    return bitcast<f32>((bitcast<u32>(x) & 0x7fffffffu) | (bitcast<u32>(sign_of) & 0x80000000u));
}
// The upper 12 bits of the significand: products of two such numbers are exact.
fn upper(x: f32) -> f32 { return bitcast<f32>(bitcast<u32>(x) & 0xfffff000u); }

// NaN wins; of two NaNs the first.
fn maximum(x: f32, y: f32) -> f32 { return select(select(y, x, x > y), x, is_nan(x)); }
fn minimum(x: f32, y: f32) -> f32 { return select(select(y, x, x < y), x, is_nan(x)); }

// x * 2^n in two steps, so that neither factor leaves the range; |n| <= 250.
fn scale2(x: f32, n: i32) -> f32 {
    let half = n >> 1u;
    return x * bitcast<f32>(u32(half + 127) << 23u) * bitcast<f32>(u32(n - half + 127) << 23u);
}

// e^r for |r| <= ln(2)/2.
fn exp_series(r: f32) -> f32 {
    let p = 0.5 + r * (0.166665122 + r * (0.0416661873 + r * (0.00836959854 + r * 0.00139517174)));
    return 1.0 + (r + r * r * p);
}

fn exp_(x: f32) -> f32 {
    let t = clamp(x, -104.0, 89.0);
    let n = round(t * LOG2_E);
    let r = (t - n * LN2_HIGH) - n * LN2_LOW;
    return select(scale2(exp_series(r), i32(n)), x, is_nan(x));
}

fn exp2_(x: f32) -> f32 {
    let t = clamp(x, -150.0, 129.0);
    let n = round(t);
    return select(scale2(exp_series((t - n) * LN2), i32(n)), x, is_nan(x));
}

fn expm1_(x: f32) -> f32 {
    if (abs(x) < 0.5) {
        let p = 0.50000006 + x * (0.166666687 + x * (0.0416652039 + x * (0.00833305158 + x * (0.00140018517 + x * 0.000199990667))));
        return x + x * x * p;
    }
    return exp_(x) - 1.0;
}

// (exponent, significand in [sqrt(1/2), sqrt(2))) of a positive number.
fn split(x: f32) -> vec2<f32> {
    var bits = bitcast<u32>(x);
    var exponent = 0;
    if (bits < 0x00800000u) { // subnormal
        bits = bitcast<u32>(x * 33554432.0);
        exponent = -25;
    }
    let shifted = bits - 0x3f3504f3u;
    exponent += bitcast<i32>(shifted) >> 23u;
    return vec2<f32>(f32(exponent), bitcast<f32>((shifted & 0x007fffffu) + 0x3f3504f3u));
}

// log(1 + f) = 2 atanh(f / (2 + f)), for 1 + f in [sqrt(1/2), sqrt(2)] and somewhat beyond.
fn log_series(f: f32) -> f32 {
    let s = f / (2.0 + f);
    let z = s * s;
    return 2.0 * s + s * z * (0.666666687 + z * (0.399998635 + z * (0.285805315 + z * (0.219572023 + z * 0.216219053))));
}

fn log_edges(x: f32, r: f32) -> f32 {
    if (is_nan(x) || x < 0.0) { return params.nan; }
    if (x == 0.0) { return -params.inf; }
    return select(r, x, is_inf(x));
}

fn log_(x: f32) -> f32 {
    let v = split(x);
    return log_edges(x, v.x * LN2_HIGH + (v.x * LN2_LOW + log_series(v.y - 1.0)));
}

fn log2_(x: f32) -> f32 {
    let v = split(x);
    return log_edges(x, v.x + log_series(v.y - 1.0) * LOG2_E);
}

fn log10_(x: f32) -> f32 {
    let v = split(x);
    return log_edges(x, v.x * 0.30078125 + (v.x * 0.000248745664 + log_series(v.y - 1.0) * 0.434294482)); // log10(2) in two parts
}

fn log1p_(x: f32) -> f32 {
    if (abs(x) < 0.4) { return select(log_series(x), x, x == 0.0); }
    return log_(1.0 + x);
}

fn is_odd(y: f32) -> bool { return floor(y) == y && abs(y) < 16777216.0 && (i32(clamp(y, -16777216.0, 16777216.0)) & 1) == 1; }

// |x|^y = 2^(y e + y l) for |x| = 2^e 2^l. y e is kept exact in two products, so that the error is about |y| * 3e-8.
fn pow_(x: f32, y: f32) -> f32 {
    if (y == 0.0 || x == 1.0) { return 1.0; }
    if (is_nan(x) || is_nan(y)) { return params.nan; }
    let size = abs(x);
    let flip = x < 0.0 || (x == 0.0 && negative(x));
    var r = 0.0;
    if (is_inf(y)) {
        if (size == 1.0) { return 1.0; }
        return select(0.0, params.inf, (size > 1.0) == (y > 0.0));
    } else if (size == 0.0 || is_inf(size)) {
        r = select(0.0, params.inf, (size == 0.0) == (y < 0.0));
    } else {
        let v = split(size);
        let l = log_series(v.y - 1.0) * LOG2_E;
        let top = upper(y);
        let n = round(clamp(y * (v.x + l), -300.0, 300.0));
        let rest = clamp((top * v.x - n) + ((y - top) * v.x + y * l), -40.0, 40.0);
        r = scale2(exp_(rest * LN2), clamp(i32(n), -250, 250));
    }
    if (flip) {
        if (x != 0.0 && !is_inf(x) && floor(y) != y) { return params.nan; }
        if (is_odd(y)) { return -r; }
    }
    return r;
}

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

fn tanh_(x: f32) -> f32 {
    let size = abs(x);
    if (size < 0.6) {
        let z = x * x;
        let p = -0.333333313 + z * (0.133332342 + z * (-0.0539505146 + z * (0.0217224378 + z * (-0.00823408365 + z * 0.00219758973))));
        return x + x * z * p;
    }
    return copy_sign(1.0 - 2.0 / (exp_(2.0 * size) + 1.0), x);
}

fn sinh_(x: f32) -> f32 {
    let size = abs(x);
    if (size < 1.0) {
        let z = x * x;
        return x + x * z * (0.166666672 + z * (0.00833335146 + z * (0.000198359616 + z * 2.81806342e-06)));
    }
    return copy_sign(half_exp(size) - 0.5 * exp_(-size), x);
}

fn cosh_(x: f32) -> f32 {
    return half_exp(abs(x)) + 0.5 * exp_(-abs(x));
}

// e^x / 2, which overflows later than e^x: (e^(x/2 - 2))^2 * e^4 / 2. The subtraction is exact, and no order in which a
// compiler multiplies overflows early (NVIDIA's folds 0.5 * root * root into 0.5 * (root * root)).
fn half_exp(x: f32) -> f32 {
    let root = exp_(0.5 * x - 2.0);
    return root * root * 27.2990742;
}

// SPIR-V leaves the sign of % open where an operand is negative, and drivers differ; division is exact everywhere.
fn fmod_i(x: i32, y: i32) -> i32 {
    return x - (x / y) * y;
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

fn asinh_(x: f32) -> f32 {
    let size = abs(x);
    if (size > 1e9) { return copy_sign(log_(size) + LN2, x); }
    return copy_sign(log1p_(size + size * size / (1.0 + sqrt(size * size + 1.0))), x);
}

fn acosh_(x: f32) -> f32 {
    if (x > 1e9) { return log_(x) + LN2; }
    let t = x - 1.0;
    if (!(t >= 0.0)) { return params.nan; }
    return log1p_(t + sqrt(2.0 * t + t * t));
}

fn atanh_(x: f32) -> f32 {
    if (!(abs(x) <= 1.0)) { return params.nan; }
    if (abs(x) < 0.25) { return 0.5 * log_series(2.0 * x / (1.0 - x)); }
    return copy_sign(0.5 * log_((1.0 + abs(x)) / (1.0 - abs(x))), x);
}

// e^(-scale t^2), with the square in two parts: its rounding would cost t^2 * 6e-8. scale is a power of two.
fn exp_square(t: f32, scale: f32) -> f32 {
    let top = upper(t);
    return exp_(-scale * top * top) * exp_(-scale * (t - top) * (t + top));
}

// e^(t^2) erfc(t) for t >= 0, as a series in (t - 2) / (t + 2) over 1 + 2 t.
fn erfc_scaled(t: f32) -> f32 {
    let u = (t - 2.0) / (t + 2.0);
    let high = -0.0542026237 + u * (-0.00806088839 + u * (0.00862535741 + u * (0.001312571 + u * (-0.00122234179 + u * -0.000396107265))));
    return (1.27697837 + u * (-0.0927639976 + u * (-0.166031569 + u * (0.16405566 + u * high)))) / (1.0 + 2.0 * t);
}

fn erf_(x: f32) -> f32 {
    if (is_nan(x)) { return x; }
    let size = abs(x);
    if (size < 1.0) {
        let z = x * x;
        let high = -0.0268653762 + z * (0.00522085885 + z * (-0.000848127762 + z * (0.000112437032 + z * -9.598215e-06)));
        return x * (1.12837923 + z * (-0.376126379 + z * (0.112837814 + z * high)));
    }
    let t = min(size, 10.0);
    return copy_sign(1.0 - exp_square(t, 1.0) * erfc_scaled(t), x);
}

fn sigmoid_(x: f32) -> f32 { return 1.0 / (1.0 + exp_(-x)); }

// x Phi(x) = x erfc(-x / sqrt(2)) / 2; the negative tail keeps its relative accuracy.
fn gelu_(x: f32) -> f32 {
    let size = min(abs(x), 14.5);
    let tail = exp_square(size, 0.5) * erfc_scaled(size * 0.707106781);
    return 0.5 * x * select(2.0 - tail, tail, x < 0.0);
}

fn gelu_tanh(x: f32) -> f32 { return x / (1.0 + exp_(-1.59576912 * (x + 0.044715 * x * x * x))); }

fn softplus_(x: f32) -> f32 { return maximum(x, 0.0) + log1p_(exp_(-abs(x))); }

fn mish_(x: f32) -> f32 {
    if (x > 20.0) { return x; }
    let e = exp_(x);
    let n = e * (e + 2.0);
    return x * (n / (n + 2.0));
}

// Truncation that saturates; NaN gives 0.
fn to_int(x: f32) -> i32 {
    if (is_nan(x)) { return 0; }
    if (x >= 2147483648.0) { return 2147483647; }
    return i32(max(x, -2147483648.0));
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

fn component(v: array<vec4<u32>, 2>, d: u32) -> u32 {
    let half = select(v[0], v[1], d > 3u);
    return half[d & 3u];
}

fn offsets(i: u32) -> vec3<u32> {
    var rest = i;
    var at = vec3<u32>(0u);
    for (var d = RANK; d > 0u; d--) {
        let size = component(params.shape, d - 1u);
        let strides = vec3<u32>(component(params.strides_a, d - 1u), component(params.strides_b, d - 1u), component(params.strides_c, d - 1u));
        at += (rest % size) * strides;
        rest /= size;
    }
    return at;
}

fn load_a(i: u32, at: u32) -> T {
    if (A_MODE == 4u) { return T(live_value(params.scalar_a)); }
    if (A_MODE == 3u) { return bitcast<T>(params.scalar_a); }
    return T(a[select(select(i, 0u, A_MODE == 1u), at, A_MODE == 2u)]);
}

fn load_b(i: u32, at: u32) -> T {
    if (B_MODE == 4u) { return T(live_value(params.scalar_b)); }
    if (B_MODE == 3u) { return bitcast<T>(params.scalar_b); }
    return T(b[select(select(i, 0u, B_MODE == 1u), at, B_MODE == 2u)]);
}

fn load_c(i: u32, at: u32) -> T {
    if (C_MODE == 4u) { return T(live_value(params.scalar_c)); }
    if (C_MODE == 3u) { return bitcast<T>(params.scalar_c); }
    return T(c[select(select(i, 0u, C_MODE == 1u), at, C_MODE == 2u)]);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (wid.y * groups.x + wid.x) * WG + lane;
    if (i >= params.count) { return; }
    let at = offsets(i);
    out[i] = finish(apply(load_a(i, at.x), load_b(i, at.y), load_c(i, at.z)));
}
