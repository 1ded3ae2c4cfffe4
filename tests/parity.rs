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

/// The kernels of ops that have variants, as an adapter without subgroups runs them and as hardware does.
#[test]
fn kernels_that_this_adapter_would_not_choose() {
    for device in ["wgpu-base", "wgpu-tiled"] {
        if let Err(error) = Device::new(device) {
            assert!(std::env::var_os("ATTN2D_REQUIRE_WGPU").is_none(), "{error}");
            println!("{device} skipped, no adapter: {error}");
            continue;
        }
        for op in ["conv2d", "linear", "conv_block", "global_attention"] {
            let (devices, op) = (device.into(), Some(op.into()));
            let outcome = run(&Options { devices, op, ..Options::default() }, &mut |_| {}).unwrap();
            assert!(outcome.passed() && !outcome.records.is_empty(), "\n{outcome}");
            assert!(outcome.records.iter().all(|r| r.device.starts_with(device)));
        }
    }
}
