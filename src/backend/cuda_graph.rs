//! The nodes of a step on the driver: launched one by one, or as a graph that is built once and then updated.

use super::recorded::{Graphs, Node, Refusal};
use crate::error::{Error, Result};
use cudarc::driver::sys::{
    self, CUDA_KERNEL_NODE_PARAMS, CUDA_MEMCPY3D, CUdeviceptr, CUgraphInstantiate_flags,
    CUmemorytype,
};
use cudarc::driver::{CudaContext, CudaFunction, CudaStream, DriverError, result};
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::{from_ref, null, null_mut};
use std::sync::Arc;

/// Graphs as used here came with this driver.
const DRIVER_FROM: i32 = 12_000;

/// Runs nodes; the device is current for this thread.
pub(super) struct Runner<'a> {
    pub(super) device: &'a str,
    pub(super) driver: i32,
    pub(super) stream: &'a Arc<CudaStream>,
    /// The functions of every entry point that a node names.
    pub(super) functions: &'a HashMap<&'static str, CudaFunction>,
}

/// A chain of nodes, each after the one before, ready to run.
pub(super) struct Graph {
    graph: sys::CUgraph,
    /// Null until it is instantiated.
    exec: sys::CUgraphExec,
    nodes: Vec<sys::CUgraphNode>,
    context: Arc<CudaContext>,
}

// SAFETY: the handles belong to the driver, which takes them from any thread where the context is current; the backend's lock
// lets one thread at a time use them.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // A device that is gone has freed it already.
        let _ = self.context.bind_to_thread();
        if !self.exec.is_null() {
            // SAFETY: made by `instantiate` and destroyed once; a run that is still going on is finished first by the driver.
            let _ = unsafe { result::graph::exec_destroy(self.exec) };
        }
        // SAFETY: made by `cuGraphCreate` and destroyed once, with its nodes.
        let _ = unsafe { result::graph::destroy(self.graph) };
    }
}

fn refused(what: &'static str) -> impl Fn(DriverError) -> Refusal {
    move |e| Refusal::Graph(format!("{what}: {:?}", e.0))
}

/// The arguments of a launch, as the driver wants them: where the parameter block lies, then where each pointer lies.
fn arguments(params: &[u8], bindings: &[CUdeviceptr]) -> Vec<*mut c_void> {
    let pointers = bindings.iter().map(|p| from_ref(p).cast_mut().cast::<c_void>());
    std::iter::once(params.as_ptr().cast_mut().cast()).chain(pointers).collect()
}

/// A copy of `bytes` bytes in a row. Pitches matter only where there is more than one row.
fn copy_params(from: CUdeviceptr, to: CUdeviceptr, bytes: usize) -> CUDA_MEMCPY3D {
    CUDA_MEMCPY3D {
        srcXInBytes: 0,
        srcY: 0,
        srcZ: 0,
        srcLOD: 0,
        srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
        srcHost: null(),
        srcDevice: from,
        srcArray: null_mut(),
        reserved0: null_mut(),
        srcPitch: 0,
        srcHeight: 0,
        dstXInBytes: 0,
        dstY: 0,
        dstZ: 0,
        dstLOD: 0,
        dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: null_mut(),
        dstDevice: to,
        dstArray: null_mut(),
        reserved1: null_mut(),
        dstPitch: 0,
        dstHeight: 0,
        WidthInBytes: bytes,
        Height: 1,
        Depth: 1,
    }
}

/// What a node is to the driver. The pointers in a launch are into `Task::Kernel`'s second part, so it is kept with them.
enum Task {
    Kernel(CUDA_KERNEL_NODE_PARAMS, Vec<*mut c_void>),
    Copy(CUDA_MEMCPY3D),
}

