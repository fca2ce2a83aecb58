// No kernel (for devices with subgroups): what a lane of `attention_stream` holds for one query row; appended to it. attention_rows_2.wgsl and attention_rows_4.wgsl are the same for
// two and four rows.

alias Rows = f32; // one number a row
alias Tile = vec4<f32>; // four columns a row

fn tile_of(a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>) -> Tile {
    return a;
}

/// The dot products of four columns of a key with those of each row.
fn products(k: vec4<f32>, q: Tile) -> Rows {
    return dot(k, q);
}

fn scaled(acc: Tile, c: Rows) -> Tile {
    return acc * c;
}

/// acc + the products of four columns of a value with the weight of each row.
fn added(acc: Tile, v: vec4<f32>, p: Rows) -> Tile {
    return acc + p * v;
}

/// As `added`, where negative weights mark a row from which the key is hidden: what the key holds must not reach it.
fn added_seen(acc: Tile, v: vec4<f32>, p: Rows) -> Tile {
    return select(acc + p * v, acc, p < 0.0);
}

fn summed(acc: Tile, step: u32) -> Tile {
    return acc + subgroupShuffleXor(acc, step);
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
