// One level of the radix selection of top-k and top-p (see choose_search.wgsl): finds the digit of the level before, then counts, for each value
// of the next digit, the tokens with the digits found so far, and sums their mass.
//
// Appended by the host: philox.wgsl, choose_keys.wgsl, choose_weights.wgsl, choose_search.wgsl.
//
// One workgroup: a chunk of 1,024 tokens (x) of one row (y). It counts in its own memory, count and mass of a bin in one 64-bit number (12 bits
// count, 52 bits mass: 1,024 masses of at most 2^40), and adds the bins that are not empty to the row's histogram: integers, so the order
// of the additions does not matter. The sums of the search share that memory, which takes all of the 16 KiB that WebGPU grants.
// Memory traffic: keys once, 24 KiB of histogram a workgroup (from cache). Tried: nothing else yet.

@group(0) @binding(0) var<storage, read> keys: array<u32>;
@group(0) @binding(1) var<storage, read> state: array<u32>;
@group(0) @binding(2) var<storage, read_write> work: array<atomic<u32>>;

struct Params {
    vocabulary: u32, chunks: u32, work_stride: u32, slots: u32, stage: u32,
    k_histogram: u32, k_shift: u32, p_histogram: u32, p_shift: u32, p_first: u32, p_after_k: u32,
    out_histogram: u32, out_shift: u32, out_digits: u32, // where to count, by (key >> out_shift) & out_digits,
    out_mask: u32, out_p: u32, // tokens that agree with the key of top-k (0) or top-p (1) in these bits
}
@group(0) @binding(3) var<uniform> params: Params;

const WG: u32 = 256u;
const CHUNK: u32 = 1024u;
const BINS: u32 = 2048u;

var<workgroup> low: array<atomic<u32>, BINS>;
var<workgroup> high: array<atomic<u32>, BINS>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = wid.y;
    let base = row * params.work_stride;
    let largest = leader(lane, base).x;
    let inverse_temperature = bitcast<f32>(state[row * 8u]);
    let search = search_on(lane, row, wid.x, base, largest);
    let known = select(search.k.key, search.p.key, params.out_p == 1u);
    for (var i = lane; i < BINS; i += WG) {
        atomicStore(&low[i], 0u);
        atomicStore(&high[i], 0u);
    }
    workgroupBarrier();
    for (var j = 0u; j < CHUNK; j += WG) {
        let id = wid.x * CHUNK + j + lane;
        if (id < params.vocabulary) {
            let key = keys[row * params.vocabulary + id];
            if (((key ^ known) & params.out_mask) == 0u) {
                let place = BINS - 1u - ((key >> params.out_shift) & params.out_digits);
                let mass = mass_of(weight_of(key, largest, inverse_temperature));
                let old = atomicAdd(&low[place], mass.x);
                atomicAdd(&high[place], (1u << 20u) + mass.y + select(0u, 1u, old + mass.x < old));
            }
        }
    }
    workgroupBarrier();
    for (var i = lane; i < BINS; i += WG) {
        let upper = atomicLoad(&high[i]);
        let lower = atomicLoad(&low[i]);
        if (upper != 0u) {
            let place = base + params.out_histogram + i * 3u;
            atomicAdd(&work[place], upper >> 20u);
            let old = atomicAdd(&work[place + 1u], lower);
            let more = (upper & 0xfffffu) + select(0u, 1u, old + lower < old);
            if (more != 0u) { atomicAdd(&work[place + 2u], more); }
        }
    }
}
