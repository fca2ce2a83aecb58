// No kernel: the search for the least likely token that top-k or top-p keeps, appended to choose_level.wgsl and choose_sums.wgsl.
//
// Both keep the tokens at the front of one order (falling keys, rising ids), so what is kept is a key and how many tokens of that key. The key
// is found digit by digit, 11, 11 and 10 bits, from the top, by radix selection: a histogram holds count and mass of the tokens that share
// the digits found so far; the next digit is the one whose bin takes the sum from the largest key down past what is needed: k tokens, or
// the portion p of the mass of the tokens that top-k keeps. top-p starts when that mass is known exactly, from the first histogram again.
//
// Every workgroup of a dispatch finds the next digit for itself from the histogram of the dispatch before (24 KiB, from cache); the first one
// writes down the result for the dispatch after it.
//
// Needs: choose_weights.wgsl; state; params.{vocabulary, stage, slots, k_histogram, k_shift, p_histogram, p_shift, p_first, p_after_k}.

const NOT_NOW: u32 = 0xffffffffu;

/// The digits found (the others 0), what is still needed among the tokens with these digits, and the mass above them.
struct Cut { key: u32, need: vec2<u32>, above: vec2<u32> }
struct Search { k: Cut, p: Cut }

fn bin_at(place: u32) -> Sum {
    let count = atomicLoad(&work[place]);
    return Sum(count, vec2<u32>(atomicLoad(&work[place + 1u]), atomicLoad(&work[place + 2u])));
}

fn measure(sum: Sum, by_mass: bool) -> vec2<u32> {
    return select(vec2<u32>(sum.count, 0u), sum.mass, by_mass);
}

/// The part `fraction` / 2^32 of a mass rounded up; all of it for fraction 0; at least 1.
fn needed_mass(mass: vec2<u32>, fraction: u32) -> vec2<u32> {
    if (fraction == 0u) { return mass; }
    let whole = portion(mass, fraction);
    return add64(whole, vec2<u32>(select(0u, 1u, mass.x * fraction != 0u || (whole.x | whole.y) == 0u), 0u));
}

/// One more digit. Bins stand in the order of falling digits. `fraction` counts where `first` (of top-p without top-k).
fn narrow(lane: u32, histogram: u32, shift: u32, by_mass: bool, cut: Cut, first: bool, fraction: u32) -> Cut {
    var own = Sum(0u, vec2<u32>(0u));
    for (var j = 0u; j < 8u; j++) {
        own = plus(own, bin_at(histogram + (lane * 8u + j) * 3u));
    }
    let upto = scan(lane, own);
    var need = cut.need;
    if (first) { need = needed_mass(load_sum(255u).mass, fraction); }
    if (lane == 0u) { // what stays if no bin is reached, which takes a difference in rounding between two kernels
        atomicStore(&low[512], 2047u);
        atomicStore(&low[513], 0u);
        atomicStore(&low[514], 0u);
        atomicStore(&high[512], 0u);
    }
    workgroupBarrier();
    var before = minus(upto, own);
    if (less64(measure(before, by_mass), need) && !less64(measure(upto, by_mass), need)) {
        var place = lane * 8u;
        for (var j = 0u; j < 7u; j++) {
            let next = plus(before, bin_at(histogram + place * 3u));
            if (!less64(measure(next, by_mass), need)) { break; }
            before = next;
            place++;
        }
        atomicStore(&low[512], place);
        atomicStore(&low[513], before.count);
        atomicStore(&low[514], before.mass.x);
        atomicStore(&high[512], before.mass.y);
    }
    workgroupBarrier();
    let passed = Sum(atomicLoad(&low[513]), vec2<u32>(atomicLoad(&low[514]), atomicLoad(&high[512])));
    let digit = 2047u - atomicLoad(&low[512]);
    workgroupBarrier();
    return Cut(cut.key | (digit << shift), sub64(need, measure(passed, by_mass)), add64(cut.above, passed.mass));
}

/// The search one step on; `slot` is where a row's steps are written down.
fn search_on(lane: u32, row: u32, chunk: u32, base: u32, largest: u32) -> Search {
    let top_k = state[row * 8u + 1u];
    let fraction = state[row * 8u + 2u];
    let inverse_temperature = bitcast<f32>(state[row * 8u]);
    let wanted = select(min(top_k, params.vocabulary), params.vocabulary, top_k == 0u);
    let none = vec2<u32>(0u);
    var k = Cut(0u, vec2<u32>(wanted, 0u), none);
    var p = Cut(0u, none, none);
    let slot = base + params.slots + params.stage * 8u;
    if (params.stage > 0u) {
        let last = slot - 8u;
        k.key = atomicLoad(&work[last]);
        k.need.x = atomicLoad(&work[last + 1u]);
        k.above = vec2<u32>(atomicLoad(&work[last + 2u]), atomicLoad(&work[last + 3u]));
        p.key = atomicLoad(&work[last + 4u]);
        p.need = vec2<u32>(atomicLoad(&work[last + 5u]), atomicLoad(&work[last + 6u]));
    }
    if (params.k_histogram != NOT_NOW) {
        k = narrow(lane, base + params.k_histogram, params.k_shift, false, k, false, 0u);
    }
    if (params.p_histogram != NOT_NOW) {
        if (params.p_after_k == 1u) {
            let ties = times(mass_of(weight_of(k.key, largest, inverse_temperature)), k.need.x);
            p.need = needed_mass(add64(k.above, ties), fraction);
        }
        let first = params.p_first == 1u;
        p = narrow(lane, base + params.p_histogram, params.p_shift, true, p, first, fraction);
    }
    if (chunk == 0u && lane == 0u) {
        atomicStore(&work[slot], k.key);
        atomicStore(&work[slot + 1u], k.need.x);
        atomicStore(&work[slot + 2u], k.above.x);
        atomicStore(&work[slot + 3u], k.above.y);
        atomicStore(&work[slot + 4u], p.key);
        atomicStore(&work[slot + 5u], p.need.x);
        atomicStore(&work[slot + 6u], p.need.y);
    }
    return Search(k, p);
}
