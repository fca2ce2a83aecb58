// No kernel: how `gemm_codes` unpacks a block of 32 codes of 8 bits, two cells; appended to it. ops/packed.py says where a code stands. A code u becomes
// the signed byte u - 128.

const BLOCK_CELLS = 2u;
const MIDDLE = 128.0;
const FACTOR = 1.0; // of what is in a byte

struct Columns { a: vec4<u32>, b: vec4<u32> }

fn columns_of(a: vec4<u32>, b: vec4<u32>) -> Columns {
    return Columns(a ^ vec4<u32>(0x80808080u), b ^ vec4<u32>(0x80808080u));
}
