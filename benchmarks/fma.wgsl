// Multiply-adds on registers: the fp32 rate that the device and its compiler reach without any memory traffic.
//
// An invocation keeps eight vec4 accumulators, each its own chain of dependent multiply-adds; a turn of the loop makes
// 8 * 4 * 4 of them (256 floating-point operations). acc = acc * m + c converges to c / (1 - m): no overflow, no denormals.
// Factors come from a buffer so that nothing is folded; one store an invocation keeps the work alive.
// Unchecked: factors holds two vec4, out one float for each invocation; a grid folded to y leaves early past the end.
@group(0) @binding(0) var<storage, read> factors: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;

override GROUPS: u32 = 1u;
override TURNS: u32 = 1u;

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
    let m = factors[0];
    let c = factors[1];
    let start = f32(lane) * 0.001;
    var r0 = vec4<f32>(start);
    var r1 = vec4<f32>(start + 1.0);
    var r2 = vec4<f32>(start + 2.0);
    var r3 = vec4<f32>(start + 3.0);
    var r4 = vec4<f32>(start + 4.0);
    var r5 = vec4<f32>(start + 5.0);
    var r6 = vec4<f32>(start + 6.0);
    var r7 = vec4<f32>(start + 7.0);
    for (var turn = 0u; turn < TURNS; turn++) {
        r0 = fma(r0, m, c); r1 = fma(r1, m, c); r2 = fma(r2, m, c); r3 = fma(r3, m, c);
        r4 = fma(r4, m, c); r5 = fma(r5, m, c); r6 = fma(r6, m, c); r7 = fma(r7, m, c);
        r0 = fma(r0, m, c); r1 = fma(r1, m, c); r2 = fma(r2, m, c); r3 = fma(r3, m, c);
        r4 = fma(r4, m, c); r5 = fma(r5, m, c); r6 = fma(r6, m, c); r7 = fma(r7, m, c);
        r0 = fma(r0, m, c); r1 = fma(r1, m, c); r2 = fma(r2, m, c); r3 = fma(r3, m, c);
        r4 = fma(r4, m, c); r5 = fma(r5, m, c); r6 = fma(r6, m, c); r7 = fma(r7, m, c);
        r0 = fma(r0, m, c); r1 = fma(r1, m, c); r2 = fma(r2, m, c); r3 = fma(r3, m, c);
        r4 = fma(r4, m, c); r5 = fma(r5, m, c); r6 = fma(r6, m, c); r7 = fma(r7, m, c);
    }
    let sum = ((r0 + r1) + (r2 + r3)) + ((r4 + r5) + (r6 + r7));
    out[group * 256u + lane] = dot(sum, vec4<f32>(1.0));
}
