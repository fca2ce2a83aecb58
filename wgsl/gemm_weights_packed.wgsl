// No kernel: how `gemm` reads packed weights (ops/packed.py) whose groups are a multiple of four columns; appended to it, with packed_weights.wgsl.
// Needs params, EVEN, GATED. What a loader gives is said where 16-bit floats are read.
//
// A cell is kept as it is in memory: the word with four codes, shifted to their place, and the words with scale and zero of their group.

alias WCell = u32;

fn packed_word(which: u32, at: u32) -> u32 {
    if (GATED && which == 1u) {
        return w1[at];
    }
    return w0[at];
}

fn packed_row(row: u32) -> u32 {
    return row * params.w_row;
}

fn weight_cell(which: u32, at: u32, row: u32, quad: u32) -> vec4<u32> {
    if (!EVEN && 4u * quad >= params.k) {
        return vec4<u32>(); // a scale of 0
    }
    let per_word = 8u / BITS; // quads
    let start = packed_row(row);
    let codes = packed_word(which, start + quad / per_word) >> (BITS * (quad % per_word));
    let group = 4u * quad / GROUP;
    let scales = start + 4u * CELLS + select(group, group / 2u, SCALE_F16);
    var zero = 0u;
    if (ZEROS) {
        zero = packed_word(which, scales + SCALE_WORDS);
    }
    return vec4<u32>(codes, packed_word(which, scales), zero, group & 1u);
}

fn packed_half(word: u32, odd: u32) -> f32 {
    if (SCALE_F16) {
        let both = unpack2x16float(word);
        return select(both.x, both.y, odd == 1u);
    }
    return bitcast<f32>(word);
}

fn weight_values(cell: vec4<u32>) -> vec4<f32> {
    let c = cell.x;
    let codes = vec4<f32>(vec4<u32>(c, c >> 8u, c >> 16u, c >> 24u) & vec4<u32>((1u << BITS) - 1u));
    var zero = f32(1u << (BITS - 1u));
    if (ZEROS) {
        zero = packed_half(cell.z, cell.w);
    }
    return packed_half(cell.y, cell.w) * (codes - vec4<f32>(zero));
}
