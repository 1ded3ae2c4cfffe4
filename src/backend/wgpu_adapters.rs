//! The adapters of a machine.

/// Every adapter wgpu finds, hardware first; `WGPU_BACKEND` narrows the APIs as in other wgpu programs. GL is asked only
/// where no better API has an adapter: software over GL compiles shaders for minutes.
pub(crate) fn adapters() -> Vec<wgpu::Adapter> {
    let mut found = match wgpu::Backends::from_env() {
        Some(chosen) => adapters_of(chosen),
        None => adapters_of(wgpu::Backends::PRIMARY),
    };
    if found.is_empty() && wgpu::Backends::from_env().is_none() {
        found = adapters_of(wgpu::Backends::GL);
    }
    found.sort_by_key(|a| match a.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    found
}

fn adapters_of(backends: wgpu::Backends) -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
    descriptor.backends = backends;
    let instance = wgpu::Instance::new(descriptor);
    let mut found = pollster::block_on(instance.enumerate_adapters(backends));
    found.retain(|a| a.get_info().backend != wgpu::Backend::Noop);
    found
}
