// The mass of the kept tokens of each chunk (see runtime/decoding/chooser.py). Finds the last digit of the search, if there was one, so that the kept
// tokens are known: keys above `key`, and the first `ties` ids with that key; of these, those at least min_p times as heavy as the
// heaviest. A chunk's ties are counted apart, since which of them are kept depends on the chunks before.
//
// Appended by the host: philox.wgsl, choose_keys.wgsl, choose_weights.wgsl, choose_search.wgsl.
//
// One workgroup: a chunk of 1,024 tokens (x) of one row (y). Memory traffic: keys once, 24 KiB of histogram a workgroup (from cache) after a
// search. Tried: nothing else yet.

@group(0) @binding(0) var<storage, read> keys: array<u32>;
@group(0) @binding(1) var<storage, read> state: array<u32>;
@group(0) @binding(2) var<storage, read_write> work: array<atomic<u32>>;

struct Params {
    vocabulary: u32, chunks: u32, work_stride: u32, slots: u32, stage: u32,
    k_histogram: u32, k_shift: u32, p_histogram: u32, p_shift: u32, p_first: u32, p_after_k: u32,
    kind: u32, // what was searched for: 0 nothing, 1 top-k, 2 top-p (after top-k or alone)
    cut: u32, sums: u32, // words of a row of `work`: where (key, ties) and the chunks' sums go
}
@group(0) @binding(3) var<uniform> params: Params;

const WG: u32 = 256u;
const CHUNK: u32 = 1024u;

var<workgroup> low: array<atomic<u32>, 516>;
var<workgroup> high: array<atomic<u32>, 516>;

/// The fewest tokens of mass `each` that have at least mass `need`, at most the vocabulary.
fn ties_for(need: vec2<u32>, each: vec2<u32>) -> u32 {
    var short = 0u; // the most tokens whose mass is too small
    for (var bit = 0x80000000u >> countLeadingZeros(params.vocabulary); bit > 0u; bit >>= 1u) {
        if (less64(times(each, short + bit), need)) { short += bit; }
    }
    return min(short + 1u, params.vocabulary);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = wid.y;
    let base = row * params.work_stride;
    let largest = leader(lane, base).x;
    let inverse_temperature = bitcast<f32>(state[row * 8u]);
    let least = bitcast<f32>(state[row * 8u + 3u]);
    var key = 0u;
    var ties = 0u;
    if (params.kind != 0u) {
        let search = search_on(lane, row, wid.x, base, largest);
        key = search.k.key;
        ties = search.k.need.x;
        if (params.kind == 2u) {
            key = search.p.key;
            ties = ties_for(search.p.need, mass_of(weight_of(key, largest, inverse_temperature)));
        }
    }
    if (wid.x == 0u && lane == 0u) {
        atomicStore(&work[base + params.cut], key);
        atomicStore(&work[base + params.cut + 1u], ties);
    }
    var sum = Sum(0u, vec2<u32>(0u));
    for (var j = 0u; j < CHUNK; j += WG) {
        let id = wid.x * CHUNK + j + lane;
        if (id < params.vocabulary) {
            let mine = keys[row * params.vocabulary + id];
            if (mine > key) {
                sum.mass = add64(sum.mass, mass_of(kept_weight(mine, largest, inverse_temperature, least)));
            }
            if (mine == key) { sum.count++; }
        }
    }
    let total = scan(lane, sum);
    if (lane == WG - 1u) {
        let place = base + params.sums + wid.x * 3u;
        atomicStore(&work[place], total.count);
        atomicStore(&work[place + 1u], total.mass.x);
        atomicStore(&work[place + 2u], total.mass.y);
    }
}
