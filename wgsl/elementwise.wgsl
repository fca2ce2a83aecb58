// out[i] = finish(apply(x, y, z)): every elementwise operator, with up to three operands.
//
// Appended by the host for each operator (ops/elementwise.py):
//   alias A, B, C, Out   storage types of the operands and of the result
//   alias T              type in which operands are loaded and computed: f32 or i32
//   alias R              type of apply's result: f32, i32 or bool
//   fn apply(x: T, y: T, z: T) -> R     the operator; may use params.p, params.inf, params.nan, the functions below
//                                       and those of the parts elementwise_*.wgsl, which are appended where they are named
//   fn finish(v: R) -> Out              rounding or wrapping into the result's dtype
//
// An operand is (its MODE) 0 a tensor of the result's shape, 1 a one-element tensor, 2 a tensor that is broadcast (strides), 3 a number in
// params (its bits), 4 a live scalar. Only mode 2 does index arithmetic: RANK dimensions, already merged by the host.
//
// One workgroup: WG consecutive elements, one per invocation. Memory traffic: each operand read once (coalesced in modes 0 and mostly 2),
// the result written once. Tried: nothing else yet (next: four elements per invocation).

@group(0) @binding(0) var<storage, read> a: array<A>;
@group(0) @binding(1) var<storage, read> b: array<B>;
@group(0) @binding(2) var<storage, read> c: array<C>;
@group(0) @binding(3) var<storage, read_write> out: array<Out>;

struct Params {
    count: u32,
    scalar_a: u32,
    scalar_b: u32,
    scalar_c: u32,
    inf: f32,
    nan: f32,
    p: vec4<f32>,
    shape: array<vec4<u32>, 2>,
    strides_a: array<vec4<u32>, 2>,
    strides_b: array<vec4<u32>, 2>,
    strides_c: array<vec4<u32>, 2>,
}
@group(0) @binding(4) var<uniform> params: Params;
@group(0) @binding(5) var<uniform> live: array<vec4<i32>, 16>;

override WG: u32 = 64u;
override A_MODE: u32 = 0u;
override B_MODE: u32 = 3u;
override C_MODE: u32 = 3u;
override RANK: u32 = 0u;

fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }
fn is_inf(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) == 0x7f800000u; }
fn negative(x: f32) -> bool { return (bitcast<u32>(x) >> 31u) == 1u; }

fn copy_sign(x: f32, sign_of: f32) -> f32 {
    return bitcast<f32>((bitcast<u32>(x) & 0x7fffffffu) | (bitcast<u32>(sign_of) & 0x80000000u));
}

// The upper 12 bits of the significand: products of two such numbers are exact.
fn upper(x: f32) -> f32 { return bitcast<f32>(bitcast<u32>(x) & 0xfffff000u); }

// NaN wins; of two NaNs the first.
fn maximum(x: f32, y: f32) -> f32 { return select(select(y, x, x > y), x, is_nan(x)); }

fn minimum(x: f32, y: f32) -> f32 { return select(select(y, x, x < y), x, is_nan(x)); }

// x * 2^n in two steps, so that neither factor leaves the range; |n| <= 250.
fn scale2(x: f32, n: i32) -> f32 {
    let half = n >> 1u;
    return x * bitcast<f32>(u32(half + 127) << 23u) * bitcast<f32>(u32(n - half + 127) << 23u);
}

// Truncation that saturates; NaN gives 0.
fn to_int(x: f32) -> i32 {
    if (is_nan(x)) { return 0; }
    if (x >= 2147483648.0) { return 2147483647; }
    return i32(max(x, -2147483648.0));
}

fn component(v: array<vec4<u32>, 2>, d: u32) -> u32 {
    let half = select(v[0], v[1], d > 3u);
    return half[d & 3u];
}

fn offsets(i: u32) -> vec3<u32> {
    var rest = i;
    var at = vec3<u32>(0u);
    for (var d = RANK; d > 0u; d--) {
        let size = component(params.shape, d - 1u);
        let strides = vec3<u32>(component(params.strides_a, d - 1u), component(params.strides_b, d - 1u), component(params.strides_c, d - 1u));
        at += (rest % size) * strides;
        rest /= size;
    }
    return at;
}

fn load_a(i: u32, at: u32) -> T {
    if (A_MODE == 4u) { return T(live_value(params.scalar_a)); }
    if (A_MODE == 3u) { return bitcast<T>(params.scalar_a); }
    return T(a[select(select(i, 0u, A_MODE == 1u), at, A_MODE == 2u)]);
}

fn load_b(i: u32, at: u32) -> T {
    if (B_MODE == 4u) { return T(live_value(params.scalar_b)); }
    if (B_MODE == 3u) { return bitcast<T>(params.scalar_b); }
    return T(b[select(select(i, 0u, B_MODE == 1u), at, B_MODE == 2u)]);
}

fn load_c(i: u32, at: u32) -> T {
    if (C_MODE == 4u) { return T(live_value(params.scalar_c)); }
    if (C_MODE == 3u) { return bitcast<T>(params.scalar_c); }
    return T(c[select(select(i, 0u, C_MODE == 1u), at, C_MODE == 2u)]);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (wid.y * groups.x + wid.x) * WG + lane;
    if (i >= params.count) { return; }
    let at = offsets(i);
    out[i] = finish(apply(load_a(i, at.x), load_b(i, at.y), load_c(i, at.z)));
}
