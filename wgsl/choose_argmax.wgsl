// First step of choosing a token (runtime/decoding/chooser.py): scores, rounded to the dtype of the program's logits and after the repetition
// penalty, as keys that order like them (choose_keys.wgsl), and the largest key with its lowest id for each chunk of 1,024 tokens. A seen
// token's positive score is divided by the penalty, a negative one multiplied.
//
// Appended by the host: alias Logit (storage), choose_keys.wgsl, choose_round_<dtype of the logits>.wgsl.
//
// One workgroup: one chunk (x) of one row (y), four tokens an invocation, joined by a tree. params.store also keeps the keys, which later
// steps read instead of computing scores again (their bits must agree); params.clear words of histograms are zeroed on the way.
// Memory traffic: logits once, the bitmap of seen tokens where there is a penalty, keys once. Tried: nothing else yet.

@group(0) @binding(0) var<storage, read> logits: array<Logit>;
@group(0) @binding(1) var<storage, read> state: array<u32>;
@group(0) @binding(2) var<storage, read_write> keys: array<u32>;
@group(0) @binding(3) var<storage, read_write> work: array<u32>;

struct Params {
    vocabulary: u32, chunks: u32, rows: u32, // sizes
    offset: u32, stride: u32, // elements of `logits`: row 0's first, and from row to row
    store: u32, clear: u32, // whether keys are kept; words to zero
    work_stride: u32, histograms: u32, // words of `work`: from row to row; first histogram in a row
}
@group(0) @binding(4) var<uniform> params: Params;

const WG: u32 = 256u;
const CHUNK: u32 = 1024u;
const LARGEST: f32 = 3.4028234e38;

var<workgroup> best: array<u32, WG>;
var<workgroup> places: array<u32, WG>;

fn penalised(score: f32, penalty: f32, row: u32, id: u32) -> f32 {
    if (penalty == 1.0) { return score; }
    let bitmap = params.rows * 12u + row * ((params.vocabulary + 31u) / 32u);
    let seen = (state[bitmap + id / 32u] >> (id & 31u)) & 1u;
    // NaN and infinities stay as they are: arithmetic on them is not portable.
    if (seen == 0u || (bitcast<u32>(score) & 0x7fffffffu) >= 0x7f800000u) { return score; }
    if (score > 0.0) { return min(score / penalty, LARGEST); }
    return max(score * penalty, -LARGEST);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = wid.y;
    let base = row * params.work_stride;
    let penalty = bitcast<f32>(state[row * 8u + 4u]);
    var key = 0u;
    var place = 0xffffffffu;
    for (var j = 0u; j < CHUNK; j += WG) {
        let id = wid.x * CHUNK + j + lane;
        if (id < params.vocabulary) {
            let score = rounded(f32(logits[params.offset + row * params.stride + id]));
            let mine = key_of(penalised(score, penalty, row, id));
            if (params.store == 1u) { keys[row * params.vocabulary + id] = mine; }
            if (mine > key) {
                key = mine;
                place = id;
            }
        }
    }
    for (var i = wid.x * WG + lane; i < params.clear; i += params.chunks * WG) {
        work[base + params.histograms + i] = 0u;
    }
    best[lane] = key;
    places[lane] = place;
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            let other = best[lane + half];
            let where_other = places[lane + half];
            if (other > best[lane] || (other == best[lane] && where_other < places[lane])) {
                best[lane] = other;
                places[lane] = where_other;
            }
        }
        workgroupBarrier();
    }
    if (lane == 0u) {
        work[base + wid.x * 2u] = best[0];
        work[base + wid.x * 2u + 1u] = places[0];
    }
}
