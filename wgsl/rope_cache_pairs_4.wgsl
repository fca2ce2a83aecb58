// No kernel: pairs of a rotary embedding in units of four elements, appended to `rope_cache` and `rope_cache_sizes`. Where neighbours are a
// pair (INTERLEAVED), two units hold four pairs, whose first elements are gathered in one vector and whose second ones in another.

/// Units as they stand -> first elements of the pairs, second elements.
fn parted(x: Pair) -> Pair {
    if (INTERLEAVED) {
        return Pair(vec4<f32>(x.u.xz, x.v.xz), vec4<f32>(x.u.yw, x.v.yw));
    }
    return x;
}

/// The inverse.
fn joined(x: Pair) -> Pair {
    if (INTERLEAVED) {
        return Pair(vec4<f32>(x.u.x, x.v.x, x.u.y, x.v.y), vec4<f32>(x.u.z, x.v.z, x.u.w, x.v.w));
    }
    return x;
}
