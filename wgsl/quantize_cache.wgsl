// New tokens of a ragged batch into caches of packed integers: rotary embedding, Hadamard transform and quantisation of each head's vector x [D].
//
//   y = x (value), rotary(x, past + s) (query, key);  HADAMARD: y = y H / sqrt(D), H[i, j] = (-1)^popcount(i & j);  query_out = y
//   code_i = round(y_i / scale), ties to even;  BITS 8: scale = max_i |y_i| / 127
//   BITS 4: |scale| = max(far / 8, near / 7) with far and near the larger and the smaller of max(y, 0), max(-y, 0); negative where far is max(y, 0)
//
// to cache row past + s, where (past, new) = lengths[b], for s < new; the query of other tokens is zero. Codes are two's complement, the first in
// the lowest bits of a word. A vector of zeros has scale 0; one with an infinity or a NaN has a NaN for its scale, and codes 0.
//
// One workgroup of 64: one vector in workgroup memory, of HEADS query, KV_HEADS key and VALUE_HEADS value heads of a token. The transform takes
// log2(D) rounds with a barrier each. Quotients are corrected by a step of Newton's method, so that codes are those of the host.
// Memory traffic: each vector once; (D * BITS / 8 + 4) bytes written. Versions tried: 4-bit codes -7 to 7 of scale max / 7, whose errors are 1.1
// to 1.15 times as large for uniform and normal numbers, and up to 2 times for numbers of few levels.
// Appended: quotient.wgsl, ragged_rows.wgsl, and quantize_cache_value.wgsl or quantize_cache_alone.wgsl.

@group(0) @binding(0) var<storage, read> query: array<Q>;
@group(0) @binding(1) var<storage, read> key: array<K>;
@group(0) @binding(2) var<storage, read> cosines: array<Cos>;
@group(0) @binding(3) var<storage, read> sines: array<Sin>;
@group(0) @binding(4) var<storage, read_write> query_out: array<QOut>;
@group(0) @binding(5) var<storage, read_write> key_cache: array<u32>;
@group(0) @binding(6) var<storage, read_write> key_scales: array<u32>; // bits of f32

struct Params {
    total: u32,  // vectors
    rows: u32,  // positions S
    capacity: u32,  // rows of the caches
    table_rows: u32,
}
@group(0) @binding(7) var<uniform> params: Params;
@group(0) @binding(8) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

const LANES = 64u;
const EVERY = HEADS + KV_HEADS + VALUE_HEADS;
const KEPT_HEADS = max(max(KV_HEADS, VALUE_HEADS), 1u);
const PER_WORD = 32u / BITS;
const WORDS = D / PER_WORD;
const HALF_ROT = ROT / 2u;
const INFINITE = 0x7f800000u;
const MOST = (1i << (BITS - 1u)) - 1i; // the largest code

var<workgroup> y: array<f32, D>;
// Bits of the largest value and of the largest negated value: for positive floats, order is that of their bits, infinity and NaN last.
var<workgroup> most: array<atomic<u32>, 2>;

/// The scale of a vector whose values reach from minus the float of bits `below` to that of bits `above`.
fn scale_of(above: u32, below: u32) -> f32 {
    let far = bitcast<f32>(max(above, below));
    if (BITS == 8u) {
        return quotient(far, f32(MOST));
    }
    let size = max(far / 8.0, quotient(bitcast<f32>(min(above, below)), f32(MOST)));
    return select(size, -size, above > below);
}

/// The two elements of rotary pair p.
fn ends_of(p: u32) -> vec2<u32> {
    if (INTERLEAVED) {
        return vec2<u32>(2u * p, 2u * p + 1u);
    }
    return vec2<u32>(p, p + HALF_ROT);
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let vector = wid.y * groups.x + wid.x;
    if (vector >= params.total) {
        return;
    }
    let token = vector / EVERY;
    let head = vector % EVERY;
    let b = token / params.rows;
    let s = token % params.rows;
    let is_query = head < HEADS;
    let is_value = head >= HEADS + KV_HEADS;
    let query_at = (token * HEADS + head) * D;
    let kv_head = (head - HEADS) % KEPT_HEADS;
    if (s >= given_rows(b)) {
        if (is_query) {
            for (var i = lane; i < D; i += LANES) {
                query_out[query_at + i] = QOut();
            }
        }
        return;
    }
    for (var i = lane; i < D; i += LANES) {
        if (is_query) {
            y[i] = f32(query[query_at + i]);
        } else if (is_value) {
            y[i] = value_number((token * VALUE_HEADS + kv_head) * D + i);
        } else {
            y[i] = f32(key[(token * KV_HEADS + kv_head) * D + i]);
        }
    }
    if (lane < 2u) {
        atomicStore(&most[lane], 0u); // a barrier follows; some drivers do not zero atomics between workgroups
    }
    let position = given_past(b) + s;
    if (ROT > 0u && !is_value) {
        workgroupBarrier();
        let at = min(position, params.table_rows - 1u) * HALF_ROT;
        for (var p = lane; p < HALF_ROT; p += LANES) {
            let ends = ends_of(p);
            let u = y[ends.x];
            let v = y[ends.y];
            let c = f32(cosines[at + p]);
            let n = f32(sines[at + p]);
            y[ends.x] = u * c - v * n;
            y[ends.y] = v * c + u * n;
        }
    }
    if (HADAMARD) {
        for (var span = 1u; span < D; span *= 2u) {
            workgroupBarrier();
            for (var p = lane; p < D / 2u; p += LANES) {
                let i = p / span * 2u * span + p % span;
                let u = y[i];
                let v = y[i + span];
                y[i] = u + v;
                y[i + span] = u - v;
            }
        }
    }
    workgroupBarrier();
    if (is_query) {
        for (var i = lane; i < D; i += LANES) {
            query_out[query_at + i] = QOut(y[i] * NORM);
        }
        return;
    }

    var own = vec2<u32>();
    for (var i = lane; i < D; i += LANES) {
        let bits = bitcast<u32>(y[i] * NORM);
        own = max(own, select(vec2<u32>(bits, 0u), vec2<u32>(0u, bits & 0x7fffffffu), bits >> 31u == 1u));
    }
    atomicMax(&most[0], own.x);
    atomicMax(&most[1], own.y);
    workgroupBarrier();
    let above = atomicLoad(&most[0]);
    let below = atomicLoad(&most[1]);
    let bad = max(above, below) >= INFINITE;
    let scale = select(scale_of(above, below), 0.0, bad);
    let row = (b * params.capacity + position) * KEPT_HEADS + kv_head;
    for (var w = lane; w < WORDS; w += LANES) {
        var word = 0u;
        if (scale != 0.0) {
            for (var i = 0u; i < PER_WORD; i++) {
                let code = clamp(i32(round(quotient(y[w * PER_WORD + i] * NORM, scale))), -MOST - 1, MOST);
                word |= (bitcast<u32>(code) & ((1u << BITS) - 1u)) << (BITS * i);
            }
        }
        if (is_value) {
            keep_value(row * WORDS + w, word);
        } else {
            key_cache[row * WORDS + w] = word;
        }
    }
    if (lane == 0u) {
        let kept = select(bitcast<u32>(scale), 0x7fc00000u, bad);
        if (is_value) {
            keep_value_scale(row, kept);
        } else {
            key_scales[row] = kept;
        }
    }
}
