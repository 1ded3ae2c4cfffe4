//! What wgpu has to be given for a launch, made once and kept: shader modules, pipelines, bind groups.
//!
//! No pipeline cache on disk: the drivers of desktops and servers keep their own.

use super::wgpu::raw;
use super::{Slot, wgsl_half};
use crate::kernel::{Access, Kernel, entry_for};
use crate::tensor::DType;
use std::collections::HashMap;
use std::sync::Arc;

/// Bind groups that are kept: several times what the training step of a deep network uses.
const GROUPS: usize = 16 << 10;

/// A kernel's entry point, ready for its tensors.
pub(super) struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

/// Where a text lies, or a pipeline: compared, never followed.
type Address = usize;

pub(super) struct Pipelines {
    device: wgpu::Device,
    /// Parameter blocks, bound at offsets that the dispatches give.
    arena: wgpu::Buffer,
    subgroups: bool,
    /// A text holds many kernels and is read once; in f16 it is rewritten for each kernel's bindings, which its name tells.
    modules: HashMap<(Address, &'static str), wgpu::ShaderModule>,
    made: HashMap<(Address, &'static str, DType), Arc<Pipeline>>,
    /// What a step binds it binds again in the next: by pipeline and the ranges bound. Made anew it takes 3 to 5 microseconds on the
    /// host, found here 0.4 to 0.6 (llvmpipe, one core of a busy server).
    groups: HashMap<(Address, Vec<Range>), wgpu::BindGroup>,
}

/// A bound part of a buffer, in bytes.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Range {
    buffer: wgpu::Buffer,
    offset: u64,
    bytes: u64,
}

impl Range {
    fn of(slot: &Slot<'_>) -> Self {
        // An odd number of f16 ends inside a word, which belongs to the tensor.
        let bytes = slot.bytes.next_multiple_of(4) as u64;
        Self { buffer: raw(slot.buffer).clone(), offset: slot.offset as u64, bytes }
    }

    fn resource(&self) -> wgpu::BindingResource<'_> {
        wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: &self.buffer,
            offset: self.offset,
            size: std::num::NonZeroU64::new(self.bytes),
        })
    }
}

impl Pipelines {
    pub(super) fn new(device: &wgpu::Device, arena: &wgpu::Buffer, subgroups: bool) -> Self {
        Self {
            device: device.clone(),
            arena: arena.clone(),
            subgroups,
            modules: HashMap::new(),
            made: HashMap::new(),
            groups: HashMap::new(),
        }
    }

    /// The pipeline of a kernel's entry point for tensors stored so.
    ///
    /// # Errors
    /// What the compiler says, with the kernel's name.
    pub(super) fn get(
        &mut self,
        kernel: &'static Kernel,
        entry: &'static str,
        stored: DType,
    ) -> Result<Arc<Pipeline>, String> {
        let text = kernel.wgsl.as_ptr() as Address;
        if let Some(found) = self.made.get(&(text, entry, stored)) {
            return Ok(found.clone());
        }
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let rewritten_for = if stored == DType::F32 { "" } else { kernel.name };
        let module = self.modules.entry((text, rewritten_for)).or_insert_with(|| {
            let text = wgsl_half::source(kernel, stored, self.subgroups);
            self.device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some(entry),
                source: wgpu::ShaderSource::Wgsl(text.into()),
            })
        });
        let layout = self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(entry),
            entries: &layout_entries(kernel),
        });
        let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(entry),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(entry),
            layout: Some(&pipeline_layout),
            module,
            entry_point: Some(entry),
            // No kernel reads workgroup memory that it has not written.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        if let Some(e) = pollster::block_on(scope.pop()) {
            return Err(format!("kernel {} does not compile: {e}", entry_for(entry, stored)));
        }
        let made = Arc::new(Pipeline { pipeline, layout });
        self.made.insert((text, entry, stored), made.clone());
        Ok(made)
    }

    /// The bind group of a launch whose parameter block has so many bytes.
    pub(super) fn group(
        &mut self,
        pipeline: &Arc<Pipeline>,
        params: usize,
        slots: &[Slot<'_>],
    ) -> wgpu::BindGroup {
        let key = (Arc::as_ptr(pipeline) as Address, slots.iter().map(Range::of).collect());
        if let Some(found) = self.groups.get(&key) {
            return found.clone();
        }
        let bytes = params.next_multiple_of(16) as u64;
        let arena = Range { buffer: self.arena.clone(), offset: 0, bytes };
        let entries: Vec<_> = std::iter::once(&arena)
            .chain(&key.1)
            .zip(0..)
            .map(|(range, binding)| wgpu::BindGroupEntry { binding, resource: range.resource() })
            .collect();
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.layout,
            entries: &entries,
        });
        if self.groups.len() >= GROUPS {
            self.groups.clear();
        }
        self.groups.insert(key, group.clone());
        group
    }

    /// Lets go of the buffers that kept groups hold.
    pub(super) fn forget_groups(&mut self) {
        self.groups.clear();
    }
}

/// The parameter block, then the kernel's bindings.
fn layout_entries(kernel: &Kernel) -> Vec<wgpu::BindGroupLayoutEntry> {
    let entry = |binding: usize, ty, has_dynamic_offset| wgpu::BindGroupLayoutEntry {
        binding: binding as u32,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size: None },
        count: None,
    };
    let storage = kernel.bindings.iter().enumerate().map(|(i, (_, access, _))| {
        let read_only = *access == Access::Read;
        entry(i + 1, wgpu::BufferBindingType::Storage { read_only }, false)
    });
    std::iter::once(entry(0, wgpu::BufferBindingType::Uniform, true)).chain(storage).collect()
}
