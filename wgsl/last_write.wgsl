// out[b, s] = idx[b, s] if no later s' > s of the same row b has the same index, else the lowest i32, which indexed_copy skips.
// Makes a write by indices deterministic: the last of several writes to one place wins, whatever order the GPU runs them in.
//
// One invocation does one (b, s) and reads the indices after it: S*S/2 reads of cached integers a row, nothing next to the rows of
// the cache that are moved afterwards. (Inside the write itself the test would cost S reads for every element instead of every row.)
// Versions tried: this one only.
@group(0) @binding(0) var<storage, read> idx: array<i32>;
@group(0) @binding(1) var<storage, read_write> out: array<i32>;

struct Params {
    count: u32,
    length: u32,
}
@group(0) @binding(2) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * 64u + lane;
    if (i >= params.count) { return; }
    let end = (i / params.length + 1u) * params.length;
    var row = idx[i];
    for (var later = i + 1u; later < end; later++) {
        if (idx[later] == row) {
            row = i32(-2147483648);
            break;
        }
    }
    out[i] = row;
}
