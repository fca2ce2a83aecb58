// No kernel: the rows of a tile, and what stands between scores and probabilities; appended to `attention_flash` and `attention_flash_wide`.
//
// Needs the params and constants of these kernels, `shared_tile`, `neighbour`, attention_rules.wgsl, attention_scores.wgsl,
// attention_flash_ranges.wgsl.

/// Rows of a KV head by number, four of them: query rows and heads.
struct Rows {
    row: vec4<u32>,
    head: vec4<u32>,
}

fn rows_at(number: u32, b: u32, kv_head: u32) -> Rows {
    let n = min(vec4<u32>(number) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(last_number(b)));
    let row = n / params.group;
    return Rows(row, kv_head * params.group + (n - row * params.group));
}

/// Scores from dot products. With FOLD they stay as they are, and `powers` scales.
fn finished(dots: vec4<f32>) -> vec4<f32> {
    if (FOLD != 0u) {
        return dots;
    }
    let x = dots * params.scale;
    return vec4<f32>(capped(x.x), capped(x.y), capped(x.z), capped(x.w));
}

/// The scores of one key against four rows, after cap, mask and the rows' ranges.
fn judge(dots: vec4<f32>, b: u32, rows: Rows, j: u32, firsts: vec4<u32>, limits: vec4<u32>) -> vec4<f32> {
    var x = finished(dots);
    if (MASK != 0u && j < params.capacity) {
        x.x = masked(x.x, b, rows.head.x, rows.row.x, j);
        x.y = masked(x.y, b, rows.head.y, rows.row.y, j);
        x.z = masked(x.z, b, rows.head.z, rows.row.z, j);
        x.w = masked(x.w, b, rows.head.w, rows.row.w, j);
    }
    return select(x, vec4<f32>(params.minus_inf), (vec4<u32>(j) >= limits) | (vec4<u32>(j) < firsts));
}

fn limits_of(b: u32, row: vec4<u32>) -> vec4<u32> {
    return vec4<u32>(key_limit(b, row.x), key_limit(b, row.y), key_limit(b, row.z), key_limit(b, row.w));
}

fn firsts_of(b: u32, row: vec4<u32>) -> vec4<u32> {
    return vec4<u32>(key_first(b, row.x), key_first(b, row.y), key_first(b, row.z), key_first(b, row.w));
}

/// The factor of a score on the way to the unit of maxima: powers of two with FOLD, else natural ones.
fn factor() -> f32 {
    return select(1.0, params.scale * LOG2E, FOLD != 0u);
}

/// Probabilities of scores, up to the factor that belongs to the row's maximum.
fn powers(scores: vec4<f32>, top: vec4<f32>) -> vec4<f32> {
    if (FOLD != 0u) {
        return exp2(fma(scores, vec4<f32>(factor()), -top));
    }
    return exp2((scores - top) * LOG2E); // scores may be as low as floats go: no factor before the difference
}

/// The largest component among the lanes of a row that shuffle together.
fn shuffled_max(own: vec4<f32>) -> vec4<f32> {
    var x = own;
    if (SUB > 1u) { x = max(x, neighbour(x, 2u)); }
    if (SUB > 2u) { x = max(x, neighbour(x, 4u)); }
    if (SUB > 4u) { x = max(x, neighbour(x, 8u)); }
    if (SUB > 8u) { x = max(x, neighbour(x, 16u)); }
    return x;
}

fn shuffled_sum(own: vec4<f32>) -> vec4<f32> {
    var x = own;
    if (SUB > 1u) { x += neighbour(x, 2u); }
    if (SUB > 2u) { x += neighbour(x, 4u); }
    if (SUB > 4u) { x += neighbour(x, 8u); }
    if (SUB > 8u) { x += neighbour(x, 16u); }
    return x;
}

/// The lane's eight rows' numbers, put where the other lanes of the rows find them.
fn give(lo: vec4<f32>, hi: vec4<f32>, ty: u32, tx: u32) {
    if (tx % SUB == 0u) {
        shared_tile[V_AT + (tx / SUB) * 2u * TY + ty] = lo;
        shared_tile[V_AT + (tx / SUB) * 2u * TY + TY + ty] = hi;
    }
}
