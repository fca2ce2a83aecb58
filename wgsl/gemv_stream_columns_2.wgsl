// No kernel: two rows of weights a lane, for `gemv_stream` and `gemv_stream_siblings`; appended to them.
// Needs: fn raw, source, wide, product; var partial.

alias Sums = vec2<f32>;

struct Cells { a: Raw, b: Raw }

fn cells(which: u32, at: vec4<u32>, i: u32) -> Cells {
    return Cells(raw(source(which, 0u), at.x + i), raw(source(which, 1u), at.y + i));
}

fn products(w: Cells, v: Wide) -> Sums {
    return vec2<f32>(product(wide(w.a), v), product(wide(w.b), v));
}

fn keep(at: u32, s: Sums) {
    partial[at] = s.x;
    partial[at + 1u] = s.y;
}
