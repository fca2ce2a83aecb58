// No kernel: cells of one of three weights, for the kernels of the gemv_stream family that read more than one; appended to `gemv_stream_siblings`
// and `gemv_stream_cache`, which bind w0, w1 and w2.

fn raw(which: u32, at: u32) -> Raw {
    if (which == 0u) {
        return w0[at];
    }
    if (which == 1u) {
        return w1[at];
    }
    return w2[at];
}

/// A word of 16 bytes of a weight, for packed ones.
fn raw_word(which: u32, at: u32, word: u32) -> u32 {
    if (which == 0u) {
        return bitcast<u32>(w0[at][word]);
    }
    if (which == 1u) {
        return bitcast<u32>(w1[at][word]);
    }
    return bitcast<u32>(w2[at][word]);
}
