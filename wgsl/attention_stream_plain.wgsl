// No kernel: scores and weights of `attention_stream` where one query row sees all keys of its split and nothing but the scale is applied to
// scores; attention_stream_judged.wgsl is the same for the rest. Scores are in units of ln 2, which saves a product. Parts of their own, since
// even code that never runs moves the compiler to other registers and schedules.

const UNIT: f32 = 0.6931471805599453; // of scores
const LOG2E: f32 = 1.4426950408889634;
const SLACK: f32 = 8.0; // what is called maximum may be so far below the largest score: weights are at most 2^8, and sums are seldom rescaled
const FLOOR: f32 = -1.0e38; // a maximum over no key yet; keys past the end score LOWEST, far below it

/// e^x of a difference of scores.
fn power(x: Rows) -> Rows {
    return exp2(x);
}

/// Scores of key j, from the products of queries and key, of the rows from `first` on.
fn judged(x: Own, b: u32, first: u32, count: u32, kv_head: u32, j: u32, end: u32) -> Own {
    return select(x * (params.scale * LOG2E), Own(LOWEST), j >= end);
}

/// The weights of a key with scores x.
fn weights(x: Own, top: Own) -> Own {
    return exp2(x - top);
}

/// Weights as they count in the sum.
fn mass(p: Own) -> Own {
    return p;
}

/// acc + the products of four columns of a value with the weight of each row.
fn gathered(acc: Tile, v: vec4<f32>, p: Rows) -> Tile {
    return added(acc, v, p);
}
