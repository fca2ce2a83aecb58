// No kernel: how `gemv_stream` and `gemv_stream_siblings` multiply cells of 16 codes of 8 bits with x; appended to them. ops/packed.py says where a
// code stands. A code u becomes the signed byte u - 128.

const CELL_QUADS = 4u; // fours of columns in a cell of 16 bytes
const MIDDLE = 128.0;
const FACTOR = 1.0; // of what is in a byte

struct Codes { bytes: vec4<u32> }

fn codes_of(cell: vec4<u32>) -> Codes {
    return Codes(cell ^ vec4<u32>(0x80808080u));
}

/// The product of a cell with one digit of x, whose sixteen columns are in a.
fn digit_sum(c: Codes, a: vec4<u32>, b: vec4<u32>) -> i32 {
    return dot4I8Packed(c.bytes.x, a.x) + dot4I8Packed(c.bytes.y, a.y) + dot4I8Packed(c.bytes.z, a.z) + dot4I8Packed(c.bytes.w, a.w);
}
