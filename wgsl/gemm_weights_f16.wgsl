// No kernel: how `gemm` reads weights in 16-bit floats, in rows of a multiple of four elements; appended to it. Needs params, EVEN, GATED.
//
// A loader of weights in another format gives these three names:
//   alias WCell             the element type of the bindings w0 and w1
//   weight_cell(which, at, row, quad) -> vec4<u32>
//                           raw bits of elements 4 * quad to 4 * quad + 3 of a row of weights, in the batch that begins at cell `at`; zeros
//                           where the row has no such elements, which it need not test with EVEN. Of w0, or of w1 with GATED and which = 1.
//                           Only loads: what it returns stays in registers while the step before is computed. `scales0` and `scales1`
//                           (element type Scale) are free for it; a scale fits in the bits that codes leave.
//   weight_values(cell) -> vec4<f32>
//                           the four elements, finished

alias WCell = vec2<u32>;

fn weight_cell(which: u32, at: u32, row: u32, quad: u32) -> vec4<u32> {
    if (EVEN || quad < params.w_row) {
        let i = at + row * params.w_row + quad;
        if (GATED && which == 1u) {
            return vec4<u32>(w1[i], 0u, 0u);
        }
        return vec4<u32>(w0[i], 0u, 0u);
    }
    return vec4<u32>();
}

fn weight_values(cell: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(cell.x), unpack2x16float(cell.y));
}
