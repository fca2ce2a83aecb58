// out = exp(x - m) / s along one dimension, m its maximum and s the sum of exp(x - m); LOG: (x - m) - log(s). SAFE: a line of -inf gives 0.
//
// x is seen as [outer, length, inner]. Appended by the host (ops/softmax.py): alias X, Out (storage types).
//
// One workgroup: 256 / LY lines, LY invocations each (a power of two). Each keeps a running (m, s) over every LY-th element (s in
// blocks of 32, for its rounding errors), a tree in workgroup memory joins them, and a second pass writes. Memory traffic: x twice (the second time mostly from cache), out once.
// ALONG as in reduce.wgsl. Tried: nothing else yet.

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read_write> out: array<Out>;

struct Params { lines: u32, length: u32, inner: u32, inf: f32 }
@group(0) @binding(2) var<uniform> params: Params;

override LY: u32 = 256u;
override ALONG: u32 = 1u;
override LOG: u32 = 0u;
override SAFE: u32 = 0u;

const WG: u32 = 256u;
const BLOCK: u32 = 32u;

var<workgroup> maxima: array<f32, WG>;
var<workgroup> sums: array<f32, WG>;

// e^t for t <= 0. The built-in loses |t| units in the last place: large |t| are split off as a power of two.
fn exp_(t: f32) -> f32 {
    let n = round(max(t, -150.0) * 1.44269504);
    let r = (t - n * 0.693115234375) - n * 3.19461849e-05;
    let p = 0.5 + r * (0.166665122 + r * (0.0416661873 + r * (0.00836959854 + r * 0.00139517174)));
    let half = i32(n) >> 1u;
    let scaled = (1.0 + (r + r * r * p)) * bitcast<f32>(u32(half + 127) << 23u) * bitcast<f32>(u32(i32(n) - half + 127) << 23u);
    return select(scaled, 0.0, t < -150.0); // NaN passes
}

// log(s) for a normal s > 0; the built-in may be off by 5e-7 near 1.
fn log_(s: f32) -> f32 {
    let shifted = bitcast<u32>(s) - 0x3f3504f3u;
    let e = f32(bitcast<i32>(shifted) >> 23u);
    let f = bitcast<f32>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0;
    let q = f / (2.0 + f);
    let z = q * q;
    let series = 2.0 * q + q * z * (0.666666627 + z * (0.400004536 + z * (0.285297126 + z * 0.237280652)));
    return select(e * 0.693115234375 + (e * 3.19461849e-05 + series), s, (bitcast<u32>(s) & 0x7f800000u) == 0x7f800000u);
}

// The sum that belongs to maximum m, seen from a maximum that is at least as large.
fn rescale(s: f32, m: f32, to: f32) -> f32 { return s * select(exp_(m - to), 1.0, m == to); }

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let columns = WG / LY;
    let column = select(lane % columns, lane / LY, ALONG == 1u);
    let row = select(lane / columns, lane % LY, ALONG == 1u);
    let line = (wid.y * groups.x + wid.x) * columns + column;
    let valid = line < params.lines;
    let base = (line / params.inner) * params.length * params.inner + line % params.inner;
    var m = -params.inf;
    var s = 0.0;
    if (valid) {
        var block = 0.0;
        var filled = 0u;
        for (var r = row; r < params.length; r += LY) {
            let v = f32(x[base + r * params.inner]);
            if (v > m) {
                s = rescale(s, m, v);
                block = rescale(block, m, v);
                m = v;
            }
            block += select(exp_(v - m), 0.0, v == -params.inf);
            filled += 1u;
            if (filled == BLOCK) {
                s += block;
                block = 0.0;
                filled = 0u;
            }
        }
        s += block;
    }
    let mine = column * LY + row;
    maxima[mine] = m;
    sums[mine] = s;
    workgroupBarrier();
    for (var half = LY / 2u; half > 0u; half /= 2u) {
        if (row < half) {
            let other = maxima[mine + half];
            let both = max(maxima[mine], other);
            sums[mine] = rescale(sums[mine], maxima[mine], both) + rescale(sums[mine + half], other, both);
            maxima[mine] = both;
        }
        workgroupBarrier();
    }
    if (!valid) { return; }
    m = maxima[column * LY];
    s = sums[column * LY];
    // a line of -inf has m = -inf: the difference below is NaN there, as in PyTorch
    let blank = SAFE == 1u && m == -params.inf && s == 0.0;
    let log_s = log_(s);
    for (var r = row; r < params.length; r += LY) {
        let at = base + r * params.inner;
        let t = f32(x[at]) - m;
        if (blank) {
            out[at] = Out(0.0);
        } else if (LOG == 1u) {
            out[at] = Out(t - log_s);
        } else {
            out[at] = Out(exp_(t) / s);
        }
    }
}
