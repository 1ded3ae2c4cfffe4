// Put before the texts of ops that reduce over a workgroup. The op's own text says how many invocations that has: `const GROUP`, a power
// of two.

var<workgroup> shares: array<f32, GROUP>;

// The sum of every invocation's value, for all of them, in a fixed tree. All must call it.
fn group_sum(me: u32, value: f32) -> f32 {
    workgroupBarrier();
    shares[me] = value;
    for (var half = GROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if me < half { shares[me] += shares[me + half]; }
    }
    workgroupBarrier();
    return shares[0];
}

// The same for the maximum.
fn group_max(me: u32, value: f32) -> f32 {
    workgroupBarrier();
    shares[me] = value;
    for (var half = GROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if me < half { shares[me] = max(shares[me], shares[me + half]); }
    }
    workgroupBarrier();
    return shares[0];
}

