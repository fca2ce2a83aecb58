// No kernel: how `gemm_codes` multiplies a block of 32 columns of K from workgroup memory: a lane's products of four rows with eight columns; appended to it.
//
// Everything is a vector of a fixed name in a structure that functions take and return: an array indexed by a loop would leave registers.
// Needs TX, TY, TILE_M, TILE_N, ZEROS, tile_x, tile_w, x_zeros, x_totals, w_totals, w_scales.

/// By column: integers of four rows.
struct Dots {
    a: vec4<i32>, b: vec4<i32>, c: vec4<i32>, d: vec4<i32>, e: vec4<i32>, f: vec4<i32>, g: vec4<i32>, h: vec4<i32>,
}

/// By column: scaled sums of four rows.
struct Sums {
    a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>, e: vec4<f32>, f: vec4<f32>, g: vec4<f32>, h: vec4<f32>,
}

/// Sixteen columns of K of four rows.
struct Rows { a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32> }

fn dot_16(acc: i32, x: vec4<u32>, w: vec4<u32>) -> i32 {
    return acc + dot4I8Packed(x.x, w.x) + dot4I8Packed(x.y, w.y) + dot4I8Packed(x.z, w.z) + dot4I8Packed(x.w, w.w);
}

fn with_column(acc: vec4<i32>, r: Rows, w: vec4<u32>) -> vec4<i32> {
    return vec4<i32>(dot_16(acc.x, r.a, w), dot_16(acc.y, r.b, w), dot_16(acc.z, r.c, w), dot_16(acc.w, r.d, w));
}

/// With sixteen columns of K, whose first row of x and first column of w are at `x_at` and `w_at`.
fn with_half(acc: Dots, x_at: u32, w_at: u32) -> Dots {
    let r = Rows(tile_x[x_at], tile_x[x_at + TY], tile_x[x_at + 2u * TY], tile_x[x_at + 3u * TY]);
    var t = acc;
    t.a = with_column(t.a, r, tile_w[w_at]);
    t.b = with_column(t.b, r, tile_w[w_at + TX]);
    t.c = with_column(t.c, r, tile_w[w_at + 2u * TX]);
    t.d = with_column(t.d, r, tile_w[w_at + 3u * TX]);
    t.e = with_column(t.e, r, tile_w[w_at + 4u * TX]);
    t.f = with_column(t.f, r, tile_w[w_at + 5u * TX]);
    t.g = with_column(t.g, r, tile_w[w_at + 6u * TX]);
    t.h = with_column(t.h, r, tile_w[w_at + 7u * TX]);
    return t;
}

/// With the block, of rows ty + i * TY and columns tx + j * TX of the tile.
fn with_block(acc: Dots, ty: u32, tx: u32) -> Dots {
    var t = with_half(acc, ty, tx);
    t = with_half(t, TILE_M + ty, TILE_N + tx);
    let zeros = vec4<i32>(x_zeros[ty], x_zeros[ty + TY], x_zeros[ty + 2u * TY], x_zeros[ty + 3u * TY]);
    if (any(zeros != vec4<i32>())) {
        t.a -= zeros * w_totals[tx];
        t.b -= zeros * w_totals[tx + TX];
        t.c -= zeros * w_totals[tx + 2u * TX];
        t.d -= zeros * w_totals[tx + 3u * TX];
        t.e -= zeros * w_totals[tx + 4u * TX];
        t.f -= zeros * w_totals[tx + 5u * TX];
        t.g -= zeros * w_totals[tx + 6u * TX];
        t.h -= zeros * w_totals[tx + 7u * TX];
    }
    return t;
}

fn scaled(sum: vec4<f32>, acc: vec4<i32>, totals: vec4<f32>, scale: vec2<f32>) -> vec4<f32> {
    var y = vec4<f32>(acc);
    if (ZEROS) {
        y -= scale.y * totals;
    }
    return fma(vec4<f32>(scale.x), y, sum);
}

/// Sums with the group's integers, scaled.
fn flushed(sums: Sums, acc: Dots, ty: u32, tx: u32) -> Sums {
    var totals = vec4<f32>();
    if (ZEROS) {
        totals = vec4<f32>(x_totals[ty], x_totals[ty + TY], x_totals[ty + 2u * TY], x_totals[ty + 3u * TY]);
    }
    var s = sums;
    s.a = scaled(s.a, acc.a, totals, w_scales[tx]);
    s.b = scaled(s.b, acc.b, totals, w_scales[tx + TX]);
    s.c = scaled(s.c, acc.c, totals, w_scales[tx + 2u * TX]);
    s.d = scaled(s.d, acc.d, totals, w_scales[tx + 3u * TX]);
    s.e = scaled(s.e, acc.e, totals, w_scales[tx + 4u * TX]);
    s.f = scaled(s.f, acc.f, totals, w_scales[tx + 5u * TX]);
    s.g = scaled(s.g, acc.g, totals, w_scales[tx + 6u * TX]);
    s.h = scaled(s.h, acc.h, totals, w_scales[tx + 7u * TX]);
    return s;
}
