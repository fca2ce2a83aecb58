// No kernel: rules that the attention kernels share, appended to each of them (see ops/attention_lower.py).
// Which keys a query row may see. What may differ between batch rows (keys before the first query, number of query rows) is read through
// `past_of` and `rows_of` alone, which attention_whole.wgsl or attention_ragged.wgsl has.
//
// Needs: params.capacity, params.window (0: none), params.limit (0 causal, 1 prefix, 2 all; never 2 in a ragged batch).
// These are numbers, not constants of the shader, so that layers with and without a window share one pipeline.

/// Row `row` sees no key at or past this one. Never more than the capacity; grows with `row`.
fn key_limit(b: u32, row: u32) -> u32 {
    if (params.limit == 0u) {
        return min(past_of(b) + row + 1u, params.capacity);
    }
    if (params.limit == 1u) {
        return min(past_of(b) + rows_of(b), params.capacity);
    }
    return params.capacity;
}

/// Row `row` sees no key before this one. Grows with `row`.
fn key_first(b: u32, row: u32) -> u32 {
    if (params.window != 0u) {
        let position = past_of(b) + row + 1u;
        return position - min(position, params.window);
    }
    return 0u;
}
