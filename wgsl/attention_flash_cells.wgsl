// No kernel: how `attention_flash` and `attention_flash_wide` read caches of floats; appended to them. One load is KSTEP (VSTEP) vec4 columns of
// a row: four floats, or eight halves as four pairs. Needs: `key`, `value`; alias KWide, VWide (what one of their elements converts to);
// const KSTEP, VSTEP.

/// Vec4 columns c .. c + KSTEP - 1 of the key row that starts at element `row`, as the cache holds them.
fn key_bits(row: u32, c: u32) -> vec4<u32> {
    return bitcast<vec4<u32>>(KWide(key[row / (4u * KSTEP) + c / KSTEP]));
}

fn value_bits(row: u32, c: u32) -> vec4<u32> {
    return bitcast<vec4<u32>>(VWide(value[row / (4u * VSTEP) + c / VSTEP]));
}
