// No kernel (for devices with subgroups): what attention_own_rows.wgsl has, for two rows over two lanes: each ends with the scores of one,
// without choosing, as in attention_own_1_of_4.wgsl. The functions are described there.

alias Own = f32;
const OVER = 2u;
const OWN = 1u;

fn turn_of(lane: u32) -> u32 {
    return (lane & 4u) >> 2u;
}

fn own_of(x: Rows) -> Own {
    return x.x + subgroupShuffleXor(x.y, 4u);
}

fn spread(x: Own) -> Rows {
    return Rows(x, subgroupShuffleXor(x, 4u));
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
