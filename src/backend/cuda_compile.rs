//! From a CUDA text to machine code: embedded by `build.rs` where it found nvcc, else from the disk cache, else by NVRTC.

use super::notice::{Notice, tell};
use crate::io::kernel_cache::{self, Key};
use crate::kernel::CudaText;
use crate::tensor::DType;
use cudarc::nvrtc::{result, sys};
use std::ffi::{CStr, CString, c_char};
use std::sync::atomic::{AtomicUsize, Ordering};

// `FATBINS: [(&str, &[u8])]`: code of each text for the architectures `EMBEDDED_FOR`, made by nvcc; empty without it.
// `FILES`: the number of texts.
include!(concat!(env!("OUT_DIR"), "/kernels/embedded.rs"));

/// Whether code for `target` runs on a GPU: machine code on its own generation from its revision on (and `sm_90a` on 9.0 alone),
/// PTX on all from there on.
fn runs_on(target: &str, capability: i32) -> bool {
    let number = |text: &str| text.parse::<i32>().ok();
    if let Some(exact) = target.strip_prefix("sm_").and_then(|t| t.strip_suffix('a')) {
        return number(exact) == Some(capability);
    }
    if let Some(machine) = target.strip_prefix("sm_").and_then(number) {
        return machine / 10 == capability / 10 && machine <= capability;
    }
    target.strip_prefix("compute_").and_then(number).is_some_and(|ptx| ptx <= capability)
}

/// What NVRTC is missing when it is.
const NO_NVRTC: &str = "the CUDA kernels cannot be compiled: NVRTC (libnvrtc) is not found. Install the CUDA toolkit, or \
     `pip install nvidia-cuda-nvrtc` and put its lib folder on LD_LIBRARY_PATH; or use a program built where nvcc was found";

/// What code is made for: compute capability (80 for 8.0) and the driver's CUDA version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) capability: i32,
    pub(crate) driver: i32,
}

impl Target {
    fn embedded(self) -> bool {
        !FATBINS.is_empty() && EMBEDDED_FOR.iter().any(|target| runs_on(target, self.capability))
    }

    /// Whether code can be had at all; what to install where not.
    pub(crate) fn check(self) -> Result<(), String> {
        match self.embedded() || nvrtc_is_there() {
            true => Ok(()),
            false => Err(NO_NVRTC.into()),
        }
    }

    /// What `cuModuleLoadData` takes for a text: a fat binary, a cubin, or PTX ended by a zero byte.
    ///
    /// # Errors
    /// What is wrong, with the compiler's log; the caller names the kernel.
    pub(crate) fn image(self, text: CudaText, stored: DType) -> Result<Vec<u8>, String> {
        let name = format!("{}_{}", text.name, stored.suffix());
        let embedded = FATBINS.iter().find(|(found, _)| *found == name && self.embedded());
        if let Some((_, code)) = embedded {
            return Ok(code.to_vec());
        }
        if !nvrtc_is_there() {
            return Err(NO_NVRTC.into());
        }
        let nvrtc = Nvrtc::open()?;
        let options = nvrtc.options(self.capability)?;
        let versions = [nvrtc.version.to_string(), self.driver.to_string()];
        let source = text.source_for(stored);
        let options_line = options.join(" ");
        let depends_on = [source.as_str(), &options_line, &versions[0], &versions[1]];
        let key = Key::new(&format!("{name}-sm_{}", self.capability), &depends_on);
        if let Some(code) = kernel_cache::read(&key) {
            return Ok(code);
        }
        let code = nvrtc.compile_aloud(&name, &source, &options, self)?;
        // A folder that cannot be written costs time at the next start and nothing else.
        let _ = kernel_cache::write(&key, &code);
        Ok(code)
    }
}

/// Where the machine code of the kernels comes from, in words: what `doctor` says.
pub(crate) fn origin() -> String {
    if !FATBINS.is_empty() {
        return format!(
            "embedded for {} (compute_..: PTX for later GPUs)",
            EMBEDDED_FOR.join(", ")
        );
    }
    if !nvrtc_is_there() {
        return NO_NVRTC.into();
    }
    match (Nvrtc::open(), kernel_cache::folder()) {
        (Err(why), _) => why,
        (Ok(nvrtc), Some(folder)) => {
            format!("compiled at first use by {}, kept in {}", nvrtc.name(), folder.display())
        }
        (Ok(nvrtc), None) => {
            let name = nvrtc.name();
            format!("compiled at each start by {name}: set ATTN2D_CACHE to a folder to keep them")
        }
    }
}

fn nvrtc_is_there() -> bool {
    // SAFETY: only tries to open the library; cudarc marks every `sys` call unsafe.
    unsafe { sys::is_culib_present() }
}

