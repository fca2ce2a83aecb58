// No kernel: how the attention kernels that take any head size load queries, keys and values; appended to them.
//
// Needs: params.scale; const D, DV, K_WIDTH and V_WIDTH (4: rows are loaded as vec4, 1: as scalars because the head size is no multiple
// of 4); alias KWide, VWide (f32 or vec4<f32>: what one element of `key` or `value` converts to).

/// Columns 4 * c .. 4 * c + 3 of the key row that starts at element `base`; zeros past the head size.
fn load_key(base: u32, c: u32) -> vec4<f32> {
    if (K_WIDTH == 4u) {
        return vec4<f32>(KWide(key[(base >> 2u) + c]));
    }
    let first = 4u * c;
    var x = vec4<f32>(vec4<f32>(KWide(key[base + first])).x, 0.0, 0.0, 0.0);
    if (first + 1u < D) {
        x.y = vec4<f32>(KWide(key[base + first + 1u])).x;
    }
    if (first + 2u < D) {
        x.z = vec4<f32>(KWide(key[base + first + 2u])).x;
    }
    if (first + 3u < D) {
        x.w = vec4<f32>(KWide(key[base + first + 3u])).x;
    }
    return x;
}

/// As `load_key`, of a value row.
fn load_value(base: u32, c: u32) -> vec4<f32> {
    if (V_WIDTH == 4u) {
        return vec4<f32>(VWide(value[(base >> 2u) + c]));
    }
    let first = 4u * c;
    var x = vec4<f32>(vec4<f32>(VWide(value[base + first])).x, 0.0, 0.0, 0.0);
    if (first + 1u < DV) {
        x.y = vec4<f32>(VWide(value[base + first + 1u])).x;
    }
    if (first + 2u < DV) {
        x.z = vec4<f32>(VWide(value[base + first + 2u])).x;
    }
    if (first + 3u < DV) {
        x.w = vec4<f32>(VWide(value[base + first + 3u])).x;
    }
    return x;
}

/// Columns 4 * c .. 4 * c + 3 of the query row that starts at element `base`, times the scale; zeros past the head size.
fn load_query(base: u32, c: u32) -> vec4<f32> {
    let first = 4u * c;
    var x = vec4<f32>(f32(query[base + first]), 0.0, 0.0, 0.0);
    if (first + 1u < D) {
        x.y = f32(query[base + first + 1u]);
    }
    if (first + 2u < D) {
        x.z = f32(query[base + first + 2u]);
    }
    if (first + 3u < D) {
        x.w = f32(query[base + first + 3u]);
    }
    return x * params.scale;
}
