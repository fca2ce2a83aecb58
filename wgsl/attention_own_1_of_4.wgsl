// No kernel (for devices with subgroups): what attention_own_rows.wgsl has, for four rows over four lanes: each ends with the scores of one.
// Lanes hold rows in different orders, so that what they exchange stands in the same place and nothing has to be chosen.
// The functions are described there.

alias Own = f32;
const OVER = 4u;
const OWN = 1u;

fn turn_of(lane: u32) -> u32 {
    return ((lane & 4u) >> 1u) | ((lane & 8u) >> 3u);
}

fn own_of(x: Rows) -> Own {
    let y = x.xy + subgroupShuffleXor(x.zw, 4u);
    return y.x + subgroupShuffleXor(y.y, 8u);
}

fn spread(x: Own) -> Rows {
    return Rows(x, subgroupShuffleXor(x, 8u), subgroupShuffleXor(x, 4u), subgroupShuffleXor(x, 12u));
}

fn kept(x: Rows) -> Own {
    return x.x;
}

fn own_number(x: Own, row: u32) -> f32 {
    return x;
}

fn with_own(x: Own, row: u32, y: f32) -> Own {
    return y;
}

fn own_marked(p: Own, x: Own) -> Own {
    return select(p, -1.0, is_hidden(x));
}

fn own_counted(p: Own) -> Own {
    return select(p, 0.0, p < 0.0);
}
