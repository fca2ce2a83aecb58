// No kernel: values beside queries and keys in quantize_cache.wgsl, for devices that bind more than 8 storage buffers; appended to it.
// Values are quantised as keys are, without the rotary embedding. Needs: alias V.

@group(0) @binding(9) var<storage, read> value: array<V>;
@group(0) @binding(10) var<storage, read_write> value_cache: array<u32>;
@group(0) @binding(11) var<storage, read_write> value_scales: array<u32>; // bits of f32

fn value_number(i: u32) -> f32 {
    return f32(value[i]);
}

fn keep_value(i: u32, word: u32) {
    value_cache[i] = word;
}

fn keep_value_scale(i: u32, bits: u32) {
    value_scales[i] = bits;
}
