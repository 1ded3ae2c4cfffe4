//! PyTorch's expectations (`tests/golden/`) on every device of this machine.

use attn2d::verify::{Options, run};

#[test]
fn every_device_agrees_with_pytorch() {
    let golden = || vec![concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden").into()];
    let ops = attn2d::ops::specs().into_iter().map(|spec| spec.name);
    for op in ops.chain([attn2d::verify::MODEL]) {
        let op = Some(op.into());
        let outcome = run(
            &Options { op, cases: golden(), no_builtin: true, ..Options::default() },
            &mut |_| {},
        )
        .unwrap();
        println!("{outcome}");
        assert!(outcome.passed(), "\n{outcome}");
    }
}
