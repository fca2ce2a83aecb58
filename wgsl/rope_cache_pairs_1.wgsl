// No kernel: pairs of a rotary embedding in units of one element, appended to `rope_cache` and `rope_cache_sizes`. The two units that turn
// into each other are a pair already. rope_cache_pairs_4.wgsl is the same for units of four elements.

fn parted(x: Pair) -> Pair {
    return x;
}

fn joined(x: Pair) -> Pair {
    return x;
}
