// Rows of x [rows, K], or of their RMSNorm, as integers of 8 bits with a scale (ops/activations.py has the layout): scale s, zero point z and codes q
// are those of quantize_rows.wgsl, and s * (q - z) is exactly what that kernel writes.
//
//   NORM: v = x * norm * (1 / sqrt(mean(x^2) + eps)), else v = x
//
// A block of 32 columns holds q - z where all of them are within -128 .. 127, and a zero of 0; else q and a zero of z, both less a shift, which is 0
// where codes are signed bytes. Rows with numbers that are not finite have a NaN for their scale.
//
// One workgroup a row: WG invocations find range and mean in workgroup memory, then go over the row again, four columns each.
// Traffic: x twice, the second time from the caches; K bytes and 4 for each block. Versions: docs/KERNELS.md.
// Appended: quantize_range.wgsl, quotient.wgsl.

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read> norm: array<Norm>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;

struct Params {
    rows: u32,
    quads: u32, // of a row of x
    blocks: u32, // of a row of the result
    words: u32,
    norm_eps: f32,
    k: f32,
    span: vec4<f32>, // low, high, least scale, shift
}
@group(0) @binding(3) var<uniform> params: Params;

/// Least and most of x * norm, and the sum of the squares of x.
var<workgroup> found: array<vec3<f32>, WG>;
var<workgroup> wide: array<u32, WG>;

fn weighted(at: u32, i: u32) -> vec4<f32> {
    let v = vec4<f32>(x[at + i]);
    if (NORM_WEIGHT) {
        return v * vec4<f32>(norm[i]);
    }
    return v;
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = wid.y * groups.x + wid.x;
    if (row >= params.rows) {
        return;
    }
    let start = row * params.quads;
    var mine = vec3<f32>();
    for (var i = lane; i < params.quads; i += WG) {
        let v = weighted(start, i);
        var squares = 0.0;
        if (NORM) {
            let given = vec4<f32>(x[start + i]);
            squares = dot(given, given);
        }
        mine = range_meet(mine, vec3<f32>(range_of(v), squares));
    }
    found[lane] = mine;
    for (var step = WG / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (lane < step) {
            found[lane] = range_meet(found[lane], found[lane + step]);
        }
    }
    workgroupBarrier();
    let all = found[0];
    var by = 1.0;
    if (NORM) {
        by = 1.0 / sqrt(all.z / params.k + params.norm_eps);
    }
    let s = range_scale(all.x * by, all.y * by, params.span.xyz);
    let z = range_zero(all.x * by, s, params.span.xyz);
    let inverse = quotient(1.0, s);
    let to = row * params.words;
    for (var first = 0u; first < 8u * params.blocks; first += WG) {
        let quad = first + lane;
        var d = vec4<f32>(); // q - z; 0 past the last column
        if (quad < params.quads) {
            d = range_codes(weighted(start, quad) * by, inverse, z, params.span.xyz) - vec4<f32>(z);
        }
        wide[lane] = select(0u, 1u, range_wide(d));
        workgroupBarrier();
        let b = lane / 8u * 8u;
        let some = wide[b] + wide[b + 1u] + wide[b + 2u] + wide[b + 3u] + wide[b + 4u] + wide[b + 5u] + wide[b + 6u] + wide[b + 7u];
        let zero = select(0.0, z - params.span.w, some > 0u);
        if (quad < 8u * params.blocks) {
            out[to + quad] = range_word(d + vec4<f32>(zero));
            if (quad % 8u == 0u) {
                out[to + 8u * params.blocks + quad / 8u] = bitcast<u32>(i32(zero));
            }
        }
        workgroupBarrier();
    }
    if (lane == 0u) {
        let at = to + params.words - 4u;
        out[at] = bitcast<u32>(range_stored(all.y, s));
        out[at + 1u] = 0u;
        out[at + 2u] = 0u;
        out[at + 3u] = 0u;
    }
}