/// NVRTC as it is installed.
struct Nvrtc {
    /// 1000 * major + minor.
    version: i32,
    /// Compute capabilities that it makes code for, in rising order.
    capabilities: Vec<i32>,
}

impl Nvrtc {
    /// NVRTC must be there.
    fn open() -> Result<Self, String> {
        let (mut major, mut minor, mut count) = (0, 0, 0);
        let fail = |what: &str, e: result::NvrtcError| format!("NVRTC: {what}: {e}");
        // SAFETY: the library is there, and the pointers are to numbers of ours.
        unsafe { sys::nvrtcVersion(&mut major, &mut minor) }
            .result()
            .map_err(|e| fail("no version", e))?;
        // SAFETY: as above.
        unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) }
            .result()
            .map_err(|e| fail("no architectures", e))?;
        let mut capabilities = vec![0; count.max(0) as usize];
        // SAFETY: the vector has as many places as NVRTC said it fills.
        unsafe { sys::nvrtcGetSupportedArchs(capabilities.as_mut_ptr()) }
            .result()
            .map_err(|e| fail("no architectures", e))?;
        capabilities.sort_unstable();
        Ok(Self { version: 1000 * major + minor, capabilities })
    }

    fn name(&self) -> String {
        format!("NVRTC {}.{}", self.version / 1000, self.version % 1000)
    }

    /// Compiler options: machine code for this very architecture where NVRTC knows it, else PTX for the nearest older one,
    /// which the driver translates.
    fn options(&self, capability: i32) -> Result<[String; 3], String> {
        let kind = match self.capabilities.iter().rev().find(|c| **c <= capability) {
            Some(c) if *c == capability => format!("sm_{c}"),
            Some(older) => format!("compute_{older}"),
            None => {
                return Err(format!(
                    "{} makes no code for compute capability {}.{}; install an older CUDA toolkit",
                    self.name(),
                    capability / 10,
                    capability % 10
                ));
            }
        };
        // Lambdas of the texts say nowhere that they are for the device.
        let device = "--device-as-default-execution-space".into();
        Ok([format!("--gpu-architecture={kind}"), "--std=c++17".into(), device])
    }

    /// Compiles, and tells who listens.
    fn compile_aloud(
        &self,
        name: &str,
        source: &str,
        options: &[String; 3],
        target: Target,
    ) -> Result<Vec<u8>, String> {
        static DONE: AtomicUsize = AtomicUsize::new(0);
        tell(&Notice::Compiling {
            file: &format!("kernels/{name}.cu"),
            arch: &format!("sm_{}", target.capability),
            compiler: &self.name(),
            done: DONE.load(Ordering::Relaxed),
            files: FILES,
            cache: kernel_cache::folder().as_deref(),
        });
        let code = self.compile(name, source, options);
        DONE.fetch_add(1, Ordering::Relaxed);
        tell(&Notice::Compiled);
        code
    }

    fn compile(&self, name: &str, source: &str, options: &[String; 3]) -> Result<Vec<u8>, String> {
        let zero = |_| "a zero byte in a kernel's text".to_string();
        let source = CString::new(source).map_err(zero)?;
        let name = CString::new(format!("{name}.cu")).map_err(zero)?;
        let program =
            result::create_program(&source, Some(&name)).map_err(|e| format!("NVRTC: {e}"))?;
        // SAFETY: the program was just made, and is destroyed once, below.
        let compiled = unsafe { result::compile_program(program, options) };
        let code = match compiled {
            // SAFETY: the program was compiled.
            Ok(()) => unsafe { code_of(program, options[0].contains("=sm_")) },
            // SAFETY: the program is alive.
            Err(e) => Err(format!("{e}\n{}", unsafe { log_of(program) })),
        };
        // SAFETY: nothing uses the program from here on.
        let _ = unsafe { result::destroy_program(program) };
        code
    }
}

/// # Safety
/// `program` was compiled without error and is alive.
unsafe fn code_of(program: sys::nvrtcProgram, machine_code: bool) -> Result<Vec<u8>, String> {
    let fail = |e: result::NvrtcError| format!("NVRTC has no code for it: {e}");
    if !machine_code {
        // SAFETY: the caller's promise. PTX comes with its zero byte.
        let ptx = unsafe { result::get_ptx(program) }.map_err(fail)?;
        return Ok(ptx.iter().map(|c| *c as u8).collect());
    }
    let mut bytes = 0;
    // SAFETY: the caller's promise.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut bytes) }.result().map_err(fail)?;
    let mut code = vec![0u8; bytes];
    // SAFETY: the vector has as many bytes as NVRTC said it writes.
    unsafe { sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()) }.result().map_err(fail)?;
    Ok(code)
}

