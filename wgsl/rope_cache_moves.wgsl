// No kernel: the work of rope_cache.wgsl and rope_cache_sizes.wgsl, appended to both.
// A vector [D] is D / UNIT units: UNIT elements each, 1 or 4. The first ROT elements turn, pair by pair; item i < TURNED turns two units:
// INTERLEAVED: the units 2i and 2i + 1, which hold UNIT pairs of neighbours; else i and i + TURNED, whose elements pair up. The other units
// are copied, an item each. Tables have a row of WIDTH elements a position: one for each pair, or (WIDTH = ROT) one for each element.
// Needs: rope_cache_positions.wgsl.

const TURNED = ROT / 2u / UNIT;
const UNITS = D / UNIT;
const ITEMS = UNITS - TURNED;

struct Pair {
    u: Wide,
    v: Wide,
}

struct Place {
    batch: u32,
    position: u32,
    head: u32,
}

/// Where vector number i of query or key stands.
fn place_of(i: u32, heads: u32) -> Place {
    if (HEADS_FIRST) {
        let outer = i / params.rows;
        return Place(outer / heads, i % params.rows, outer % heads);
    }
    let outer = i / heads;
    return Place(outer / params.rows, outer % params.rows, i % heads);
}

/// The two units of item i.
fn ends_of(i: u32) -> vec2<u32> {
    if (INTERLEAVED) {
        return vec2<u32>(2u * i, 2u * i + 1u);
    }
    return vec2<u32>(i, i + TURNED);
}

/// (u * cos_u - v * sin_u, v * cos_v + u * sin_v)
fn rotated(x: Pair, place: Place, item: u32) -> Pair {
    let at_u = table_row(place.batch, place.position) * (WIDTH / UNIT) + item;
    let at_v = at_u + select(0u, TURNED, WIDTH == ROT);
    let cos_u = Wide(cosines[at_u]);
    let sin_u = Wide(sines[at_u]);
    let cos_v = Wide(cosines[at_v]);
    let sin_v = Wide(sines[at_v]);
    let pair = parted(x);
    return joined(Pair(pair.u * cos_u - pair.v * sin_u, pair.v * cos_v + pair.u * sin_v));
}

fn move_query(i: u32) {
    if (i >= params.q_count) {
        return;
    }
    let vector = i / ITEMS;
    let item = i % ITEMS;
    let base = vector * UNITS;
    let place = place_of(vector, params.heads);
    let padding = is_padding(place.batch, place.position);
    if (item >= TURNED) {
        let at = base + TURNED + item;
        if (padding) {
            query_out[at] = QOut();
            return;
        }
        query_out[at] = QOut(query[at]);
        return;
    }
    let ends = ends_of(item) + base;
    if (padding) {
        query_out[ends.x] = QOut();
        query_out[ends.y] = QOut();
        return;
    }
    let x = Pair(Wide(query[ends.x]), Wide(query[ends.y]));
    let y = rotated(x, place, item);
    query_out[ends.x] = QOut(y.u);
    query_out[ends.y] = QOut(y.v);
}

fn move_key(i: u32) {
    if (i >= params.k_count) {
        return;
    }
    let vector = i / ITEMS;
    let item = i % ITEMS;
    let base = vector * UNITS;
    let place = place_of(vector, params.kv_heads);
    let first = first_row(place.batch);
    if (first < 0 || is_padding(place.batch, place.position)) {
        return;
    }
    let row = place.batch * params.capacity + u32(first) + place.position;
    let target_base = (row * params.kv_heads + place.head) * UNITS;
    if (item >= TURNED) {
        let at = TURNED + item;
        key_cache[target_base + at] = KCache(key[base + at]);
        return;
    }
    let ends = ends_of(item);
    let x = Pair(Wide(key[base + ends.x]), Wide(key[base + ends.y]));
    let y = rotated(x, place, item);
    key_cache[target_base + ends.x] = KCache(y.u);
    key_cache[target_base + ends.y] = KCache(y.v);
}

fn move_value(i: u32) {
    if (i >= params.v_count) {
        return;
    }
    let number = i / params.v_row;
    let place = Place(number / params.rows, number % params.rows, 0u);
    let first = first_row(place.batch);
    if (first < 0 || is_padding(place.batch, place.position)) {
        return;
    }
    let row = place.batch * params.capacity + u32(first) + place.position;
    value_cache[row * params.v_row + i % params.v_row] = VCache(value[i]);
}

/// Item `lane` of workgroup `group`.
fn move_items(group: u32, lane: u32) {
    if (group < params.q_groups) {
        move_query(group * 64u + lane);
    } else if (group < params.k_groups) {
        move_key((group - params.q_groups) * 64u + lane);
    } else {
        move_value((group - params.k_groups) * 64u + lane);
    }
}
