// New tokens of a ragged batch into caches of packed integers: rotary embedding, Hadamard transform and quantisation of each head's vector x [D].
//
//   y = x (value), rotary(x, past + s) (query, key);  HADAMARD: y = y H / sqrt(D), H[i, j] = (-1)^popcount(i & j);  query_out = y
//   scale = max_i |y_i| / MOST, code_i = round(y_i / scale), MOST = 127 (BITS 8) or 7 (BITS 4), ties to even
//
// to cache row past + s, where (past, new) = lengths[b], for s < new; the query of other tokens is zero. Codes are two's complement, the first in
// the lowest bits of a word. A vector of zeros has scale 0; one with an infinity or a NaN has a NaN for its scale, and codes 0.
//
// One workgroup of 64: one vector in workgroup memory, of HEADS query, KV_HEADS key and VALUE_HEADS value heads of a token. The transform takes
// log2(D) rounds with a barrier each. Quotients are corrected by a step of Newton's method, so that codes are those of the host.
// Memory traffic: each vector once; (D * BITS / 8 + 4) bytes written. Versions tried: this one only.
// Appended: ragged_rows.wgsl, and quantize_cache_value.wgsl or quantize_cache_alone.wgsl.

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

var<workgroup> y: array<f32, D>;
var<workgroup> most: atomic<u32>; // bits of the largest absolute value: for positive floats, order is that of their bits, infinity and NaN last

fn quotient(a: f32, b: f32) -> f32 {
    let q = a / b;
    let better = fma(fma(-q, b, a), 1.0 / b, q);
    // where a quotient or a residue leaves the range of floats, there is nothing to correct
    return select(q, better, abs(q) < 1e30 && abs(b) > 1e-30 && abs(b) < 1e30);
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
    if (lane == 0u) {
        atomicStore(&most, 0u); // a barrier follows; some drivers do not zero atomics between workgroups
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

    var own = 0u;
    for (var i = lane; i < D; i += LANES) {
        own = max(own, bitcast<u32>(abs(y[i] * NORM)));
    }
    atomicMax(&most, own);
    workgroupBarrier();
    let bits = atomicLoad(&most);
    let bad = bits >= INFINITE;
    let scale = quotient(bitcast<f32>(select(bits, 0u, bad)), f32((1u << (BITS - 1u)) - 1u));
    let row = (b * params.capacity + position) * KEPT_HEADS + kv_head;
    for (var w = lane; w < WORDS; w += LANES) {
        var word = 0u;
        if (scale > 0.0) {
            for (var i = 0u; i < PER_WORD; i++) {
                let code = i32(round(quotient(y[w * PER_WORD + i] * NORM, scale)));
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
