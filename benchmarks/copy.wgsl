// out[i] = x[i] on vec4<f32>: what a plain copy kernel reaches. Traffic: every byte read once and written once.
//
// A workgroup copies 1,024 consecutive vec4, four an invocation, loaded before the first is stored.
// Unchecked: the host makes both buffers a multiple of the 16 KiB of a workgroup and dispatches exactly that many; a grid
// folded to y leaves early past the end.
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;

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
    let at = group * 1024u + lane;
    let a = x[at];
    let b = x[at + 256u];
    let c = x[at + 512u];
    let d = x[at + 768u];
    out[at] = a;
    out[at + 256u] = b;
    out[at + 512u] = c;
    out[at + 768u] = d;
}
