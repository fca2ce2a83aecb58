// No kernel: how `attention_flash` and `attention_flash_wide` move queries, keys and values from global to workgroup memory, and results to
// global memory; appended to them. `fetch_*` loads what falls to a lane of a chunk into registers, `place_*` stores it where the workgroup
// reads it, so that a computation can stand between them. Columns that do not exist are zeros; in the place of rows that do
// not exist stands the last one, whose scores are hidden or never stored.
//
// Needs the bindings, params and constants of attention_flash.wgsl, and attention_flash_cells.wgsl or attention_flash_packed.wgsl.

const EVEN_CHUNKS = D4 % CHUNK == 0u; // every chunk is full, so no column needs a test
const EVEN_SLOTS = KEYS * K_SLOTS % LANES == 0u; // every load of keys is one for all lanes
const EVEN_VALUES = VKEYS * V_SLOTS % LANES == 0u; // of values

/// What a lane has loaded of a chunk: vectors of four floats, or of eight halves.
struct Raw {
    a: vec4<u32>,
    b: vec4<u32>,
    c: vec4<u32>,
    d: vec4<u32>,
}

fn halves(x: vec2<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(x.x), unpack2x16float(x.y));
}

fn fetch_key(i: u32, key0: u32, end: u32, base: u32, chunk: u32) -> vec4<u32> {
    let j = min(key0 + i / K_SLOTS, end - 1u);
    let c = chunk * CHUNK + (i % K_SLOTS) * KSTEP;
    if ((EVEN_SLOTS || i < KEYS * K_SLOTS) && (EVEN_CHUNKS || c < D4)) {
        return key_bits(base + j * params.k_s, c);
    }
    return vec4<u32>();
}

fn fetch_keys(lane: u32, key0: u32, end: u32, base: u32, chunk: u32) -> Raw {
    var x = Raw();
    x.a = fetch_key(lane, key0, end, base, chunk);
    if (KEYS * K_SLOTS > LANES) { x.b = fetch_key(lane + LANES, key0, end, base, chunk); }
    if (KEYS * K_SLOTS > 2u * LANES) { x.c = fetch_key(lane + 2u * LANES, key0, end, base, chunk); }
    if (KEYS * K_SLOTS > 3u * LANES) { x.d = fetch_key(lane + 3u * LANES, key0, end, base, chunk); }
    return x;
}

fn place_key(i: u32, x: vec4<u32>) {
    let at = K_AT + (i / K_SLOTS) * PITCH + (i % K_SLOTS) * KSTEP;
    if (EVEN_SLOTS || i < KEYS * K_SLOTS) {
        if (KSTEP == 2u) {
            shared_tile[at] = halves(x.xy);
            shared_tile[at + 1u] = halves(x.zw);
        } else {
            shared_tile[at] = bitcast<vec4<f32>>(x);
        }
    }
}

fn place_keys(lane: u32, x: Raw) {
    place_key(lane, x.a);
    if (KEYS * K_SLOTS > LANES) { place_key(lane + LANES, x.b); }
    if (KEYS * K_SLOTS > 2u * LANES) { place_key(lane + 2u * LANES, x.c); }
    if (KEYS * K_SLOTS > 3u * LANES) { place_key(lane + 3u * LANES, x.d); }
}

/// The lane's part of a chunk of the queries; `bases` are the elements at which its rows start.
fn fetch_queries(lane: u32, bases: vec4<u32>, chunk: u32) -> mat4x4<f32> {
    let c = chunk * CHUNK + lane % CHUNK;
    var x = mat4x4<f32>();
    if (EVEN_CHUNKS || c < D4) {
        x[0] = vec4<f32>(queries[(bases.x >> 2u) + c]);
        x[1] = vec4<f32>(queries[(bases.y >> 2u) + c]);
        if (CHUNK > 4u) {
            x[2] = vec4<f32>(queries[(bases.z >> 2u) + c]);
            x[3] = vec4<f32>(queries[(bases.w >> 2u) + c]);
        }
    }
    return x;
}

fn place_queries(lane: u32, x: mat4x4<f32>) {
    let at = (lane / CHUNK) * PITCH + lane % CHUNK;
    shared_tile[at] = x[0];
    shared_tile[at + LANES / CHUNK * PITCH] = x[1];
    if (CHUNK > 4u) {
        shared_tile[at + 2u * LANES / CHUNK * PITCH] = x[2];
        shared_tile[at + 3u * LANES / CHUNK * PITCH] = x[3];
    }
}

