// rope_cache.wgsl with one more result: how many workgroups the attention that follows needs for the live length.
// The workgroup after those of rope_cache.wgsl does it, as rope_cache_grids.wgsl says; they need not wait for it, nor it for them. For devices
// that bind more than 8 storage buffers.
// Memory traffic: that of rope_cache.wgsl, and 32 bytes.
// Unchecked: as rope_cache.wgsl; sizes has 8 elements.
// Versions tried: this one only.
// Appended: those of rope_cache.wgsl, attention_rules.wgsl, attention_splits.wgsl, rope_cache_grids.wgsl.
@group(0) @binding(0) var<storage, read> query: array<Q>;
@group(0) @binding(1) var<storage, read> key: array<K>;
@group(0) @binding(2) var<storage, read> value: array<V>;
@group(0) @binding(3) var<storage, read> cosines: array<Cos>;
@group(0) @binding(4) var<storage, read> sines: array<Sin>;
@group(0) @binding(5) var<storage, read_write> query_out: array<QOut>;
@group(0) @binding(6) var<storage, read_write> key_cache: array<KCache>;
@group(0) @binding(7) var<storage, read_write> value_cache: array<VCache>;
@group(0) @binding(8) var<storage, read_write> sizes: array<u32>;

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
    v_groups: u32,  // ... of value
    batch: u32,
    limit: u32,
    window: u32,
    split_grid: vec4<u32>,
    merge_grid: vec4<u32>,
}
@group(0) @binding(9) var<uniform> params: Params;
@group(0) @binding(10) var<uniform> live: array<vec4<i32>, 16>;
@group(0) @binding(11) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let group = wid.y * groups.x + wid.x;
    if (group != params.v_groups) {
        move_items(group, lane);
        return;
    }
    if (lane == 0u) {
        write_sizes();
    }
}
