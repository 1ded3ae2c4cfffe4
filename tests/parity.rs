//! Every op's built-in cases on every device of this machine: forward against the plain f64 reference, gradients against
//! finite differences, guard words, and two runs equal to the bit.

use attn2d::Device;
use attn2d::verify::{Options, run};

#[test]
fn every_op_on_every_device() {
    let outcome = run(&Options::default(), &mut |_| {}).unwrap();
    println!("{outcome}");
    assert!(outcome.passed(), "\n{outcome}");
    assert!(outcome.records.iter().any(|r| r.device == "cpu"));
}

/// The kernels of ops that have variants for software or subgroups, as an adapter without either runs them.
#[test]
fn base_kernels_of_ops_with_variants() {
    if let Err(error) = Device::new("wgpu-base") {
        println!("skipped, no adapter: {error}");
        return;
    }
    for op in ["conv2d", "linear", "conv_block", "global_attention"] {
        let (devices, op) = ("wgpu-base".into(), Some(op.into()));
        let outcome = run(&Options { devices, op, ..Options::default() }, &mut |_| {}).unwrap();
        assert!(outcome.passed() && !outcome.records.is_empty(), "\n{outcome}");
        assert!(outcome.records.iter().all(|r| r.device.starts_with("wgpu-base")));
    }
}
