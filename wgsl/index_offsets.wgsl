// Several index tensors as one: out[j] = sum over the tensors of row_k(j) * scale_k, with row_k(j) = idx_k[j(c)] (broadcast by strides),
// `limit` added to a negative row. A row outside 0..limit-1 makes the whole sum INVALID (the lowest i32), which the kernel that uses
// the offsets (indexed_copy) skips or clamps.
//
// One dispatch adds one tensor; `first` starts the sum. One workgroup does 64 offsets. Memory traffic: 4 bytes read for the index,
// 4 read and 4 written for the sum. Versions tried: this one only.
@group(0) @binding(0) var<storage, read> idx: array<i32>;
@group(0) @binding(1) var<storage, read_write> out: array<i32>;

struct Params {
    count: u32,
    first: u32,
    limit: i32,
    scale: i32,
    sizes: array<vec4<u32>, 2>,
    idx_strides: array<vec4<i32>, 2>,
}
@group(0) @binding(2) var<uniform> params: Params;

const INVALID: i32 = i32(-2147483648);

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * 64u + lane;
    if (i >= params.count) { return; }
    var which = 0;
    var rest = i;
    for (var k = RANK; k > 0u; k--) {
        let axis = k - 1u;
        let size = params.sizes[axis >> 2u][axis & 3u];
        let next = rest / size;
        which += i32(rest - next * size) * params.idx_strides[axis >> 2u][axis & 3u];
        rest = next;
    }
    let given = idx[which];
    let row = select(given, given + params.limit, given < 0);
    var sum = 0;
    if (params.first == 0u) { sum = out[i]; }
    if (row < 0 || row >= params.limit || sum == INVALID) {
        out[i] = INVALID;
    } else {
        out[i] = sum + row * params.scale;
    }
}
