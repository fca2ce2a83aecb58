// The subgroup size of a device, which adapters do not tell: lane i of one workgroup writes (size, index in the subgroup). Kernels that shuffle
// count on lanes being numbered through subgroups in order, so the host compares the indices with that too.

@group(0) @binding(0) var<storage, read_write> out: array<vec2<u32>>;

const LANES = 128u;

@compute @workgroup_size(LANES)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_size) size: u32,
    @builtin(subgroup_invocation_id) index: u32,
) {
    // a subgroup operation, so that the driver cannot take the kernel for one without
    out[lane] = vec2<u32>(subgroupMax(size), index);
}
