// No kernel: what attention_ragged.wgsl has for batches whose rows differ, for those that have one position and one number of query rows;
// appended to the attention kernels in front of attention_rules.wgsl. Needs: `live`, const START (slot of the keys before the first query), params.rows.

/// Keys in the cache before the first query of batch row b. The host has checked that it is not negative.
fn past_of(b: u32) -> u32 {
    return u32(max(live_value(START), 0));
}

/// Query rows of batch row b.
fn rows_of(b: u32) -> u32 {
    return params.rows;
}
