// No kernel: how the live length is divided into splits, the same for the kernels that compute splits, those that merge them, and those that
// write the sizes of their grids; appended to them after attention_rules.wgsl. Needs const SPLITS (most splits) and SPLIT_TILE (a
// split is a multiple of so many keys, but for the last).

/// Keys that any row of batch row b sees. It must have a row.
fn seen_keys(b: u32) -> u32 {
    let end = key_limit(b, rows_of(b) - 1u);
    return end - min(key_first(b, 0u), end);
}

/// Keys of one split of batch row b, such that SPLITS of them cover every key that any row sees.
fn split_keys(b: u32) -> u32 {
    let tiles = (seen_keys(b) + SPLIT_TILE - 1u) / SPLIT_TILE;
    return (tiles + SPLITS - 1u) / SPLITS * SPLIT_TILE;
}

/// Splits that have keys.
fn used_splits(b: u32) -> u32 {
    let size = max(split_keys(b), SPLIT_TILE);
    return (seen_keys(b) + size - 1u) / size;
}

/// Splits that have keys, and of which row `row` has partial results: none where the row is padding.
fn splits_of_row(b: u32, row: u32) -> u32 {
    if (RAGGED && row >= rows_of(b)) {
        return 0u;
    }
    return used_splits(b);
}