/// # Safety
/// `program` is alive.
unsafe fn log_of(program: sys::nvrtcProgram) -> String {
    // SAFETY: the caller's promise.
    let log: Vec<c_char> = unsafe { result::get_program_log(program) }.unwrap_or_default();
    let bytes: Vec<u8> = log.iter().map(|c| *c as u8).collect();
    CStr::from_bytes_until_nul(&bytes)
        .map_or_else(|_| String::new(), |c| c.to_string_lossy().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    // `TEXTS: [(&str, &str)]`: every text.
    include!(concat!(env!("OUT_DIR"), "/kernels/texts.rs"));

    /// Set where NVRTC and nvcc must be there (CI), so that nothing is skipped without a word.
    const DEMAND: &str = "ATTN2D_DEMAND_CUDA_COMPILERS";

    /// A compiler is absent.
    fn absent(what: &str) {
        assert!(std::env::var_os(DEMAND).is_none(), "{DEMAND} is set, but {what}");
        println!("{what}: only its absence is tested");
    }

    /// NVRTC needs no GPU. Without it there is nothing to test: what is said then is.
    #[test]
    fn every_text_compiles_at_run_time() {
        let target = Target { capability: 80, driver: 13000 };
        if !nvrtc_is_there() {
            absent("NVRTC is not on LD_LIBRARY_PATH");
            assert!(target.embedded() || target.check().unwrap_err().contains("NVRTC"));
            return;
        }
        let nvrtc = Nvrtc::open().unwrap();
        let options = nvrtc.options(80).unwrap();
        TEXTS.par_iter().for_each(|(name, source)| {
            let code = nvrtc.compile(name, source, &options).unwrap();
            assert_eq!(&code[..4], b"\x7fELF", "{name}");
        });
        assert_eq!(TEXTS.len(), FILES);
        let message = nvrtc.compile("broken", "KERNEL(", &options).unwrap_err();
        assert!(message.contains("broken.cu"), "{message}");
        // A GPU that NVRTC does not know gets PTX.
        let options = nvrtc.options(9999).unwrap();
        assert!(options[0].contains("compute_"), "{options:?}");
        let (name, source) = TEXTS[0];
        let ptx = nvrtc.compile(name, source, &options).unwrap();
        assert!(ptx.ends_with(&[0]) && ptx.starts_with(b"//"));
        assert!(nvrtc.options(10).unwrap_err().contains("1.0"));
    }

    /// What a fat binary holds: `sm_80`, `compute_90`, as nvcc 13 writes it. A head of 16 bytes, then parts, each with kind (1 PTX,
    /// 2 machine code), length of its own head, bytes after it, architecture, and flags of which one is the `a` of `sm_90a`.
    fn parts(fatbin: &[u8]) -> Vec<String> {
        let number = |at: usize, bytes: usize| {
            let le = fatbin[at..at + bytes].iter().rev();
            le.fold(0usize, |n, b| n << 8 | usize::from(*b))
        };
        assert_eq!(number(0, 4), 0xba55_ed50, "not a fat binary");
        let (mut at, mut found) = (number(6, 2), Vec::new());
        while at < fatbin.len() {
            let kind = if number(at, 2) == 1 { "compute" } else { "sm" };
            let specific = if number(at + 40, 8) & 0x10_0000 != 0 { "a" } else { "" };
            found.push(format!("{kind}_{}{specific}", number(at + 28, 4)));
            at += number(at + 4, 4) + number(at + 8, 8);
        }
        found
    }

    #[test]
    fn code_runs_on_its_own_generation_and_ptx_on_later_ones() {
        let on = |target| {
            [75, 80, 86, 87, 89, 90, 100, 120].into_iter().filter(move |c| runs_on(target, *c))
        };
        assert_eq!(on("sm_80").collect::<Vec<_>>(), [80, 86, 87, 89]);
        assert_eq!(on("sm_86").collect::<Vec<_>>(), [86, 87, 89]);
        assert_eq!(on("sm_90a").collect::<Vec<_>>(), [90]);
        assert_eq!(on("compute_90").collect::<Vec<_>>(), [90, 100, 120]);
        assert_eq!(on("nonsense").count(), 0);
    }

    #[test]
    fn embedded_code_is_for_every_target() {
        if FATBINS.is_empty() {
            absent("nvcc was not found when this was built");
            assert!(!origin().contains("embedded"));
            return;
        }
        assert_eq!(FATBINS.len(), FILES);
        for (name, code) in FATBINS {
            let mut found = parts(code);
            found.sort();
            let mut wanted = EMBEDDED_FOR.to_vec();
            wanted.sort();
            assert_eq!(found, wanted, "{name}");
        }
        assert!(origin().contains(&format!("embedded for {}", EMBEDDED_FOR.join(", "))));
        // Code for an architecture that none is embedded for comes from NVRTC.
        assert!(!Target { capability: 75, driver: 13000 }.embedded());
    }
}
