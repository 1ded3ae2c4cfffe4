//! From a CUDA text to machine code: embedded by `build.rs` where it found nvcc, else from the disk cache, else by NVRTC.

use crate::io::kernel_cache::{self, Key};
use crate::kernel::CudaText;
use crate::tensor::DType;
use cudarc::nvrtc::{result, sys};
use std::ffi::{CStr, CString, c_char};

// `FATBINS: [(&str, &[u8])]`: code of each text for several architectures, made by nvcc; empty without it.
include!(concat!(env!("OUT_DIR"), "/kernels/embedded.rs"));

/// The least compute capability that embedded code runs on.
const EMBEDDED_FROM: i32 = 80;

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
        self.capability >= EMBEDDED_FROM && !FATBINS.is_empty()
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
        let depends_on = [source.as_str(), &options[0], &options[1], &versions[0], &versions[1]];
        let key = Key::new(&format!("{name}-sm_{}", self.capability), &depends_on);
        if let Some(code) = kernel_cache::read(&key) {
            return Ok(code);
        }
        let code = nvrtc.compile(&name, &source, &options)?;
        // A folder that cannot be written costs time at the next start and nothing else.
        let _ = kernel_cache::write(&key, &code);
        Ok(code)
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

    /// Compiler options: machine code for this very architecture where NVRTC knows it, else PTX for the nearest older one,
    /// which the driver translates.
    fn options(&self, capability: i32) -> Result<[String; 2], String> {
        let kind = match self.capabilities.iter().rev().find(|c| **c <= capability) {
            Some(c) if *c == capability => format!("sm_{c}"),
            Some(older) => format!("compute_{older}"),
            None => {
                return Err(format!(
                    "NVRTC {}.{} makes no code for compute capability {}.{}; install an older CUDA toolkit",
                    self.version / 1000,
                    self.version % 1000,
                    capability / 10,
                    capability % 10
                ));
            }
        };
        Ok([format!("--gpu-architecture={kind}"), "--std=c++17".into()])
    }

    fn compile(&self, name: &str, source: &str, options: &[String; 2]) -> Result<Vec<u8>, String> {
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
    use crate::kernel::cuda_text;

    /// NVRTC needs no GPU. Without it there is nothing to test: what is said then is.
    #[test]
    fn every_text_compiles_at_run_time() {
        let target = Target { capability: 80, driver: 13000 };
        if !nvrtc_is_there() {
            println!("NVRTC is not installed: only its absence is tested");
            assert!(target.embedded() || target.check().unwrap_err().contains("NVRTC"));
            return;
        }
        let nvrtc = Nvrtc::open().unwrap();
        let texts = [
            cuda_text!("elementwise"),
            cuda_text!("reduce"),
            cuda_text!("conv2d"),
            cuda_text!("global_attention"),
            cuda_text!("global_attention_bwd"),
            cuda_text!("local_attention"),
            cuda_text!("local_attention_bwd"),
            cuda_text!("batch_norm"),
        ];
        for text in texts {
            let (name, source) = (text.name, text.source_for(DType::F32));
            let code = nvrtc.compile(name, &source, &nvrtc.options(80).unwrap()).unwrap();
            assert_eq!(&code[..4], b"\x7fELF", "{name}");
        }
        let message = nvrtc.compile("broken", "KERNEL(", &nvrtc.options(80).unwrap()).unwrap_err();
        assert!(message.contains("broken.cu"), "{message}");
        // A GPU that NVRTC does not know gets PTX.
        let options = nvrtc.options(9999).unwrap();
        assert!(options[0].contains("compute_"), "{options:?}");
        let ptx = nvrtc
            .compile("reduce", &cuda_text!("reduce").source_for(DType::F32), &options)
            .unwrap();
        assert!(ptx.ends_with(&[0]) && ptx.starts_with(b"//"));
        assert!(nvrtc.options(10).unwrap_err().contains("1.0"));
    }
}
