// No kernel: the products of `attention_flash` and `attention_flash_wide`, from workgroup memory into a lane's scores and sums; appended to them.
//
// Everything is a vector of a fixed name in a structure that functions take and return: an array indexed by a loop would leave registers.
// Needs `shared_tile`, `powers` and the constants of attention_flash.wgsl.

/// The lane's scores: component e of s<i> is row lo e and key tx + 16 * i; of t<i>, row hi e.
struct Scores {
    s0: vec4<f32>,
    s1: vec4<f32>,
    s2: vec4<f32>,
    s3: vec4<f32>,
    t0: vec4<f32>,
    t1: vec4<f32>,
    t2: vec4<f32>,
    t3: vec4<f32>,
}

/// acc + the products of four columns of a key with those of four rows; q[c] holds column c of the rows. A chain of multiply-adds:
/// a vector times a matrix costs one addition more.
fn dots(acc: vec4<f32>, q: mat4x4<f32>, k: vec4<f32>) -> vec4<f32> {
    return fma(q[3], vec4<f32>(k.w), fma(q[2], vec4<f32>(k.z), fma(q[1], vec4<f32>(k.y), fma(q[0], vec4<f32>(k.x), acc))));
}

/// Column c of four rows of queries in workgroup memory, as `dots` wants it.
fn query_columns(at: u32) -> mat4x4<f32> {
    return transpose(mat4x4<f32>(
        shared_tile[at],
        shared_tile[at + PITCH],
        shared_tile[at + 2u * PITCH],
        shared_tile[at + 3u * PITCH],
    ));
}

/// acc + the products of one vec4 column, whose queries and keys start at `q_at` and `k_at`.
fn with_column(acc: Scores, q_at: u32, k_at: u32) -> Scores {
    let k0 = shared_tile[k_at];
    let k1 = shared_tile[k_at + 16u * PITCH];
    let k2 = shared_tile[k_at + 32u * PITCH];
    let k3 = shared_tile[k_at + 48u * PITCH];
    let lo = query_columns(q_at);
    let hi = query_columns(q_at + QROWS / 2u * PITCH);
    return Scores(
        dots(acc.s0, lo, k0), dots(acc.s1, lo, k1), dots(acc.s2, lo, k2), dots(acc.s3, lo, k3),
        dots(acc.t0, hi, k0), dots(acc.t1, hi, k1), dots(acc.t2, hi, k2), dots(acc.t3, hi, k3),
    );
}

/// acc + p * v for four rows of probabilities and one vec4 column.
fn weigh(acc: mat4x4<f32>, p: vec4<f32>, v: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(
        fma(vec4<f32>(p.x), v, acc[0]),
        fma(vec4<f32>(p.y), v, acc[1]),
        fma(vec4<f32>(p.z), v, acc[2]),
        fma(vec4<f32>(p.w), v, acc[3]),
    );
}

/// As `weigh`, passing over hidden keys.
fn weigh_visible(acc: mat4x4<f32>, p: vec4<f32>, v: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(
        select(fma(vec4<f32>(p.x), v, acc[0]), acc[0], p.x < 0.0),
        select(fma(vec4<f32>(p.y), v, acc[1]), acc[1], p.y < 0.0),
        select(fma(vec4<f32>(p.z), v, acc[2]), acc[2], p.z < 0.0),
        select(fma(vec4<f32>(p.w), v, acc[3]), acc[3], p.w < 0.0),
    );
}

fn rescaled(acc: mat4x4<f32>, by: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(acc[0] * by.x, acc[1] * by.y, acc[2] * by.z, acc[3] * by.w);
}

/// The lane's sums: rows lo and hi, columns tx (a) and tx + 16 (b).
struct Sums {
    lo_a: mat4x4<f32>,
    hi_a: mat4x4<f32>,
    lo_b: mat4x4<f32>,
    hi_b: mat4x4<f32>,
}

/// acc + probabilities times values of one key, which start at `p_at` and `v_at`.
fn with_key(acc: Sums, p_at: u32, v_at: u32) -> Sums {
    let lo = shared_tile[p_at];
    let hi = shared_tile[p_at + TY];
    let v = shared_tile[v_at];
    if (BLOCKS == 1u) {
        return Sums(weigh(acc.lo_a, lo, v), weigh(acc.hi_a, hi, v), acc.lo_b, acc.hi_b);
    }
    let u = shared_tile[v_at + 16u];
    return Sums(weigh(acc.lo_a, lo, v), weigh(acc.hi_a, hi, v), weigh(acc.lo_b, lo, u), weigh(acc.hi_b, hi, u));
}

/// As `with_key`, for four keys in a row.
fn with_keys(acc: Sums, p_at: u32, v_at: u32) -> Sums {
    var sums = with_key(acc, p_at, v_at);
    sums = with_key(sums, p_at + P_PITCH, v_at + VW);
    sums = with_key(sums, p_at + 2u * P_PITCH, v_at + 2u * VW);
    return with_key(sums, p_at + 3u * P_PITCH, v_at + 3u * VW);
}

/// As `with_key`, passing over hidden keys.
fn with_visible_key(acc: Sums, p_at: u32, v_at: u32) -> Sums {
    let lo = shared_tile[p_at];
    let hi = shared_tile[p_at + TY];
    let v = shared_tile[v_at];
    let lo_a = weigh_visible(acc.lo_a, lo, v);
    let hi_a = weigh_visible(acc.hi_a, hi, v);
    if (BLOCKS == 1u) {
        return Sums(lo_a, hi_a, acc.lo_b, acc.hi_b);
    }
    let u = shared_tile[v_at + 16u];
    return Sums(lo_a, hi_a, weigh_visible(acc.lo_b, lo, u), weigh_visible(acc.hi_b, hi, u));
}

/// Stores the probabilities of one key for four rows and returns what they add to the rows' sums.
fn put(at: u32, scores: vec4<f32>, top: vec4<f32>) -> vec4<f32> {
    let p = powers(scores, top);
    shared_tile[at] = p;
    return p;
}

/// As `put`, with -1 for hidden keys.
fn put_visible(at: u32, scores: vec4<f32>, top: vec4<f32>) -> vec4<f32> {
    let p = powers(scores, top);
    let none = are_hidden(scores);
    shared_tile[at] = select(p, vec4<f32>(-1.0), none);
    return select(p, vec4<f32>(), none);
}
