// No kernel: which keys a tile of packed rows sees and how they are divided into splits, the same for `attention_flash` and
// `attention_flash_merge`; appended to both after attention_rules.wgsl.
//
// Row number n of a KV head is query row n / group and head n % group of the heads that share it; a tile is QROWS such rows.
// Needs params.group, params.splits; const QROWS, KEYS.

/// The last row number of batch row b, 0 if there is none.
fn last_number(b: u32) -> u32 {
    if (RAGGED) {
        return max(params.group * rows_of(b), 1u) - 1u;
    }
    return params.group * rows_of(b) - 1u;
}

/// The first key that any row of the tile sees, and the end of those keys: nothing where all its rows are padding.
fn tile_keys(b: u32, tile: u32) -> vec2<u32> {
    if (RAGGED && tile * QROWS >= params.group * rows_of(b)) {
        return vec2<u32>();
    }
    let end = key_limit(b, min((tile + 1u) * QROWS - 1u, last_number(b)) / params.group);
    return vec2<u32>(min(key_first(b, tile * QROWS / params.group), end), end);
}

/// Keys of one split, where `keys` are divided: a multiple of KEYS, such that params.splits of them cover the keys.
fn range_size(keys: u32) -> u32 {
    return ((keys + KEYS - 1u) / KEYS + params.splits - 1u) / params.splits * KEYS;
}
