// No kernel: how `gemv_stream` and its relatives quantise rows of x, or of their RMSNorm, to 8 bits beside packed weights, each workgroup for itself;
// appended with gemv_stream_packed.wgsl and gemv_stream_packed_bytes.wgsl. For devices with subgroups of at least 8.
//
// Scale, zero and codes are those of quantize_activations.wgsl, of a cell instead of a block. Ranges and means meet by shuffles of REACH lanes, then
// in workgroup memory, after one barrier. x is one chunk.
//
// Needs what gemv_stream_packed.wgsl needs and defines; params.span (low, high, least scale, shift); const NORMED (there is a norm), REACH.

const STEPS = (CHUNK * CELL_QUADS + WG - 1u) / WG;
const RANGES = WG / REACH;

const LAST = min(REACH, RANGES);

var<workgroup> ranges: array<vec3<f32>, ROWS * RANGES>;

/// Four columns of a row of x times the norm's weight.
fn weighted(row: u32, quad: u32) -> vec4<f32> {
    let v = vec4<f32>(x[min(row0 + row, params.m - 1u) * (u32(params.k) / 4u) + quad]);
    if (NORM_WEIGHT) {
        return v * vec4<f32>(norm[quad]);
    }
    return v;
}

/// Put all of x into workgroup memory.
fn stage(before: Squares, first: u32, lane: u32) -> Squares {
    let quads = u32(params.k) / 4u;
    for (var row = 0u; row < ROWS; row++) {
        var mine = vec3<f32>();
        for (var quad = lane; quad < quads; quad += WG) {
            var sum = 0.0;
            if (NORMED) {
                let given = vec4<f32>(x[min(row0 + row, params.m - 1u) * quads + quad]);
                sum = dot(given, given);
            }
            mine = range_meet(mine, vec3<f32>(range_of(weighted(row, quad)), sum));
        }
        for (var hop = 1u; hop < REACH; hop *= 2u) {
            mine = range_meet(mine, subgroupShuffleXor(mine, hop));
        }
        if (lane % REACH == 0u) {
            ranges[row * RANGES + lane / REACH] = mine;
        }
    }
    workgroupBarrier();
    for (var row = 0u; row < ROWS; row++) {
        var all = vec3<f32>();
        for (var i = lane % LAST; i < RANGES; i += LAST) {
            all = range_meet(all, ranges[row * RANGES + i]);
        }
        for (var hop = 1u; hop < LAST; hop *= 2u) {
            all = range_meet(all, subgroupShuffleXor(all, hop));
        }
        var by = 1.0;
        if (NORMED) {
            by = 1.0 / sqrt(all.z / params.k + params.eps);
        }
        let s = range_scale(all.x * by, all.y * by, params.span.xyz);
        let z = range_zero(all.x * by, s, params.span.xyz);
        let inverse = quotient(1.0, s);
        for (var step = 0u; step < STEPS; step++) {
            let j = step * WG + lane;
            var d = vec4<f32>(); // code - zero; 0 past the last column
            if (j < quads) {
                d = range_codes(weighted(row, j) * by, inverse, z, params.span.xyz) - vec4<f32>(z);
            }
            var some = select(0u, 1u, range_wide(d));
            var total = dot(d, vec4<f32>(1.0));
            for (var hop = 1u; hop < CELL_QUADS; hop *= 2u) {
                some |= subgroupShuffleXor(some, hop);
                if (ZEROS) {
                    total += subgroupShuffleXor(total, hop);
                }
            }
            let zero = select(0.0, z - params.span.w, some > 0u);
            if (STEPS * WG == CHUNK * CELL_QUADS || j < CHUNK * CELL_QUADS) {
                let cell = j / CELL_QUADS;
                xs[row * ROW + j % CELL_QUADS / 4u * CHUNK + cell][j % 4u] = range_word(d + vec4<f32>(zero));
                if (j % CELL_QUADS == 0u) {
                    cell_zeros[row * CHUNK + cell] = i32(zero);
                    if (ZEROS) {
                        totals[row * CHUNK + cell] = FACTOR * total;
                    }
                }
            }
        }
        if (lane == 0u) {
            scales[row] = range_stored(all.y, s) / FACTOR;
        }
    }
    return before;
}
