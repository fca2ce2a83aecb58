// No kernel: where a position stands in the rotary table and in the caches, for the kernels that write them; appended to `rope_cache`,
// `rope_cache_sizes` and `gemv_stream_cache`. Needs: ragged_rows.wgsl; `live`, params.start, params.start_pos, params.last, params.table_rows;
// const RAGGED.

/// Row of the rotary table, which always exists.
fn table_row(b: u32, position: u32) -> u32 {
    var first = u32(max(live_value(params.start), 0));
    if (RAGGED) {
        first = given_past(b);
    }
    return min(first + position, params.table_rows - 1u);
}

/// Whether nothing of the position is read: it is padding.
fn is_padding(b: u32, position: u32) -> bool {
    return RAGGED && position >= given_rows(b);
}

/// First cache row that is written; negative: none may be, whoever advanced the position past the capacity.
fn first_row(b: u32) -> i32 {
    if (RAGGED) {
        return i32(given_past(b));
    }
    let start = live_value(params.start_pos);
    return select(start, -1, start > params.last);
}
