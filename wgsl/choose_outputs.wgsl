// No kernel: what the last step of a choice writes, appended to choose_greedy.wgsl and choose_draw.wgsl: the token for the host and for the
// next step, the token's bit among the seen ones, and everything that moves on by one token, so that choices follow each other without
// the host.
//
// Needs: state, ring, outer0..outer3, choose_keys.wgsl,
// params.{vocabulary, rows, capacity, target_count, targets, advance_count, advances, lengths}.

fn put_outer(which: u32, word: u32, value: i32) {
    if (which == 0u) { outer0[word] = value; }
    if (which == 1u) { outer1[word] = value; }
    if (which == 2u) { outer2[word] = value; }
    if (which == 3u) { outer3[word] = value; }
}

fn outer(which: u32, word: u32) -> i32 {
    if (which == 0u) { return outer0[word]; }
    if (which == 1u) { return outer1[word]; }
    if (which == 2u) { return outer2[word]; }
    return outer3[word];
}

fn add_outer(which: u32, word: u32, delta: i32) {
    if (which == 0u) { outer0[word] += delta; }
    if (which == 1u) { outer1[word] += delta; }
    if (which == 2u) { outer2[word] += delta; }
    if (which == 3u) { outer3[word] += delta; }
}

/// Where a row's token will stand in its sequence: (low, high word).
fn position_of(row: u32) -> vec2<u32> {
    if (params.lengths.w == 0u) {
        let counters = params.rows * 8u + row * 4u;
        return vec2<u32>(state[counters], state[counters + 1u]);
    }
    let most = i32(params.lengths.z); // what the GPU alone knows may be out of range
    let past = clamp(outer(params.lengths.x, row), 0, most);
    return vec2<u32>(u32(past + clamp(outer(params.lengths.y, row), 0, most)), 0u);
}

/// Called by all invocations of a row's workgroup; `largest` is the row's largest key.
fn finish(lane: u32, row: u32, token: u32, largest: u32) {
    // What belongs to no row moves on once. The host has merged entries of one word.
    if (row == 0u && lane < params.advance_count) {
        let entry = params.advances[lane];
        add_outer(u32(entry.x), u32(entry.y), entry.z);
    }
    if (lane != 0u) { return; }
    let ragged = params.lengths.w == 1u;
    let idle = ragged && outer(params.lengths.y, row) <= 0;
    if (ragged && !idle) { // a row at its capacity stays there: its step reads and writes nothing
        let past = min(position_of(row).x, params.lengths.z);
        put_outer(params.lengths.x, row, i32(past));
    }
    let words = (params.vocabulary + 31u) / 32u;
    let counters = params.rows * 8u + row * 4u;
    var said = i32(token);
    var next = token;
    if (largest == NAN_KEY || largest <= MINUS_INFINITY_KEY || token >= params.vocabulary) {
        said = select(-2, -1, largest == NAN_KEY);
        next = 0u;
    } else if (!idle) {
        state[params.rows * 12u + row * words + token / 32u] |= 1u << (token & 31u);
    }
    if (idle) { said = -3; }
    let index = state[counters + 2u];
    if (ragged) {
        ring[(index % params.capacity) * params.rows + row] = said;
    } else if (index < params.capacity) {
        ring[index * params.rows + row] = said;
    }
    if (!idle) {
        if (params.target_count > 0u) { put_outer(params.targets.x, params.targets.y + row, i32(next)); }
        if (params.target_count > 1u) { put_outer(params.targets.z, params.targets.w + row, i32(next)); }
    }
    let position = state[counters] + 1u;
    state[counters] = position;
    if (position == 0u) { state[counters + 1u] += 1u; }
    state[counters + 2u] = index + 1u;
}
