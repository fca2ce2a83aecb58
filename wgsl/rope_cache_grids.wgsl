// No kernel: how many workgroups the attention that follows needs for the live length, appended to `rope_cache_sizes` and `gemv_stream_cache`.
//
//     sizes[0..2] = grid of attention_stream: (splits that have keys, but at least 1; params.split_grid.yz)
//     sizes[4..6] = grid of attention_merge: params.merge_grid, or (0, 0, 0) where only one split has keys, and the stream kernel writes the
//                   result itself
// of the batch row with most splits. The splits are those of the functions that both kernels use, so that none can be left out.
// Needs: attention_rules.wgsl, attention_splits.wgsl; `sizes` of 8 elements, params.batch, params.split_grid, params.merge_grid.

/// By one invocation.
fn write_sizes() {
    var used = 1u;
    for (var b = 0u; b < params.batch; b++) {
        used = max(used, splits_of_row(b, 0u)); // none of an idle batch row
    }
    let merge = select(vec4<u32>(), params.merge_grid, used > 1u);
    sizes[0] = used;
    sizes[1] = params.split_grid.y;
    sizes[2] = params.split_grid.z;
    sizes[3] = 0u;
    sizes[4] = merge.x;
    sizes[5] = merge.y;
    sizes[6] = merge.z;
    sizes[7] = 0u;
}
