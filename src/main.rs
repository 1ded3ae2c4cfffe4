//! The `attn2d` program.
fn main() {}
