// No kernel: what attention_stream_ragged.wgsl has, for batches without padding; appended to `attention_stream`. A part of its own, so that these
// variants hold no code for padding.

fn without_rows(lane: u32, first_row: u32, split: u32, b: u32, kv_head: u32) -> bool {
    return false;
}