impl Runner<'_> {
    fn function(&self, entry: &'static str) -> Result<sys::CUfunction> {
        let found = self.functions.get(entry).map(CudaFunction::cu_function);
        let lost = || Error::device(self.device, format!("kernel {entry} was never loaded"));
        found.ok_or_else(lost)
    }

    /// `node` must live as long as the task.
    fn task(&self, node: &Node<CUdeviceptr>) -> Result<Task, Refusal> {
        match node {
            Node::Kernel { launch, params, bindings, .. } => {
                let mut arguments = arguments(params, bindings);
                let [x, y, z] = launch.plan.grid;
                let task = CUDA_KERNEL_NODE_PARAMS {
                    func: self.function(launch.entry).map_err(Refusal::Work)?,
                    gridDimX: x,
                    gridDimY: y,
                    gridDimZ: z,
                    blockDimX: launch.plan.block,
                    blockDimY: 1,
                    blockDimZ: 1,
                    sharedMemBytes: launch.plan.shared,
                    kernelParams: arguments.as_mut_ptr(),
                    extra: null_mut(),
                    kern: null_mut(),
                    ctx: null_mut(),
                };
                Ok(Task::Kernel(task, arguments))
            }
            Node::Copy { from, to, bytes } => Ok(Task::Copy(copy_params(*from, *to, *bytes))),
        }
    }

    /// Adds a node after the last one.
    fn add(&self, graph: &mut Graph, node: &Node<CUdeviceptr>) -> Result<(), Refusal> {
        let before = graph.nodes.last().map_or(null(), from_ref);
        let count = usize::from(!before.is_null());
        let mut made = null_mut();
        match self.task(node)? {
            Task::Kernel(task, _arguments) => {
                // SAFETY: the graph and the node before are alive; the driver copies the arguments, which live until it returns.
                unsafe {
                    sys::cuGraphAddKernelNode_v2(&mut made, graph.graph, before, count, &task)
                }
            }
            Task::Copy(task) => {
                let context = self.stream.context().cu_ctx();
                // SAFETY: as above; both ranges lie in memory of this context.
                unsafe {
                    sys::cuGraphAddMemcpyNode(&mut made, graph.graph, before, count, &task, context)
                }
            }
        }
        .result()
        .map_err(refused("a node cannot be added"))?;
        graph.nodes.push(made);
        Ok(())
    }
}

impl Graphs<CUdeviceptr> for Runner<'_> {
    type Graph = Graph;

    fn build(&mut self, nodes: &[Node<CUdeviceptr>]) -> Result<Graph, Refusal> {
        if self.driver < DRIVER_FROM {
            return Err(Refusal::Graph("the driver is older than CUDA 12.0".into()));
        }
        let mut graph = null_mut();
        // SAFETY: the pointer is to a handle of ours.
        unsafe { sys::cuGraphCreate(&mut graph, 0) }
            .result()
            .map_err(refused("no graph can be made"))?;
        let context = self.stream.context().clone();
        let mut graph = Graph { graph, exec: null_mut(), nodes: Vec::new(), context };
        for node in nodes {
            self.add(&mut graph, node)?;
        }
        // SAFETY: the graph is alive. 0: no flag.
        graph.exec =
            unsafe { result::graph::instantiate(graph.graph, CUgraphInstantiate_flags(0)) }
                .map_err(refused("the graph cannot be instantiated"))?;
        Ok(graph)
    }

    fn update(
        &mut self,
        graph: &mut Graph,
        index: usize,
        node: &Node<CUdeviceptr>,
    ) -> Result<(), Refusal> {
        let at = graph.nodes[index];
        match self.task(node)? {
            Task::Kernel(task, _arguments) => {
                // SAFETY: the node is the graph's, alive, and a kernel; the driver copies the arguments. A run that is still
                // going on keeps those it began with.
                unsafe { sys::cuGraphExecKernelNodeSetParams_v2(graph.exec, at, &task) }
            }
            Task::Copy(task) => {
                let context = self.stream.context().cu_ctx();
                // SAFETY: as above, and a copy.
                unsafe { sys::cuGraphExecMemcpyNodeSetParams(graph.exec, at, &task, context) }
            }
        }
        .result()
        .map_err(refused("a node cannot be updated"))
    }

    fn replay(&mut self, graph: &Graph) -> Result<(), Refusal> {
        // SAFETY: graph and stream are alive; the buffers stay until earlier work on the stream is done.
        unsafe { result::graph::launch(graph.exec, self.stream.cu_stream()) }
            .map_err(refused("the graph cannot be launched"))
    }

    fn run(&mut self, node: &Node<CUdeviceptr>) -> Result<()> {
        match node {
            Node::Kernel { launch, params, bindings, .. } => {
                let function = self.function(launch.entry)?;
                let [x, y, z] = launch.plan.grid;
                // SAFETY: the arguments are those of the kernel's text (the emulated device checks their number and sizes),
                // alive until the call returns; the buffers stay until earlier work on the stream is done.
                unsafe {
                    result::launch_kernel(
                        function,
                        (x, y, z),
                        (launch.plan.block, 1, 1),
                        launch.plan.shared,
                        self.stream.cu_stream(),
                        &mut arguments(params, bindings),
                    )
                }
                .map_err(|e| {
                    Error::device(self.device, format!("kernel {}: {:?}", launch.entry, e.0))
                })
            }
            Node::Copy { from, to, bytes } => {
                // SAFETY: both ranges lie in their buffers; ranges of one buffer do not overlap (views are disjoint).
                unsafe { result::memcpy_dtod_async(*to, *from, *bytes, self.stream.cu_stream()) }
                    .map_err(|e| {
                        Error::device(self.device, format!("cannot copy on the device: {:?}", e.0))
                    })
            }
        }
    }
}
