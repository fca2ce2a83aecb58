// No kernel: how `attention_stream` leaves out the padding of ragged batches; appended to it. attention_stream_whole.wgsl is the same where there is
// none.

/// Zeros for the workgroup's rows that are padding.
fn clear_padding(lane: u32, first_row: u32, count: u32, b: u32, kv_head: u32) {
    for (var i = lane; i < TILES * ROWS * DV4; i += LANES) {
        let number = first_row + i / DV4;
        if (number >= count && number < GROUP * params.rows) {
            let at = place(number, kv_head);
            out[((b * params.o_b + at.x * params.o_s + at.y * params.o_h) >> 2u) + i % DV4] = Out();
        }
    }
}

/// Whether all rows of the workgroup are padding. Split 0, which is there whatever the lengths are, writes zeros for those that are.
fn without_rows(lane: u32, first_row: u32, split: u32, b: u32, kv_head: u32) -> bool {
    let count = GROUP * rows_of(b);
    if (split == 0u) {
        clear_padding(lane, first_row, count, b, kv_head);
    }
    return first_row >= count;
}
