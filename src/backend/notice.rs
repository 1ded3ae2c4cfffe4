//! What a device has to say besides results and errors. The library prints nothing: a program listens and shows it.

use std::path::Path;
use std::sync::OnceLock;

/// News from a device.
#[derive(Debug)]
#[non_exhaustive]
pub enum Notice<'a> {
    /// NVRTC begins to compile a file of kernels, which takes about a second.
    Compiling {
        /// The file, such as `kernels/conv2d.cu`.
        file: &'a str,
        /// What for: `sm_90`.
        arch: &'a str,
        /// The compiler: `NVRTC 13.0`.
        compiler: &'a str,
        /// How many files this program has compiled before.
        done: usize,
        /// How many files there are; a program compiles those that it uses.
        files: usize,
        /// The folder that keeps the code for the next start, where there is one.
        cache: Option<&'a Path>,
    },
    /// The file of the last [`Notice::Compiling`] is done, or has failed (its error tells).
    Compiled,
    /// Something works less well than it should.
    Warning(&'a str),
}

static LISTENER: OnceLock<fn(&Notice<'_>)> = OnceLock::new();

/// Has `listener` called with every [`Notice`] of this process, on the thread that works. The first call counts; until then
/// notices are lost.
pub fn on_notice(listener: fn(&Notice<'_>)) {
    // A program that set its listener keeps it.
    let _ = LISTENER.set(listener);
}

#[cfg_attr(
    not(any(feature = "cuda", feature = "cuda-emu")),
    allow(dead_code, reason = "only CUDA has news")
)]
pub(crate) fn tell(notice: &Notice<'_>) {
    if let Some(listener) = LISTENER.get() {
        listener(notice);
    }
}
