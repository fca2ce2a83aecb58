// No kernel: four rows of weights a lane, for `gemv_stream` and `gemv_stream_siblings`; appended to them.
// Needs: fn raw, source, wide, product; var partial.

alias Sums = vec4<f32>;

struct Cells { a: Raw, b: Raw, c: Raw, d: Raw }

fn cells(which: u32, at: vec4<u32>, i: u32) -> Cells {
    return Cells(
        raw(source(which, 0u), at.x + i),
        raw(source(which, 1u), at.y + i),
        raw(source(which, 2u), at.z + i),
        raw(source(which, 3u), at.w + i),
    );
}

fn products(w: Cells, v: Wide) -> Sums {
    return vec4<f32>(product(wide(w.a), v), product(wide(w.b), v), product(wide(w.c), v), product(wide(w.d), v));
}

fn keep(at: u32, s: Sums) {
    partial[at] = s.x;
    partial[at + 1u] = s.y;
    partial[at + 2u] = s.z;
    partial[at + 3u] = s.w;
}
