// A copy with one data-dependent coordinate, for every coordinate c of a box of up to 8 axes:
//   gather  (SCATTER false): out[o(c)] = x[a(c) + row * row_stride]
//   scatter (SCATTER true):  out[o(c) + row * row_stride] = x[a(c)]
// with row = idx[j(c)], and a, o, j sums of c[k] * stride[k]. Serves embedding, index, index_select, gather, take, index_put, scatter,
// index_copy and cache writes by indices. `wrap` is added to a negative row. Rows outside 0..limit-1 are clamped by a gather and
// skipped by a scatter, so no data can make the kernel leave its buffers.
//
// One workgroup moves 64 elements, of 16 bytes where rows have a length divisible by four (X and Out are then vec4 types).
// Memory traffic: every element moved is read and written once; the index of a row is read by all its lanes (one cache line).
// Versions tried: this one only.
@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read> idx: array<i32>;
@group(0) @binding(2) var<storage, read_write> out: array<Out>;

struct Params {
    count: u32,
    x_offset: i32,
    out_offset: i32,
    row_stride: i32,
    limit: i32,
    wrap: i32,
    sizes: array<vec4<u32>, 2>,
    x_strides: array<vec4<i32>, 2>,
    out_strides: array<vec4<i32>, 2>,
    idx_strides: array<vec4<i32>, 2>,
}
@group(0) @binding(3) var<uniform> params: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wid.y * groups.x + wid.x) * 64u + lane;
    if (i >= params.count) { return; }
    var origin = params.x_offset;
    var place = params.out_offset;
    var which = 0;
    var rest = i;
    for (var k = RANK; k > 0u; k--) {
        let axis = k - 1u;
        let size = params.sizes[axis >> 2u][axis & 3u];
        let next = rest / size;
        let c = i32(rest - next * size);
        origin += c * params.x_strides[axis >> 2u][axis & 3u];
        place += c * params.out_strides[axis >> 2u][axis & 3u];
        which += c * params.idx_strides[axis >> 2u][axis & 3u];
        rest = next;
    }
    let given = idx[which];
    let row = select(given, given + params.wrap, given < 0);
    if (SCATTER) {
        if (row < 0 || row >= params.limit) { return; }
        out[place + row * params.row_stride] = convert(x[origin]);
    } else {
        out[place] = convert(x[origin + clamp(row, 0, params.limit - 1) * params.row_stride]);
    }
}
