//! Every op's built-in cases on every device of this machine: forward against the plain f64 reference, gradients against
//! finite differences, guard words, and two runs equal to the bit.

use attn2d::verify::{Options, run};

#[test]
fn every_op_on_every_device() {
    let outcome = run(&Options::default(), &mut |_| {}).unwrap();
    println!("{outcome}");
    assert!(outcome.passed(), "\n{outcome}");
    assert!(outcome.records.iter().any(|r| r.device == "cpu"));
}
