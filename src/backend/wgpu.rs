//! Any GPU through wgpu (Vulkan, Metal, DX12, GL).
//!
//! Launches and copies are queued and go to the GPU in batches: one parameter arena and one submission for up to
//! [`BATCH`] commands. wgpu orders the commands of a queue and puts barriers between dependent dispatches, so pooled
//! memory can be handed out again while earlier commands still wait.

use super::pool::{Pool, size_class};
use super::wgpu_pipelines::{Pipeline, Pipelines};
use super::{Backend, Buffer, Caps, KernelTime, Slot};
use crate::error::{Error, Result};
use crate::kernel::{Element, Kernel, entry_for};
use crate::tensor::DType;
use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Commands a submission holds at most: enough to hide its cost, few enough to keep the GPU fed.
const BATCH: usize = 128;
/// Parameter blocks start at multiples of this (WebGPU's `minUniformBufferOffsetAlignment`).
const PARAM_ALIGN: usize = 256;

/// Which of an adapter's kernels are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variants {
    /// Those that suit it.
    Best,
    /// Those that any adapter can run.
    Base,
    /// Those for hardware, with tiles in workgroup memory.
    Tiled,
}

/// What tiles in workgroup memory take, WebGPU's defaults: bytes, and invocations of a workgroup.
const TILE_BYTES: u32 = 16 << 10;
const TILE_INVOCATIONS: u32 = 256;

pub(crate) struct WgpuBackend {
    caps: Caps,
    device: wgpu::Device,
    queue: wgpu::Queue,
    pool: Arc<Pool<wgpu::Buffer>>,
    staging: Pool<wgpu::Buffer>,
    state: Mutex<State>,
    /// The first error that wgpu reported on its own; later calls return it.
    fault: Arc<Mutex<Option<String>>>,
}

struct State {
    pipelines: Pipelines,
    pending: Vec<Command>,
    arena: wgpu::Buffer,
    params: Vec<u8>,
    profiling: bool,
    profile: Vec<KernelTime>,
}

enum Command {
    Dispatch {
        entry: &'static str,
        pipeline: Arc<Pipeline>,
        group: wgpu::BindGroup,
        /// Where its parameters start in the arena.
        params: u32,
        grid: [u32; 3],
    },
    Copy {
        src: wgpu::Buffer,
        from: u64,
        dst: wgpu::Buffer,
        to: u64,
        bytes: u64,
    },
}

/// GPU memory lent from the pool.
struct Block {
    buffer: wgpu::Buffer,
    pool: Arc<Pool<wgpu::Buffer>>,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.give(self.buffer.size() as usize, self.buffer.clone());
    }
}

pub(super) fn raw(buffer: &Buffer) -> &wgpu::Buffer {
    &buffer.block::<Block>().buffer
}

