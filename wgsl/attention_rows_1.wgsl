// No kernel (for devices with subgroups): what a lane of `attention_stream` holds for one query row; appended to it. attention_rows_2.wgsl and attention_rows_4.wgsl are the same for
// two and four rows.

alias Rows = f32; // one number a row
alias Tile = vec4<f32>; // four columns a row

fn tile_of(a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>) -> Tile {
    return a;
}

/// A lane's share of the scores of a key against each row, whose columns are in q0 and q1.
fn products(k: mat2x4<f32>, q0: Tile, q1: Tile) -> Rows {
    return chained(k, q0, q1);
}

fn scaled(acc: Tile, c: Rows) -> Tile {
    return acc * c;
}

/// acc + the products of four columns of a value with the weight of each row.
fn added(acc: Tile, v: vec4<f32>, p: Rows) -> Tile {
    return fma(vec4<f32>(p), v, acc);
}

/// As `added`, where negative weights mark a row from which the key is hidden: what the key holds must not reach it.
fn added_seen(acc: Tile, v: vec4<f32>, p: Rows) -> Tile {
    return select(fma(vec4<f32>(p), v, acc), acc, p < 0.0);
}

/// acc scaled by c, added up over two lanes `step` apart.
fn summed(acc: Tile, c: Rows, step: u32) -> Tile {
    return fma(acc, vec4<f32>(c), subgroupShuffleXor(acc * c, step));
}

/// As `summed`, of a where not `upper`, of b in the other lane.
fn exchanged(a: Tile, b: Tile, c: Rows, upper: bool, step: u32) -> Tile {
    return fma(select(a, b, upper), vec4<f32>(c), subgroupShuffleXor(select(b, a, upper) * c, step));
}

fn row_of(x: Tile, row: u32) -> vec4<f32> {
    return x;
}

fn number_of(x: Rows, row: u32) -> f32 {
    return x;
}

fn with_number(x: Rows, row: u32, y: f32) -> Rows {
    return y;
}

fn differ(a: Rows, b: Rows) -> bool {
    return a != b;
}

/// The weights p of a key with scores x, -1 where it is hidden.
fn marked(p: Rows, x: Rows) -> Rows {
    return select(p, -1.0, is_hidden(x));
}

/// Marked weights as they count in the sum. (NaN is not below 0: it stays.)
fn counted(p: Rows) -> Rows {
    return select(p, 0.0, p < 0.0);
}
