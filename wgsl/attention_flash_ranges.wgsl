// No kernel: which keys a tile of packed rows sees and how they are divided into splits, the same for `attention_flash` and
// `attention_flash_merge`; appended to both after attention_rules.wgsl.
//
// Row number n of a KV head is query row n / group and head n % group of the heads that share it; a tile is QROWS such rows.
// Needs params.group, params.splits; const QROWS, KEYS.

/// The first key that any row of the tile sees, and the end of those keys. The tile must have a row.
fn tile_keys(b: u32, tile: u32) -> vec2<u32> {
    let count = params.group * rows_of(b);
    let end = key_limit(b, (min((tile + 1u) * QROWS, count) - 1u) / params.group);
    return vec2<u32>(min(key_first(b, tile * QROWS / params.group), end), end);
}

/// Keys of one split, where `keys` are divided: a multiple of KEYS, such that params.splits of them cover the keys.
fn range_size(keys: u32) -> u32 {
    return ((keys + KEYS - 1u) / KEYS + params.splits - 1u) / params.splits * KEYS;
}
