//! NVIDIA GPUs through the CUDA driver, loaded at run time. What stands here today is the probe: the kernels' `.cu` texts
//! are not written yet (`Kernel::cuda` is `None`), so a CUDA device is reported, never opened.

/// The CUDA devices by name, or why there are none.
///
/// cudarc panics when asked for a library that is not there, so its presence is asked first.
pub(crate) fn probe() -> Result<Vec<String>, String> {
    // SAFETY: only tries to open the library; cudarc marks every `sys` call unsafe.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err("no CUDA driver (libcuda) found; install NVIDIA's driver".into());
    }
    cudarc::driver::result::init().map_err(|e| format!("cuInit failed: {:?}", e.0))?;
    let count = cudarc::driver::result::device::get_count()
        .map_err(|e| format!("no device count: {:?}", e.0))?;
    (0..count)
        .map(|i| {
            let device = cudarc::driver::result::device::get(i)
                .map_err(|e| format!("device {i}: {:?}", e.0))?;
            cudarc::driver::result::device::get_name(device)
                .map_err(|e| format!("device {i}: {:?}", e.0))
        })
        .collect()
}