impl WgpuBackend {
    /// Opens the adapter; `name` is its canonical device string.
    pub(crate) fn open(name: &str, adapter: &wgpu::Adapter, variants: Variants) -> Result<Self> {
        let info = adapter.get_info();
        let offered = adapter.limits();
        // The base kernels need no more than the defaults; what the adapter has beyond them lets models grow and variants be chosen.
        let limits = wgpu::Limits {
            max_storage_buffer_binding_size: offered.max_storage_buffer_binding_size,
            max_buffer_size: offered.max_buffer_size,
            max_compute_workgroup_storage_size: offered.max_compute_workgroup_storage_size,
            max_compute_invocations_per_workgroup: offered.max_compute_invocations_per_workgroup,
            max_compute_workgroup_size_x: offered.max_compute_workgroup_size_x,
            ..wgpu::Limits::downlevel_defaults().using_resolution(offered.clone())
        };
        let limits = wgpu::Limits {
            max_storage_buffers_per_shader_stage: offered
                .max_storage_buffers_per_shader_stage
                .min(8),
            ..limits
        };
        if limits.max_storage_buffers_per_shader_stage < 8 {
            let message = format!(
                "{} offers fewer than the 8 storage buffers that the kernels bind",
                info.name
            );
            return Err(Error::device(name, message));
        }
        let base = wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::SHADER_F16;
        let best = variants == Variants::Best;
        let optional = if best { base | wgpu::Features::SUBGROUP } else { base };
        let features = adapter.features() & optional;
        let request = adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("attn2d"),
            required_features: features,
            required_limits: limits.clone(),
            experimental_features: wgpu::ExperimentalFeatures::disabled(),
            memory_hints: wgpu::MemoryHints::Performance,
            trace: wgpu::Trace::Off,
        });
        let (device, queue) =
            pollster::block_on(request).map_err(|e| Error::device(name, e.to_string()))?;
        let fault = Arc::new(Mutex::new(None));
        let report = fault.clone();
        device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| note(&report, e.to_string())));
        let report = fault.clone();
        device.set_device_lost_callback(move |reason, message| {
            if reason != wgpu::DeviceLostReason::Destroyed {
                note(&report, format!("the device was lost: {message}; start again, on a smaller batch if it ran out of memory"));
            }
        });
        let f16 = features.contains(wgpu::Features::SHADER_F16);
        let software = info.device_type == wgpu::DeviceType::Cpu;
        let fits = limits.max_compute_workgroup_storage_size >= TILE_BYTES
            && limits.max_compute_invocations_per_workgroup >= TILE_INVOCATIONS;
        let caps = Caps {
            name: name.into(),
            adapter: format!(
                "{} ({:?}, {} {})",
                info.name, info.backend, info.driver, info.driver_info
            ),
            software,
            workgroup_memory: limits.max_compute_workgroup_storage_size,
            max_invocations: limits.max_compute_invocations_per_workgroup,
            subgroup: features
                .contains(wgpu::Features::SUBGROUP)
                .then_some((info.subgroup_min_size, info.subgroup_max_size)),
            tiles: fits && (variants == Variants::Tiled || best && !software),
            half: if f16 { &[DType::F16] } else { &[] },
            f16,
            max_binding: limits.max_storage_buffer_binding_size,
            timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
        };
        let arena = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("parameters"),
            size: (BATCH * PARAM_ALIGN) as u64,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let state = State {
            pipelines: Pipelines::new(&device, &arena, caps.subgroup.is_some()),
            pending: Vec::new(),
            arena,
            params: Vec::new(),
            profiling: false,
            profile: Vec::new(),
        };
        Ok(Self {
            caps,
            device,
            queue,
            pool: Arc::new(Pool::new()),
            staging: Pool::new(),
            state: Mutex::new(state),
            fault,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, message: impl Into<String>) -> Error {
        Error::device(&self.caps.name, message)
    }

    /// The error that wgpu reported meanwhile, if any.
    fn healthy(&self) -> Result<()> {
        match &*self.fault.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(message) => Err(self.error(message.clone())),
            None => Ok(()),
        }
    }

    fn new_buffer(&self, bytes: usize, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let invalid = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes as u64,
            usage,
            mapped_at_creation: false,
        });
        let error = pollster::block_on(invalid.pop()).or(pollster::block_on(scope.pop()));
        match error {
            Some(e) => Err(self.error(format!("cannot allocate {bytes} bytes: {e}"))),
            None => Ok(buffer),
        }
    }

    /// Sends what is pending to the GPU.
    fn flush(&self, state: &mut State) -> Result<()> {
        if state.pending.is_empty() {
            return self.healthy();
        }
        self.queue.write_buffer(&state.arena, 0, &state.params);
        state.params.clear();
        let commands = std::mem::take(&mut state.pending);
        if state.profiling {
            self.submit_timed(state, &commands)?;
        } else {
            let mut encoder =
                self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let mut rest = &commands[..];
            while let Some(first) = rest.first() {
                let run = rest
                    .iter()
                    .take_while(|c| matches!(c, Command::Dispatch { .. }))
                    .count()
                    .max(1);
                match first {
                    Command::Copy { src, from, dst, to, bytes } => {
                        encoder.copy_buffer_to_buffer(src, *from, dst, *to, Some(*bytes));
                    }
                    Command::Dispatch { .. } => encode_pass(&mut encoder, &rest[..run], None),
                }
                rest = &rest[run..];
            }
            self.queue.submit([encoder.finish()]);
        }
        self.healthy()
    }

    /// As `flush`, each dispatch in a pass of its own between two timestamps.
    fn submit_timed(&self, state: &mut State, commands: &[Command]) -> Result<()> {
        let count = 2 * commands.len() as u32;
        let queries = self.device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("profile"),
            ty: wgpu::QueryType::Timestamp,
            count,
        });
        let bytes = u64::from(count) * 8;
        let resolved = self.new_buffer(
            bytes as usize,
            wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
        )?;
        let mut encoder =
            self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut entries = Vec::new();
        for command in commands {
            match command {
                Command::Copy { src, from, dst, to, bytes } => {
                    encoder.copy_buffer_to_buffer(src, *from, dst, *to, Some(*bytes));
                }
                Command::Dispatch { entry, .. } => {
                    let at = 2 * entries.len() as u32;
                    entries.push(*entry);
                    encode_pass(&mut encoder, std::slice::from_ref(command), Some((&queries, at)));
                }
            }
        }
        let used = 2 * entries.len() as u32;
        if used > 0 {
            encoder.resolve_query_set(&queries, 0..used, &resolved, 0);
        }
        self.queue.submit([encoder.finish()]);
        let mut ticks = vec![0u64; used as usize];
        if used > 0 {
            self.download(&resolved, 0, bytemuck::cast_slice_mut(&mut ticks))?;
        }
        let period = f64::from(self.queue.get_timestamp_period()) * 1e-9;
        for (entry, t) in entries.into_iter().zip(ticks.chunks_exact(2)) {
            let seconds = t[1].saturating_sub(t[0]) as f64 * period;
            state.profile.push(KernelTime { entry, seconds });
        }
        Ok(())
    }

    /// Copies GPU memory to the host and waits for it. Offset and length are multiples of 4.
    fn download(&self, src: &wgpu::Buffer, offset: u64, out: &mut [u8]) -> Result<()> {
        let class = size_class(out.len());
        let staging = match self.staging.take(class) {
            Some(buffer) => buffer,
            None => {
                self.new_buffer(class, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST)?
            }
        };
        let mut encoder =
            self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(src, offset, &staging, 0, Some(out.len() as u64));
        self.queue.submit([encoder.finish()]);
        let range = ..out.len() as u64;
        let (sender, receiver) = std::sync::mpsc::channel();
        staging.map_async(wgpu::MapMode::Read, range, move |r| {
            // The receiver waits below; it is gone only where polling failed.
            let _ = sender.send(r);
        });
        self.wait()?;
        match receiver.recv() {
            Ok(Ok(())) => {}
            _ => {
                return Err(self
                    .healthy()
                    .err()
                    .unwrap_or_else(|| self.error("cannot read memory back")));
            }
        }
        let view = staging.get_mapped_range(range).map_err(|e| self.error(e.to_string()))?;
        out.copy_from_slice(&view);
        drop(view);
        staging.unmap();
        self.staging.give(class, staging);
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        self.device
            .poll(wgpu::PollType::wait_indefinitely())
            .map_err(|e| self.error(e.to_string()))?;
        self.healthy()
    }
}

