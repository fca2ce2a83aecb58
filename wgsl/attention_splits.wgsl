// No kernel: how the live length is divided into splits, the same for `attention_decode` and `attention_merge`; appended to both after
// attention_rules.wgsl. Needs params.splits.

/// Keys of one split of batch row b: a multiple of 32, such that params.splits of them cover every key that any row sees.
fn split_keys(b: u32) -> u32 {
    let tiles = (key_limit(b, rows_of(b) - 1u) - min(key_first(b, 0u), key_limit(b, rows_of(b) - 1u)) + 31u) / 32u;
    return (tiles + params.splits - 1u) / params.splits * 32u;
}

/// Splits that have keys.
fn used_splits(b: u32) -> u32 {
    let end = key_limit(b, rows_of(b) - 1u);
    let keys = end - min(key_first(b, 0u), end);
    let size = max(split_keys(b), 32u);
    return (keys + size - 1u) / size;
}
