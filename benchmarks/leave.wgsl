// counter[0] += 1 by workgroup 0; the others leave at once. For grids that are larger than what there is to do.
@group(0) @binding(0) var<storage, read_write> counter: array<u32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    if (wid.x > 0u || lane > 0u) {
        return;
    }
    counter[0] = counter[0] + 1u;
}