fn fetch_value(i: u32, key0: u32, end: u32, base: u32, column0: u32) -> vec4<u32> {
    let j = min(key0 + i / V_SLOTS, end - 1u);
    let c = column0 + (i % V_SLOTS) * VSTEP;
    if ((EVEN_VALUES || i < VKEYS * V_SLOTS) && (DV4 % VW == 0u || c < DV4)) {
        return value_bits(base + j * params.v_s, c);
    }
    return vec4<u32>();
}

fn fetch_values(lane: u32, key0: u32, end: u32, base: u32, column0: u32) -> Raw {
    var x = Raw();
    x.a = fetch_value(lane, key0, end, base, column0);
    if (VKEYS * V_SLOTS > LANES) { x.b = fetch_value(lane + LANES, key0, end, base, column0); }
    if (VKEYS * V_SLOTS > 2u * LANES) { x.c = fetch_value(lane + 2u * LANES, key0, end, base, column0); }
    if (VKEYS * V_SLOTS > 3u * LANES) { x.d = fetch_value(lane + 3u * LANES, key0, end, base, column0); }
    return x;
}

fn place_value(i: u32, x: vec4<u32>) {
    let at = V_AT + i * VSTEP;
    if (EVEN_VALUES || i < VKEYS * V_SLOTS) {
        if (VSTEP == 2u) {
            shared_tile[at] = halves(x.xy);
            shared_tile[at + 1u] = halves(x.zw);
        } else {
            shared_tile[at] = bitcast<vec4<f32>>(x);
        }
    }
}

fn place_values(lane: u32, x: Raw) {
    place_value(lane, x.a);
    if (VKEYS * V_SLOTS > LANES) { place_value(lane + LANES, x.b); }
    if (VKEYS * V_SLOTS > 2u * LANES) { place_value(lane + 2u * LANES, x.c); }
    if (VKEYS * V_SLOTS > 3u * LANES) { place_value(lane + 3u * LANES, x.d); }
}

/// vec4 index in `out` of row `number` of the KV head.
fn out_at(number: u32, b: u32, kv_head: u32, split: u32) -> u32 {
    let row = number / params.group;
    let h = kv_head * params.group + (number - row * params.group);
    if (SPLIT != 0u) {
        return (((b * params.heads + h) * params.rows + row) * params.splits + split) * (DV4 + 1u);
    }
    return (b * params.o_b + row * params.o_s + h * params.o_h) >> 2u;
}

/// x, or zeros where the row is padding.
fn kept(x: vec4<f32>, number: u32, b: u32) -> vec4<f32> {
    if (RAGGED) {
        return select(vec4<f32>(), x, number < params.group * rows_of(b));
    }
    return x;
}

fn store(acc: mat4x4<f32>, number: u32, b: u32, kv_head: u32, split: u32, c: u32) {
    var count = params.group * rows_of(b);
    if (RAGGED && SPLIT == 0u) {
        count = params.group * params.rows; // padding is written here; of split keys, by the merge
    }
    if (c < DV4) {
        if (number < count) { out[out_at(number, b, kv_head, split) + c] = OutVec(kept(acc[0], number, b)); }
        if (number + 1u < count) { out[out_at(number + 1u, b, kv_head, split) + c] = OutVec(kept(acc[1], number + 1u, b)); }
        if (number + 2u < count) { out[out_at(number + 2u, b, kv_head, split) + c] = OutVec(kept(acc[2], number + 2u, b)); }
        if (number + 3u < count) { out[out_at(number + 3u, b, kv_head, split) + c] = OutVec(kept(acc[3], number + 3u, b)); }
    }
}

/// The maxima and sums of four rows of a split, behind its columns.
fn store_state(top: vec4<f32>, sum: vec4<f32>, number: u32, b: u32, kv_head: u32, split: u32) {
    let count = params.group * rows_of(b);
    let none = vec2<f32>();
    if (number < count) { out[out_at(number, b, kv_head, split) + DV4] = OutVec(vec4<f32>(top.x, sum.x, none)); }
    if (number + 1u < count) { out[out_at(number + 1u, b, kv_head, split) + DV4] = OutVec(vec4<f32>(top.y, sum.y, none)); }
    if (number + 2u < count) { out[out_at(number + 2u, b, kv_head, split) + DV4] = OutVec(vec4<f32>(top.z, sum.z, none)); }
    if (number + 3u < count) { out[out_at(number + 3u, b, kv_head, split) + DV4] = OutVec(vec4<f32>(top.w, sum.w, none)); }
}
