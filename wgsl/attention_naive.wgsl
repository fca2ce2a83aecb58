// Attention, one output element an invocation: the oracle that the fast kernels are tested against.
//
//   out[b, s, h, :] = sum_j p_j value[b, j, h / group, :],  p = softmax_j(mask + cap(scale * query[b, s, h, :] . key[b, j, h / group, :]))
//
// Two passes over the keys (the largest score, then the sums), each of which computes every score again: D * keys multiplications an
// element and no workgroup memory. Used on request only (`route="naive"`). Appended: attention_whole.wgsl or ragged_rows.wgsl with attention_ragged.wgsl, attention_rules.wgsl, attention_scores.wgsl, attention_loads.wgsl.

@group(0) @binding(0) var<storage, read> query: array<Q>;
@group(0) @binding(1) var<storage, read> key: array<K>;
@group(0) @binding(2) var<storage, read> value: array<V>;
@group(0) @binding(3) var<storage, read> mask: array<Mask>;
@group(0) @binding(4) var<storage, read> sink: array<Sink>;
@group(0) @binding(5) var<storage, read_write> out: array<Out>;

struct Params {
    batch: u32,
    heads: u32,
    group: u32,
    rows: u32,
    capacity: u32,
    limit: u32,
    window: u32,
    q_b: u32, q_s: u32, q_h: u32,
    k_b: u32, k_s: u32, k_h: u32,
    v_b: u32, v_s: u32, v_h: u32,
    o_b: u32, o_s: u32, o_h: u32,
    mask_b: u32, mask_h: u32, mask_s: u32, mask_k: u32,
    scale: f32,
    softcap: f32,
    minus_inf: f32,
    sinks: u32,
    total: u32,
}
@group(0) @binding(6) var<uniform> params: Params;
@group(0) @binding(7) var<uniform> live: array<vec4<i32>, 16>;
@group(0) @binding(8) var<uniform> lengths: array<vec4<i32>, LENGTHS>;

fn score(b: u32, h: u32, row: u32, j: u32) -> f32 {
    let q = b * params.q_b + row * params.q_s + h * params.q_h;
    let k = b * params.k_b + j * params.k_s + (h / params.group) * params.k_h;
    var sum = 0.0;
    for (var c = 0u; c < D; c++) {
        sum += f32(query[q + c]) * load_key(k, c >> 2u)[c & 3u];
    }
    return masked(capped(sum * params.scale), b, h, row, j);
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (wid.y * groups.x + wid.x) * 64u + lane;
    if (i >= params.total) {
        return;
    }
    let column = i % DV;
    let h = (i / DV) % params.heads;
    let row = (i / DV / params.heads) % params.rows;
    let b = i / DV / params.heads / params.rows;
    let first = key_first(b, row);
    let limit = select(key_limit(b, row), 0u, row >= rows_of(b)); // padding sees nothing: zero

    var top = LOWEST;
    var sum = 0.0;
    if (params.sinks != 0u) {
        let logit = f32(sink[h]);
        if (!is_hidden(logit)) {
            top = logit;
            sum = 1.0;
        }
    }
    let logit = top;
    for (var j = first; j < limit; j++) {
        let s = score(b, h, row, j);
        if (!is_hidden(s)) {
            top = max(top, s);
        }
    }
    sum *= exp(logit - top);
    var total = 0.0;
    for (var j = first; j < limit; j++) {
        let s = score(b, h, row, j);
        if (!is_hidden(s)) {
            let p = exp(s - top);
            sum += p;
            total += p * load_value(b * params.v_b + j * params.v_s + (h / params.group) * params.v_h, column >> 2u)[column & 3u];
        }
    }
    out[b * params.o_b + row * params.o_s + h * params.o_h + column] = Out(select(total / sum, 0.0, sum == 0.0));
}
