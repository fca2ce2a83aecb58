// No kernel: weights of tokens and exact sums of them, appended to the kernels that draw a token (see runtime/decoding/chooser.py).
//
// The weight of a token is exp((score - largest score) / temperature), at most 1; its mass is the weight in units of 2^-40, a 64-bit integer
// in two words (low, high). Sums of integers do not depend on their order: workgroups may add with atomics and the same seed still gives
// the same token. The largest token has mass 2^40; lighter ones than 2^-40 have none (2^18 of them are less than 3e-7 of the total).
// An inverse temperature of 0 stands for a greedy row among others: only the largest tokens have mass.
//
// Needs: work; workgroup arrays low, high of at least 516 atomics; params.chunks; philox.wgsl (mul_high), choose_keys.wgsl.

struct Sum { count: u32, mass: vec2<u32> }

fn add64(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low_word = a.x + b.x;
    return vec2<u32>(low_word, a.y + b.y + select(0u, 1u, low_word < a.x));
}

/// a - b; a is not less than b.
fn sub64(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2<u32>(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x));
}

fn less64(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}

fn times(a: vec2<u32>, n: u32) -> vec2<u32> {
    return vec2<u32>(a.x * n, a.y * n + mul_high(a.x, n));
}

/// a * fraction / 2^32, rounded down.
fn portion(a: vec2<u32>, fraction: u32) -> vec2<u32> {
    return add64(vec2<u32>(a.y * fraction, mul_high(a.y, fraction)), vec2<u32>(mul_high(a.x, fraction), 0u));
}

fn plus(a: Sum, b: Sum) -> Sum {
    return Sum(a.count + b.count, add64(a.mass, b.mass));
}

fn minus(a: Sum, b: Sum) -> Sum {
    return Sum(a.count - b.count, sub64(a.mass, b.mass));
}

const NO_WEIGHT: f32 = -1e30;

/// The logarithm of a token's weight, at least NO_WEIGHT. Negative for all but the largest, also where it underflows.
fn exponent_of(key: u32, largest: u32, inverse_temperature: f32) -> f32 {
    if (key == largest) { return 0.0; }
    if (inverse_temperature == 0.0 || largest == PLUS_INFINITY_KEY || key <= MINUS_INFINITY_KEY) { return NO_WEIGHT; }
    let exponent = (score_of(key) - score_of(largest)) * inverse_temperature;
    if (!(exponent > -30.0)) { return NO_WEIGHT; }
    return min(exponent, -1.1754944e-38);
}

fn weight_of(key: u32, largest: u32, inverse_temperature: f32) -> f32 {
    return kept_weight(key, largest, inverse_temperature, NO_WEIGHT);
}

/// The weight if min-p keeps the token, else 0; `least` is the logarithm of min-p. Compared as logarithms: weights of different scores may
/// round to the same.
fn kept_weight(key: u32, largest: u32, inverse_temperature: f32, least: f32) -> f32 {
    let exponent = exponent_of(key, largest, inverse_temperature);
    if (exponent == NO_WEIGHT || exponent < least) { return 0.0; }
    return select(min(exp(exponent), 1.0), 1.0, exponent == 0.0);
}

fn mass_of(weight: f32) -> vec2<u32> {
    let scaled = weight * 256.0;
    let whole = floor(scaled);
    return vec2<u32>(u32((scaled - whole) * 4294967296.0), u32(whole));
}

fn store_sum(lane: u32, sum: Sum) {
    atomicStore(&low[lane], sum.mass.x);
    atomicStore(&high[lane], sum.mass.y);
    atomicStore(&low[256u + lane], sum.count);
}

fn load_sum(lane: u32) -> Sum {
    return Sum(atomicLoad(&low[256u + lane]), vec2<u32>(atomicLoad(&low[lane]), atomicLoad(&high[lane])));
}

/// The sum of invocations 0..lane. Afterwards, until the next barrier, load_sum(255) is the sum of all.
fn scan(lane: u32, own: Sum) -> Sum {
    var sum = own;
    for (var distance = 1u; distance < 256u; distance *= 2u) {
        workgroupBarrier();
        store_sum(lane, sum);
        workgroupBarrier();
        if (lane >= distance) { sum = plus(load_sum(lane - distance), sum); }
    }
    workgroupBarrier();
    store_sum(lane, sum);
    workgroupBarrier();
    return sum;
}

/// (largest key, its lowest id) of a row, from the chunks that choose_argmax.wgsl left at the start of the row's `work`.
fn leader(lane: u32, base: u32) -> vec2<u32> {
    var key = 0u;
    var place = 0xffffffffu;
    for (var chunk = lane; chunk < params.chunks; chunk += 256u) {
        let mine = atomicLoad(&work[base + chunk * 2u]);
        if (mine > key) {
            key = mine;
            place = atomicLoad(&work[base + chunk * 2u + 1u]);
        }
    }
    for (var half = 128u; half > 0u; half /= 2u) {
        atomicStore(&low[lane], key);
        atomicStore(&high[lane], place);
        workgroupBarrier();
        if (lane < half) {
            let other = atomicLoad(&low[lane + half]);
            let where_other = atomicLoad(&high[lane + half]);
            if (other > key || (other == key && where_other < place)) {
                key = other;
                place = where_other;
            }
        }
        workgroupBarrier();
    }
    if (lane == 0u) {
        atomicStore(&low[0], key);
        atomicStore(&high[0], place);
    }
    workgroupBarrier();
    let found = vec2<u32>(atomicLoad(&low[0]), atomicLoad(&high[0]));
    workgroupBarrier();
    return found;
}