fn note(fault: &Mutex<Option<String>>, message: String) {
    fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(message);
}

fn encode_pass(
    encoder: &mut wgpu::CommandEncoder,
    dispatches: &[Command],
    timed: Option<(&wgpu::QuerySet, u32)>,
) {
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
        label: None,
        timestamp_writes: timed.map(|(query_set, at)| wgpu::ComputePassTimestampWrites {
            query_set,
            beginning_of_pass_write_index: Some(at),
            end_of_pass_write_index: Some(at + 1),
        }),
    });
    for command in dispatches {
        if let Command::Dispatch { pipeline, group, params, grid, .. } = command {
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, group, &[*params]);
            pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
        }
    }
}

impl Backend for WgpuBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Any + Send + Sync>> {
        let class = size_class(bytes);
        if bytes as u64 > self.caps.max_binding {
            return Err(self.error(format!(
                "a tensor of {bytes} bytes is larger than this adapter binds ({} bytes); use a smaller batch or image",
                self.caps.max_binding
            )));
        }
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_SRC
            | wgpu::BufferUsages::COPY_DST;
        let buffer = match self.pool.take(class) {
            Some(buffer) => buffer,
            None => self.new_buffer(class, usage).or_else(|_| {
                // Bind groups hold their buffers, and so does work that is not done.
                let mut state = self.state();
                self.flush(&mut state).and_then(|()| self.wait())?;
                state.pipelines.forget_groups();
                self.pool.trim();
                self.new_buffer(class, usage)
            })?,
        };
        Ok(Box::new(Block { buffer, pool: self.pool.clone() }))
    }

    fn write(&self, dst: &Buffer, offset: usize, data: &[u8]) -> Result<()> {
        // The queue writes before the next submission: what is pending must not see the new bytes.
        self.flush(&mut self.state())?;
        let (words, end) = data.split_at(data.len() / 4 * 4);
        if !words.is_empty() {
            self.queue.write_buffer(raw(dst), offset as u64, words);
        }
        if !end.is_empty() {
            // Half of the last word: what stands in the other half stays.
            let at = (offset + words.len()) as u64;
            let mut word = [0; 4];
            self.download(raw(dst), at, &mut word)?;
            word[..end.len()].copy_from_slice(end);
            self.queue.write_buffer(raw(dst), at, &word);
        }
        self.healthy()
    }

    fn read(&self, src: &Buffer, offset: usize, out: &mut [u8]) -> Result<()> {
        self.flush(&mut self.state())?;
        if out.len().is_multiple_of(4) {
            return self.download(raw(src), offset as u64, out);
        }
        let mut words = vec![0; out.len().next_multiple_of(4)];
        self.download(raw(src), offset as u64, &mut words)?;
        out.copy_from_slice(&words[..out.len()]);
        Ok(())
    }

    fn copy(&self, src: &Buffer, from: usize, dst: &Buffer, to: usize, bytes: usize) -> Result<()> {
        if [from, to, bytes].iter().any(|n| !n.is_multiple_of(4)) {
            // The queue copies whole words; an odd number of f16 goes by way of the host.
            let mut data = vec![0; (from % 4 + bytes).next_multiple_of(4)];
            self.read(src, from / 4 * 4, &mut data)?;
            return self.write(dst, to, &data[from % 4..from % 4 + bytes]);
        }
        let mut state = self.state();
        state.pending.push(Command::Copy {
            src: raw(src).clone(),
            from: from as u64,
            dst: raw(dst).clone(),
            to: to as u64,
            bytes: bytes as u64,
        });
        if state.pending.len() >= BATCH { self.flush(&mut state) } else { Ok(()) }
    }

    fn launch(&self, kernel: &'static Kernel, params: &[u8], slots: &[Slot<'_>]) -> Result<()> {
        let plan = (kernel.plan)(params, &self.caps);
        let mut state = self.state();
        let stored = slots.iter().zip(kernel.bindings).find(|(_, b)| b.2 == Element::Stored);
        let stored = stored.map_or(DType::F32, |(slot, _)| slot.dtype);
        let entry = kernel.entry_of(plan.entry);
        let made = state.pipelines.get(kernel, entry, stored);
        let pipeline = made.map_err(|message| self.error(message))?;
        let entry = entry_for(entry, stored);
        let at = state.params.len();
        state.params.extend_from_slice(params);
        state.params.resize(at + params.len().next_multiple_of(PARAM_ALIGN), 0);
        let group = state.pipelines.group(&pipeline, params.len(), slots);
        let params = at as u32;
        state.pending.push(Command::Dispatch { entry, pipeline, group, params, grid: plan.grid });
        let full =
            state.params.len() + PARAM_ALIGN > BATCH * PARAM_ALIGN || state.pending.len() >= BATCH;
        if full { self.flush(&mut state) } else { Ok(()) }
    }

    fn sync(&self) -> Result<()> {
        self.flush(&mut self.state())?;
        self.wait()
    }

    fn set_profiling(&self, on: bool) -> Result<()> {
        if on && !self.caps.timestamps {
            return Err(self.error("this adapter has no timestamp queries"));
        }
        let mut state = self.state();
        self.flush(&mut state)?;
        state.profiling = on;
        Ok(())
    }

    fn take_profile(&self) -> Result<Vec<KernelTime>> {
        let mut state = self.state();
        self.flush(&mut state)?;
        Ok(std::mem::take(&mut state.profile))
    }
}
