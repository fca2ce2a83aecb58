// No kernel: 32-bit keys that order scores as floats do, appended to the kernels that choose a token (see runtime/decoding/chooser.py).
// Both zeros have one key; NaN is the largest, so that the maximum of the keys shows whether there is one; no score has key 0.

const NAN_KEY: u32 = 0xffffffffu;
const PLUS_INFINITY_KEY: u32 = 0xff800000u;
const MINUS_INFINITY_KEY: u32 = 0x007fffffu;

fn key_of(score: f32) -> u32 {
    let bits = bitcast<u32>(score);
    let magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) { return NAN_KEY; }
    if (magnitude == 0u) { return 0x80000000u; }
    return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}

fn score_of(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, key >= 0x80000000u));
}
