// No kernel: how `gemv_stream` and `gemv_stream_siblings` multiply cells of 32 codes of 4 bits with x; appended to them. ops/packed.py says where a
// code stands. A code u becomes the signed byte 16 (u - 8): four at a time, with one mask of a word, and one more shift for the low ones.

const CELL_QUADS = 8u; // fours of columns in a cell of 16 bytes
const MIDDLE = 8.0;
const FACTOR = 16.0; // of what is in a byte

/// Bytes of a cell: of each word those of its first four columns and those of its last four.
struct Codes { low: vec4<u32>, high: vec4<u32> }

fn codes_of(cell: vec4<u32>) -> Codes {
    let signs = vec4<u32>(0x80808080u);
    let mask = vec4<u32>(0xf0f0f0f0u);
    return Codes(((cell << vec4<u32>(4u)) ^ signs) & mask, (cell ^ signs) & mask);
}

/// The product of a cell with one digit of x, whose first sixteen columns are in a and last sixteen in b.
fn digit_sum(c: Codes, a: vec4<u32>, b: vec4<u32>) -> i32 {
    return dot4I8Packed(c.low.x, a.x) + dot4I8Packed(c.high.x, a.y) + dot4I8Packed(c.low.y, a.z) + dot4I8Packed(c.high.y, a.w)
        + dot4I8Packed(c.low.z, b.x) + dot4I8Packed(c.high.z, b.y) + dot4I8Packed(c.low.w, b.z) + dot4I8Packed(c.high.w, b.w);
}
