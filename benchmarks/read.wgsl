// out[g] = the sum of a workgroup's part of x: what a kernel reaches that only reads. Traffic: x once.
//
// A workgroup sums 2,048 consecutive vec4, eight an invocation. Only invocation 0 stores, and only its own sum; the others
// store where their sum has a value that the data cannot give, so that no load can be left out.
// Unchecked: the host makes x a multiple of the 32 KiB of a workgroup and out as long as there are workgroups; a grid folded
// to y leaves early past the end.
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;

override GROUPS: u32 = 1u;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.y * groups.x + wid.x;
    if (group >= GROUPS) {
        return;
    }
    let at = group * 2048u + lane;
    let low = (x[at] + x[at + 256u]) + (x[at + 512u] + x[at + 768u]);
    let high = (x[at + 1024u] + x[at + 1280u]) + (x[at + 1536u] + x[at + 1792u]);
    let sum = dot(low + high, vec4<f32>(1.0));
    if (lane == 0u || sum > 1e30) {
        out[group] = sum;
    }
}
