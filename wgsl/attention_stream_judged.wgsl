// No kernel: what attention_stream_plain.wgsl has, for rows that see different keys, for masks and for caps; appended to `attention_stream`. The
// functions are described there.

const UNIT: f32 = 1.0;
const SLACK: f32 = 5.5; // as of weights of 2^8
const FLOOR: f32 = LOWEST;

fn power(x: Rows) -> Rows {
    return exp(x);
}

/// After scale, cap, mask and the rows' ranges; hidden ones are -inf.
fn judged(x: Own, b: u32, first: u32, count: u32, kv_head: u32, j: u32, end: u32) -> Own {
    var s = x;
    for (var r = 0u; r < OWN; r++) {
        let number = first + r;
        let at = place(number, kv_head);
        var y = params.minus_inf;
        if (number < count && j < min(end, key_limit(b, at.x)) && j >= key_first(b, at.x)) {
            y = masked(capped(own_number(x, r) * params.scale), b, at.y, at.x, j);
        }
        s = with_own(s, r, y);
    }
    return s;
}

/// -1 where the key is hidden.
fn weights(x: Own, top: Own) -> Own {
    return own_marked(exp(x - top), x);
}

fn mass(p: Own) -> Own {
    return own_counted(p);
}

fn gathered(acc: Tile, v: vec4<f32>, p: Rows) -> Tile {
    return added_seen(acc, v, p);
}
