// No kernel: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), the same words as runtime/decoding/sampling.py
// `philox`. Counter-based: a number depends on the key (seed) and the counter (position, row) alone. WGSL has no 64-bit product, so the
// high half of one is put together from 16-bit pieces.

/// The high 32 bits of a * b.
fn mul_high(a: u32, b: u32) -> u32 {
    let a_low = a & 0xffffu;
    let a_high = a >> 16u;
    let b_low = b & 0xffffu;
    let b_high = b >> 16u;
    // Each sum is at most (2^16 - 1)^2 + 2^16 - 1, below 2^32.
    let middle = a_high * b_low + ((a_low * b_low) >> 16u);
    let other = a_low * b_high + (middle & 0xffffu);
    return a_high * b_high + (middle >> 16u) + (other >> 16u);
}

fn philox(counter: vec4<u32>, seed: vec2<u32>) -> vec4<u32> {
    var c = counter;
    var key = seed;
    for (var round = 0u; round < 10u; round++) {
        let first_high = mul_high(c.x, 0xd2511f53u);
        let second_high = mul_high(c.z, 0xcd9e8d57u);
        c = vec4<u32>(second_high ^ c.y ^ key.x, c.z * 0xcd9e8d57u, first_high ^ c.w ^ key.y, c.x * 0xd2511f53u);
        key += vec2<u32>(0x9e3779b9u, 0xbb67ae85u);
    }
    return c;
}
