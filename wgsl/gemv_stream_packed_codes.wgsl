// No kernel: how `gemv_stream` and its relatives take activations that are integers already (ops/activations.py) beside packed weights; appended with
// gemv_stream_packed.wgsl. For devices with subgroups of at least 8.
//
// They are copied as they are. Needs what gemv_stream_packed.wgsl needs and defines, with gemv_stream_packed_bytes.wgsl; x in 16 bytes.

/// 16 bytes of a row of x; those of codes.
fn x_cells() -> vec2<u32> {
    let blocks = (u32(params.k) + 31u) / 32u;
    return vec2<u32>(2u * blocks + (blocks + 3u) / 4u + 1u, 2u * blocks);
}

/// Put CHUNK cells of x into workgroup memory, from cell `first` on; those past the end are 0.
fn stage(before: Squares, first: u32, lane: u32) -> Squares {
    let size = x_cells();
    let cells = code_cells();
    for (var j = lane; j < ROWS * CHUNK; j += WG) {
        let row = j / CHUNK;
        let cell = j % CHUNK;
        let at = row * ROW + cell;
        let start = min(row0 + row, params.m - 1u) * size.x;
        let valid = first + cell < cells;
        let own = min(first + cell, cells - 1u);
        let block = own * CELL_QUADS / 8u;
        let zero = select(0, bitcast<i32>(x[start + size.y + block / 4u][block % 4u]), valid);
        let a = select(vec4<u32>(), x[start + own * HALF], vec4<bool>(valid));
        let b = select(vec4<u32>(), x[start + own * HALF + HALF - 1u], vec4<bool>(valid));
        xs[at] = a;
        if (HALF > 1u) {
            xs[at + CHUNK] = b;
        }
        cell_zeros[j] = zero;
        if (ZEROS) {
            var total = four_of(a) - i32(4u * CELL_QUADS) * zero;
            if (HALF > 1u) {
                total += four_of(b);
            }
            totals[j] = FACTOR * f32(total);
        }
    }
    if (lane < ROWS) {
        let start = min(row0 + lane, params.m - 1u) * size.x;
        scales[lane] = bitcast<f32>(x[start + size.x - 1u].x) / FACTOR;
    }
    return before;
}

/// The sum of sixteen signed bytes.
fn four_of(v: vec4<u32>) -> i32 {
    let ones = 0x01010101u;
    return dot4I8Packed(v.x, ones) + dot4I8Packed(v.y, ones) + dot4I8Packed(v.z, ones) + dot4I8Packed(v.w, ones);
}
