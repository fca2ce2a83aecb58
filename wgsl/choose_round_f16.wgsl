// No kernel: logits of a float16 program, which are kept as f32, as the host sees them: rounded to nearest even; appended to `choose_argmax`.
// In integers: what f32(f16(x)) and quantizeToF16 give in the middle between two numbers, and whether devices have f16, is the driver's.

const LEAST_NORMAL: u32 = 0x38800000u; // 2^-14
const OVERFLOWS: u32 = 0x477ff000u; // 65,520, the middle between the largest number and 2^16

fn rounded(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    let magnitude = bits & 0x7fffffffu;
    let sign = bits & 0x80000000u;
    if (magnitude > 0x7f800000u) { return x; } // NaN
    if (magnitude >= OVERFLOWS) { return bitcast<f32>(sign | 0x7f800000u); }
    if (magnitude < LEAST_NORMAL) { // multiples of 2^-24; both products are exact
        return bitcast<f32>(sign | bitcast<u32>(round(bitcast<f32>(magnitude) * 0x1p24) * 0x1p-24));
    }
    return bitcast<f32>((bits + 0xfffu + ((bits >> 13u) & 1u)) & 0xffffe000u);
}
