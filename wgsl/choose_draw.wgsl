// Last step of a random choice (runtime/decoding/chooser.py): the first id whose cumulative mass, in the order of ids, exceeds u * total, with u a
// 32-bit random fraction from (seed, position, stream); then what follows from it (choose_outputs.wgsl). All in integers, so the sums of the
// chunks and the walk through one chunk agree.
//
// Appended by the host: philox.wgsl, choose_keys.wgsl, choose_weights.wgsl, choose_outputs.wgsl.
//
// One workgroup: one row. It scans the ties and masses of the chunks (choose_sums.wgsl), then those of the 1,024 tokens of the chunk in
// which the number falls, four neighbours an invocation. Memory traffic: 20 bytes a chunk, 4 KiB of keys. Tried: nothing else yet.

@group(0) @binding(0) var<storage, read> keys: array<u32>;
@group(0) @binding(1) var<storage, read_write> work: array<atomic<u32>>;
@group(0) @binding(2) var<storage, read_write> state: array<u32>;
@group(0) @binding(3) var<storage, read_write> ring: array<i32>;
@group(0) @binding(4) var<storage, read_write> outer0: array<i32>;
@group(0) @binding(5) var<storage, read_write> outer1: array<i32>;
@group(0) @binding(6) var<storage, read_write> outer2: array<i32>;
@group(0) @binding(7) var<storage, read_write> outer3: array<i32>;

struct Params {
    vocabulary: u32, chunks: u32, rows: u32, capacity: u32, work_stride: u32,
    cut: u32, sums: u32, // as in choose_sums.wgsl
    target_count: u32, advance_count: u32, // used entries of `targets` and `advances`
    lengths: vec4<u32>, // of rows with their own: (buffer of past, buffer of q_len, capacity, 1); else zeros
    targets: vec4<u32>, // (buffer, word) twice
    advances: array<vec4<i32>, 32>, // (buffer, word, delta, 0)
}
@group(0) @binding(8) var<uniform> params: Params;

const CHUNK: u32 = 1024u;
const EACH: u32 = 4u; // tokens of an invocation

var<workgroup> low: array<atomic<u32>, 516>;
var<workgroup> high: array<atomic<u32>, 516>;
var<workgroup> found_chunk: u32;
var<workgroup> found_ties: u32; // left for the chunk and those behind it
var<workgroup> found_rest: vec2<u32>; // mass to pass in the chunk
var<workgroup> found_id: u32;

/// Mass of the first chunks' `left` ties that chunk c keeps, and of its tokens above the cut.
fn chunk_mass(place: u32, left: u32, tie_mass: vec2<u32>) -> vec2<u32> {
    let mass = vec2<u32>(atomicLoad(&work[place + 1u]), atomicLoad(&work[place + 2u]));
    return add64(mass, times(tie_mass, min(atomicLoad(&work[place]), left)));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = wid.x;
    let base = row * params.work_stride;
    let counters = params.rows * 8u + row * 4u;
    let best = leader(lane, base);
    let inverse_temperature = bitcast<f32>(state[row * 8u]);
    let least = bitcast<f32>(state[row * 8u + 3u]);
    let key = atomicLoad(&work[base + params.cut]);
    let ties = atomicLoad(&work[base + params.cut + 1u]);
    let tie_mass = mass_of(kept_weight(key, best.x, inverse_temperature, least));
    let position = position_of(row);
    var word = philox(
        vec4<u32>(position.x, position.y, state[row * 8u + 7u], 0u),
        vec2<u32>(state[row * 8u + 5u], state[row * 8u + 6u]),
    ).x;
    if (inverse_temperature == 0.0) { word = 0u; } // greedy: the lowest id of the largest ones

    // Which chunk: an invocation takes neighbouring ones.
    let each = (params.chunks + 255u) / 256u;
    let first = min(lane * each, params.chunks);
    let end = min(first + each, params.chunks);
    var own = Sum(0u, vec2<u32>(0u));
    for (var c = first; c < end; c++) { own.count += atomicLoad(&work[base + params.sums + c * 3u]); }
    let earlier = scan(lane, own).count - own.count;
    var left = ties - min(ties, earlier);
    var after = left;
    own.count = 0u;
    for (var c = first; c < end; c++) {
        let place = base + params.sums + c * 3u;
        own.mass = add64(own.mass, chunk_mass(place, after, tie_mass));
        after -= min(after, atomicLoad(&work[place]));
    }
    if (lane == 0u) { // what stays if rounding made nothing exceed: the most likely token
        found_chunk = 0u;
        found_ties = 0u;
        found_rest = vec2<u32>(0u);
        found_id = best.y;
    }
    var upto = scan(lane, own).mass;
    let mark = portion(load_sum(255u).mass, word);
    var before = sub64(upto, own.mass);
    if (!less64(mark, before) && less64(mark, upto)) {
        for (var c = first; c < end; c++) {
            let place = base + params.sums + c * 3u;
            let next = add64(before, chunk_mass(place, left, tie_mass));
            if (less64(mark, next)) {
                found_chunk = c;
                found_ties = left;
                found_rest = sub64(mark, before);
                break;
            }
            before = next;
            left -= min(left, atomicLoad(&work[place]));
        }
    }
    workgroupBarrier();

    // Which token of it.
    let start = found_chunk * CHUNK + lane * EACH;
    let stop = min(start + EACH, params.vocabulary);
    let rest = found_rest;
    let chunk_ties = found_ties;
    own = Sum(0u, vec2<u32>(0u));
    for (var id = start; id < stop; id++) {
        if (keys[row * params.vocabulary + id] == key) { own.count++; }
    }
    let ties_before = scan(lane, own).count - own.count;
    left = chunk_ties - min(chunk_ties, ties_before);
    after = left;
    own.count = 0u;
    for (var id = start; id < stop; id++) {
        own.mass = add64(own.mass, token_mass(row, id, key, after, best.x, inverse_temperature, least));
        if (keys[row * params.vocabulary + id] == key && after > 0u) { after--; }
    }
    upto = scan(lane, own).mass;
    before = sub64(upto, own.mass);
    if (!less64(rest, before) && less64(rest, upto)) {
        for (var id = start; id < stop; id++) {
            let next = add64(before, token_mass(row, id, key, left, best.x, inverse_temperature, least));
            if (less64(rest, next)) {
                found_id = id;
                break;
            }
            before = next;
            if (keys[row * params.vocabulary + id] == key && left > 0u) { left--; }
        }
    }
    workgroupBarrier();
    if (lane == 0u) { state[counters + 3u] = word; }
    finish(lane, row, found_id, best.x);
}

/// The mass of a token if it is kept, else 0; `left` is how many ties may still be kept.
fn token_mass(row: u32, id: u32, key: u32, left: u32, largest: u32, inverse_temperature: f32, least: f32) -> vec2<u32> {
    let mine = keys[row * params.vocabulary + id];
    if (mine < key || (mine == key && left == 0u)) { return vec2<u32>(0u); }
    return mass_of(kept_weight(mine, largest, inverse_temperature, least));
}
