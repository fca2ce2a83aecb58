// out[c] = x[c - before] where that lies inside x, else the fill value, for boxes of up to 8 axes; a negative `before` crops.
//
// One workgroup does 64 elements. Memory traffic: what is kept of x read once, out written once. Padding is rare in
// language models. Versions tried: this one only.
@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read_write> out: array<Out>;

struct Params {
    count: u32,
    fill_float: f32,
    fill_int: i32,
    sizes: array<vec4<u32>, 2>,
    x_sizes: array<vec4<i32>, 2>,
    x_strides: array<vec4<i32>, 2>,
    before: array<vec4<i32>, 2>,
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
    var origin = 0;
    var inside = true;
    var rest = i;
    for (var k = RANK; k > 0u; k--) {
        let axis = k - 1u;
        let size = params.sizes[axis >> 2u][axis & 3u];
        let next = rest / size;
        let c = i32(rest - next * size) - params.before[axis >> 2u][axis & 3u];
        inside = inside && c >= 0 && c < params.x_sizes[axis >> 2u][axis & 3u];
        origin += c * params.x_strides[axis >> 2u][axis & 3u];
        rest = next;
    }
    if (inside) {
        out[i] = Out(x[origin]);
    } else {
        out[i] = fill_value();
    }
}
