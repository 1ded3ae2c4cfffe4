//! News from devices on the error stream.

use crate::Notice;
use std::io::{IsTerminal, Write};

/// Shows news: on a terminal one line that changes while kernels are compiled; elsewhere one line when that begins.
pub(super) fn show(notice: &Notice<'_>) {
    let text = line(notice, std::io::stderr().is_terminal());
    // Nobody who reads it is no fault.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn line(notice: &Notice<'_>, terminal: bool) -> String {
    match notice {
        Notice::Warning(text) => format!("warning: {text}\n"),
        Notice::Compiling { file, arch, compiler, done, files, cache } => {
            let kept = match cache {
                Some(folder) => format!("kept in {}", folder.display()),
                None => "kept nowhere: set ATTN2D_CACHE to a folder".into(),
            };
            match (terminal, done) {
                // The line before goes first, whatever it was.
                (true, _) => format!(
                    "\r\x1b[2Kcompiling {file} for {arch} ({} of at most {files}, {kept})",
                    done + 1
                ),
                (false, 0) => format!(
                    "compiling the CUDA kernels for {arch} at first use by {compiler} ({files} files at most, {kept})\n"
                ),
                (false, _) => String::new(),
            }
        }
        Notice::Compiled if terminal => "\r\x1b[2K".into(),
        Notice::Compiled => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_terminal_sees_every_file_and_a_log_one_line() {
        let notice = |done| Notice::Compiling {
            file: "kernels/conv2d.cu",
            arch: "sm_90",
            compiler: "NVRTC 13.0",
            done,
            files: 17,
            cache: Some(Path::new("/home/me/.cache/attn2d")),
        };
        let shown = line(&notice(2), true);
        for word in ["kernels/conv2d.cu for sm_90", "3 of at most 17", "/home/me/.cache/attn2d"] {
            assert!(shown.contains(word), "{shown}");
        }
        assert!(!shown.contains('\n') && line(&Notice::Compiled, true).ends_with("\x1b[2K"));
        let first = line(&notice(0), false);
        assert!(first.contains("sm_90 at first use by NVRTC 13.0") && first.ends_with('\n'));
        assert_eq!(line(&notice(1), false) + &line(&Notice::Compiled, false), "");
        assert_eq!(line(&Notice::Warning("slow"), false), "warning: slow\n");
    }
}
