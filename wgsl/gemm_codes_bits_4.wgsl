// No kernel: how `gemm_codes` unpacks a block of 32 codes of 4 bits, one cell; appended to it. ops/packed.py says where a code stands. A code u becomes
// the signed byte 16 (u - 8): four at a time, with one mask of a word, and one more shift for the low ones.

const BLOCK_CELLS = 1u;
const MIDDLE = 8.0;
const FACTOR = 16.0; // of what is in a byte

struct Columns { a: vec4<u32>, b: vec4<u32> }

fn columns_of(a: vec4<u32>, b: vec4<u32>) -> Columns {
    let signs = vec4<u32>(0x80808080u);
    let mask = vec4<u32>(0xf0f0f0f0u);
    let low = ((a << vec4<u32>(4u)) ^ signs) & mask;
    let high = (a ^ signs) & mask;
    return Columns(vec4<u32>(low.x, high.x, low.y, high.y), vec4<u32>(low.z, high.z, low.w, high.w));
}
