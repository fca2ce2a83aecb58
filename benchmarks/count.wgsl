// counter[0] += 1: a dispatch that does next to nothing and depends on the one before it.
@group(0) @binding(0) var<storage, read_write> counter: array<u32>;

@compute @workgroup_size(1)
fn main() {
    counter[0] = counter[0] + 1u;
}
