// No kernel: what attention_rows_1.wgsl has for one query row, for two; appended to `attention_stream`, which needs subgroups. The functions are
// described there.

alias Rows = vec2<f32>;
alias Tile = mat2x4<f32>;

fn tile_of(a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>) -> Tile {
    return Tile(a, b);
}

fn products(k: mat2x4<f32>, q0: Tile, q1: Tile) -> Rows {
    return Rows(chained(k, q0[0], q1[0]), chained(k, q0[1], q1[1]));
}

fn scaled(acc: Tile, c: Rows) -> Tile {
    return Tile(acc[0] * c.x, acc[1] * c.y);
}

fn added(acc: Tile, v: vec4<f32>, p: Rows) -> Tile {
    return Tile(fma(vec4<f32>(p.x), v, acc[0]), fma(vec4<f32>(p.y), v, acc[1]));
}

fn added_seen(acc: Tile, v: vec4<f32>, p: Rows) -> Tile {
    return Tile(select(fma(vec4<f32>(p.x), v, acc[0]), acc[0], p.x < 0.0), select(fma(vec4<f32>(p.y), v, acc[1]), acc[1], p.y < 0.0));
}

fn summed(acc: Tile, c: Rows, step: u32) -> Tile {
    return Tile(
        fma(acc[0], vec4<f32>(c.x), subgroupShuffleXor(acc[0] * c.x, step)),
        fma(acc[1], vec4<f32>(c.y), subgroupShuffleXor(acc[1] * c.y, step)),
    );
}

fn exchanged(a: Tile, b: Tile, c: Rows, upper: bool, step: u32) -> Tile {
    return Tile(
        fma(select(a[0], b[0], upper), vec4<f32>(c.x), subgroupShuffleXor(select(b[0], a[0], upper) * c.x, step)),
        fma(select(a[1], b[1], upper), vec4<f32>(c.y), subgroupShuffleXor(select(b[1], a[1], upper) * c.y, step)),
    );
}

fn row_of(x: Tile, row: u32) -> vec4<f32> {
    return select(x[0], x[1], row == 1u);
}

fn number_of(x: Rows, row: u32) -> f32 {
    return select(x.x, x.y, row == 1u);
}

fn with_number(x: Rows, row: u32, y: f32) -> Rows {
    return select(x, Rows(y), vec2<u32>(0u, 1u) == vec2<u32>(row));
}

fn differ(a: Rows, b: Rows) -> bool {
    return any(a != b);
}

/// The weights p of a key with scores x, -1 where it is hidden.
fn marked(p: Rows, x: Rows) -> Rows {
    return select(p, Rows(-1.0), bitcast<vec2<u32>>(x) == vec2<u32>(0xff800000u));
}

/// Marked weights as they count in the sum. (NaN is not below 0: it stays.)
fn counted(p: Rows) -> Rows {
    return select(p, Rows(), p < Rows());
}
