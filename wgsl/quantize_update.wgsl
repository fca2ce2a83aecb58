// New keys and values into caches of packed bytes, each head's vector y [D] by its own range, as ExecuTorch's quantised cache does:
//
//   least = min(0, min y), most = max(0, max y), s = max((most - least) / 255, EPS), z = clamp(-128 - round(least / s), -128, 127)
//   code_i = clamp(round(y_i * (1 / s)) + z, -128, 127), ties to even
//
// to cache row start + t for t < rows; (s, z) to the row's place in the scales. Codes are two's complement, the first in the lowest bits of a word.
// A vector with an infinity or a NaN has a NaN for its scale. Rows outside of the cache are not written.
//
// One workgroup of 64: one vector, of a key (the first half of the grid) or a value. Quotients are corrected by a step of Newton's method, so that
// codes are those of the host. Memory traffic: each vector twice, the second time from the caches; D + 8 bytes written.
// Versions tried: this one only; before it, ten dispatches, one for each operator. Appended: quotient.wgsl.

@group(0) @binding(0) var<storage, read> key: array<K>;
@group(0) @binding(1) var<storage, read> value: array<V>;
@group(0) @binding(2) var<storage, read_write> key_cache: array<u32>;
@group(0) @binding(3) var<storage, read_write> value_cache: array<u32>;
@group(0) @binding(4) var<storage, read_write> key_scales: array<vec2<u32>>; // bits of two f32
@group(0) @binding(5) var<storage, read_write> value_scales: array<vec2<u32>>;

struct Params {
    vectors: u32, // of keys
    heads: u32,
    rows: u32, // positions S
    capacity: u32, // rows of the caches
    start: u32, // slot of the cache row of the first position
}
@group(0) @binding(6) var<uniform> params: Params;
@group(0) @binding(7) var<uniform> live: array<vec4<i32>, 16>;

const LANES = 64u;
const INFINITE = 0x7f800000u;
const EPS = 1.1920928955078125e-07; // 2^-23

/// Bits of the largest value and of the largest negated value: for positive floats, order is that of their bits, infinity and NaN last.
var<workgroup> most: array<atomic<u32>, 2>;

fn number(is_value: bool, i: u32) -> f32 {
    if (is_value) {
        return f32(value[i]);
    }
    return f32(key[i]);
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let number_of = wid.y * groups.x + wid.x;
    if (number_of >= 2u * params.vectors) {
        return;
    }
    let start = live_value(params.start);
    if (start < 0 || start > i32(params.capacity) - i32(params.rows)) {
        return;
    }
    let is_value = number_of >= params.vectors;
    let vector = number_of - select(0u, params.vectors, is_value);
    let token = vector / params.heads;
    let row = ((token / params.rows) * params.capacity + u32(start) + token % params.rows) * params.heads + vector % params.heads;

    if (lane < 2u) {
        atomicStore(&most[lane], 0u); // some drivers do not zero atomics between workgroups
    }
    workgroupBarrier();
    var own = vec2<u32>();
    for (var i = lane; i < D; i += LANES) {
        let bits = bitcast<u32>(number(is_value, vector * D + i));
        own = max(own, select(vec2<u32>(bits, 0u), vec2<u32>(0u, bits & 0x7fffffffu), bits >> 31u == 1u));
    }
    atomicMax(&most[0], own.x);
    atomicMax(&most[1], own.y);
    workgroupBarrier();
    let above = atomicLoad(&most[0]);
    let below = atomicLoad(&most[1]);
    let bad = max(above, below) >= INFINITE;
    let least = -bitcast<f32>(select(below, 0u, bad));
    let s = max(quotient(bitcast<f32>(select(above, 0u, bad)) - least, 255.0), EPS);
    let z = clamp(-128.0 - round(quotient(least, s)), -128.0, 127.0);
    let inverse = quotient(1.0, s);
    for (var w = lane; w < D / 4u; w += LANES) {
        var word = 0u;
        for (var i = 0u; i < 4u; i++) {
            let y = number(is_value, vector * D + 4u * w + i);
            let code = i32(clamp(round(select(y, 0.0, bad) * inverse) + z, -128.0, 127.0));
            word |= (bitcast<u32>(code) & 0xffu) << (8u * i);
        }
        if (is_value) {
            value_cache[row * (D / 4u) + w] = word;
        } else {
            key_cache[row * (D / 4u) + w] = word;
        }
    }
    if (lane == 0u) {
        let kept = vec2<u32>(select(bitcast<u32>(s), 0x7fc00000u, bad), bitcast<u32>(z));
        if (is_value) {
            value_scales[row] = kept;
        } else {
            key_scales[row] = kept;
        }
    }
}
