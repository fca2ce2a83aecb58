// Before attention, in one dispatch: query is rotated, key is rotated into its cache, value is copied into its cache.
//
//     query_out[b, s, h] = rotated(query[b, s, h]),  key_cache[b, start_pos + s, h] = rotated(key[b, s, h]),
//     value_cache[b, start_pos + s] = value[b, s]
//
// where rotated is that of rope.wgsl. See rope_cache_moves.wgsl, which has the work of an invocation; rope_cache_sizes.wgsl is the same kernel
// with the sizes of attention's grids as one more result.
//
// RAGGED: past + s stands in the place of start_pos + s, with (past, new) = lengths[b]; positions s >= new are padding: nothing of them is read,
// query_out is zero there and no cache row is written.
//
// A workgroup: 64 items of query, of key or of value; an item is two units of a vector that turn into each other, a unit that is copied, or
// one of value. A unit is one element, or four of them.
// Memory traffic: query, key and value are read once and their results written once; table rows come from the cache but for the first head.
// Unchecked: items are below q_count, k_count and v_count; rows written are start_pos .. start_pos + rows - 1 with start_pos in 0 .. last, where
// last = capacity - rows, or past .. past + new - 1 with new clamped to capacity - past; table rows are clamped to table_rows - 1.
// Versions tried: this one only.
// Appended: ragged_rows.wgsl, rope_cache_positions.wgsl, rope_cache_moves.wgsl, and rope_cache_pairs_1.wgsl or rope_cache_pairs_4.wgsl.
@group(0) @binding(0) var<storage, read> query: array<Q>;
@group(0) @binding(1) var<storage, read> key: array<K>;
@group(0) @binding(2) var<storage, read> value: array<V>;
@group(0) @binding(3) var<storage, read> cosines: array<Cos>;
@group(0) @binding(4) var<storage, read> sines: array<Sin>;
@group(0) @binding(5) var<storage, read_write> query_out: array<QOut>;
@group(0) @binding(6) var<storage, read_write> key_cache: array<KCache>;
@group(0) @binding(7) var<storage, read_write> value_cache: array<VCache>;

struct Params {
    start_pos: u32,  // slot: first cache row that is written
    start: u32,  // slot: table row of the first position
    last: i32,  // largest start_pos: capacity - rows
    rows: u32,  // positions S
    capacity: u32,  // rows of the caches
    table_rows: u32,
    heads: u32,
    kv_heads: u32,
    q_count: u32,  // items of query
    k_count: u32,
    v_count: u32,
    v_row: u32,  // units of a row of value, all heads
    q_groups: u32,  // workgroups up to the end of query
    k_groups: u32,  // ... of key
}
@group(0) @binding(8) var<uniform> params: Params;
@group(0) @binding(9) var<uniform> live: array<vec4<i32>, 16>;
@group(0) @binding(10) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    move_items(wid.y * groups.x + wid.x, lane);
}
