// No kernel: what `lengths` says of a batch row, for the kernels that write or read caches row by row; appended to them.
//
// The numbers of `webgpu.lengths` are in range already; these functions make them so for any tensor, since kernels without bounds checks rely on
// them. Needs: `lengths` (uniform: LENGTHS batch rows), const LENGTHS, params.rows, params.capacity.

/// Rows of the cache before the first new token of batch row b: 0 to capacity.
fn given_past(b: u32) -> u32 {
    return u32(clamp(lengths[b].x, 0, i32(params.capacity)));
}

/// New tokens of batch row b: 0 to params.rows, and none past the capacity.
fn given_rows(b: u32) -> u32 {
    return u32(clamp(lengths[b].y, 0, i32(min(params.rows, params.capacity - given_past(b)))));
}
