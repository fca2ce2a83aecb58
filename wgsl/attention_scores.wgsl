// No kernel: what the attention kernels do to a score before the softmax; appended to them.
//
// A hidden key is a score of -inf. It is recognised by its bits, since a WGSL compiler may assume that no infinity occurs.
// Needs: params.softcap (0: none), params.minus_inf, params.mask_*; const MASK (0 none, 1 additive, 2 boolean).

const LOWEST: f32 = -3.4028234663852886e38;

/// softcap * tanh(x / softcap). tanh is 1 in f32 beyond 15, and some drivers' tanh overflows there; NaN passes.
fn capped(x: f32) -> f32 {
    if (params.softcap != 0.0) {
        let y = x / params.softcap;
        if ((bitcast<u32>(y) & 0x7fffffffu) > 0x7f800000u) {
            return x;
        }
        return params.softcap * tanh(clamp(y, -15.0, 15.0));
    }
    return x;
}

/// A score after cap and mask. `row` and `key` must exist where there is a mask.
fn masked(x: f32, b: u32, h: u32, row: u32, key: u32) -> f32 {
    if (MASK == 0u) {
        return x;
    }
    let m = mask[b * params.mask_b + h * params.mask_h + row * params.mask_s + key * params.mask_k];
    if (MASK == 2u) {
        return select(params.minus_inf, x, m != Mask(0));
    }
    // NaN + -inf would be NaN, but a hidden key counts for nothing whatever it holds
    let y = f32(m);
    return select(x + y, params.minus_inf, is_hidden(y));
}

fn is_hidden(score: f32) -> bool {
    return bitcast<u32>(score) == 0xff800000u;
}

fn are_hidden(scores: vec4<f32>) -> vec4<bool> {
    return bitcast<vec4<u32>>(scores) == vec4<u32>(0xff800000u);
}
