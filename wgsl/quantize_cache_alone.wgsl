// No kernel: what stands in the place of quantize_cache_value.wgsl where a dispatch has no values (VALUE_HEADS is 0) or only values, which are
// then bound as keys; appended to quantize_cache.wgsl. Nothing calls these functions at run time.

fn value_number(i: u32) -> f32 {
    return 0.0;
}

fn keep_value(i: u32, word: u32) {
}

fn keep_value_scale(i: u32, bits: u32) {
}
