// No kernel (for devices with subgroups): what attention_own_rows.wgsl has, for four rows over two lanes: each ends with the scores of two,
// without choosing, as in attention_own_1_of_4.wgsl. The functions are described there.

alias Own = vec2<f32>;
const OVER = 2u;
const OWN = 2u;

fn turn_of(lane: u32) -> u32 {
    return (lane & 4u) >> 1u;
}

fn own_of(x: Rows) -> Own {
    return x.xy + subgroupShuffleXor(x.zw, 4u);
}

fn spread(x: Own) -> Rows {
    return Rows(x, subgroupShuffleXor(x, 4u));
}

fn kept(x: Rows) -> Own {
    return x.xy;
}

fn own_number(x: Own, row: u32) -> f32 {
    return select(x.x, x.y, row == 1u);
}

fn with_own(x: Own, row: u32, y: f32) -> Own {
    return select(x, Own(y), vec2<u32>(0u, 1u) == vec2<u32>(row));
}

fn own_marked(p: Own, x: Own) -> Own {
    return select(p, Own(-1.0), bitcast<vec2<u32>>(x) == vec2<u32>(0xff800000u));
}

fn own_counted(p: Own) -> Own {
    return select(p, Own(), p < Own());
}
