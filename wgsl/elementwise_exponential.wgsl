// Exponentials, logarithms, powers, hyperbolic functions, the error function and activations made of them: a part of elementwise.wgsl.
//
// The built-ins are not used: WGSL leaves their overflow, and some of their errors, open. The series are fits for f32; arguments are
// reduced so that what is subtracted is exact. No memory traffic of its own. Versions tried: this one only.

const LN2_HIGH: f32 = 0.693115234375; // 12 bits: a product with an exponent is exact
const LN2_LOW: f32 = 3.19461849e-05;
const LN2: f32 = 0.693147181;
const LOG2_E: f32 = 1.44269504;

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
