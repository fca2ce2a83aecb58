// No kernel: the scales of caches of packed integers, one f32 for each row and KV head; appended to attention kernels that read such caches.
// The kernels number elements of a cache [B, C, Hkv, D] as if they were stored one by one. A row (D elements) begins at a multiple of D, and its
// scale stands at that multiple. Needs: const D, DV.

@group(0) @binding(11) var<storage, read> key_scales: array<f32>;
@group(0) @binding(12) var<storage, read> value_scales: array<f32>;

/// The scale of the key row that starts at element `base`.
fn key_scale(base: u32) -> f32 {
    return key_scales[base / D];
}

fn value_scale(base: u32) -> f32 {
    return value_scales[base / DV];
}

/// What four codes of a row with such a scale stand for.
fn dequantised(codes: vec4<f32>, scale: f32) -> vec4<f32> {
    return codes * scale;
}

/// The four signed bytes of a word, lowest first.
fn four_bytes(word: u32) -> vec4<f32> {
    return vec4<f32>(vec4<i32>((vec4<u32>(word) << vec4<u32>(24u, 16u, 8u, 0u))) >> vec4<u32>(24u));
}

/// The four signed half bytes in the low half of a word, lowest first.
fn four_nibbles(word: u32) -> vec4<f32> {
    return vec4<f32>(vec4<i32>((vec4<u32>(word) << vec4<u32>(28u, 24u, 20u, 16u))) >> vec4<u32>(28u));
}
