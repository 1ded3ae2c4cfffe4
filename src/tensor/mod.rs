//! Tensors: a shape over device memory, with a place on the tape.
//!
//! Tensors are contiguous. Images are NHWC `[N, H, W, C]`, tokens `[N, H, W, heads, d]`, convolution weights `[O, kh, kw, I]`.
//! Only `reshape` and views of a flat parameter buffer share memory; everything else is a kernel with an output of its own.

mod dtype;
mod fill;
pub mod philox;

pub use dtype::DType;
pub(crate) use dtype::{narrow, widen};
pub(crate) use fill::FillParams;

use crate::backend::{Buffer, Device};
use crate::error::{Error, Result};
use crate::tape::{self, Node};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names a tensor for as long as the process lives; later tensors have greater ids, which is the tape's order.
pub(crate) type Id = u64;

/// Views into a flat buffer start at multiples of this many elements: WebGPU binds at multiples of 256 bytes, and numbers may have 2.
pub const ALIGN: usize = 128;

/// A contiguous tensor on a [`Device`]; cheap to clone.
#[derive(Clone)]
pub struct Tensor(Arc<Inner>);

struct Inner {
    id: Id,
    shape: Box<[usize]>,
    dtype: DType,
    buffer: Arc<Buffer>,
    offset: usize,
    /// A leaf that wants a gradient.
    leaf: bool,
    /// How the tensor was computed, where a gradient has to flow back.
    node: Option<Arc<Node>>,
}

fn next_id() -> Id {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The number of elements of a shape, refusing empty tensors and those whose index does not fit 32 bits (WGSL has no more).
fn checked_len(shape: &[usize]) -> Result<usize> {
    let numel = shape.iter().try_fold(1usize, |n, s| n.checked_mul(*s));
    match numel {
        Some(0) => Err(Error::shape("tensor", format!("shape {shape:?} has no elements"))),
        Some(n) if n <= i32::MAX as usize => Ok(n),
        _ => Err(Error::shape(
            "tensor",
            format!(
                "shape {shape:?} has more than 2^31 - 1 elements; use a smaller batch or image"
            ),
        )),
    }
}

impl Tensor {
    fn build(shape: &[usize], dtype: DType, buffer: Arc<Buffer>, offset: usize) -> Self {
        Self(Arc::new(Inner {
            id: next_id(),
            shape: shape.into(),
            dtype,
            buffer,
            offset,
            leaf: false,
            node: None,
        }))
    }

    /// A tensor whose elements are not yet written.
    ///
    /// # Errors
    /// [`Error::Shape`] for a shape with no or too many elements, [`Error::Device`] when memory runs out.
    pub fn uninit(device: &Device, shape: &[usize], dtype: DType) -> Result<Self> {
        let numel = checked_len(shape)?;
        let (buffer, offset) = device.alloc(numel * dtype.bytes())?;
        Ok(Self::build(shape, dtype, buffer, offset))
    }

    /// An f32 tensor whose elements are not yet written: what a kernel's output starts as.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn empty(device: &Device, shape: &[usize]) -> Result<Self> {
        Self::uninit(device, shape, DType::F32)
    }

    /// A tensor of this one's shape, dtype and device whose elements are not yet written.
    ///
    /// # Errors
    /// [`Error::Device`] when memory runs out.
    pub fn empty_like(&self) -> Result<Self> {
        Self::uninit(self.device(), self.shape(), self.dtype())
    }

    /// A tensor with the given elements, row-major.
    ///
    /// # Errors
    /// [`Error::Shape`] where `data` does not fill `shape`; else as [`Tensor::uninit`].
    pub fn from_f32(device: &Device, shape: &[usize], data: &[f32]) -> Result<Self> {
        Self::from_slice(device, shape, DType::F32, data)
    }

    /// A tensor with the given elements, row-major, each rounded to the nearest that `dtype` (f32, f16 or bf16) has.
    ///
    /// # Errors
    /// As [`Tensor::from_f32`], and [`Error::Shape`] where `dtype` is u32.
    pub fn from_f32_as(
        device: &Device,
        shape: &[usize],
        dtype: DType,
        data: &[f32],
    ) -> Result<Self> {
        match dtype {
            DType::F32 => Self::from_f32(device, shape, data),
            DType::U32 => Err(Error::shape(
                "tensor",
                "f32 elements cannot be stored as u32; use Tensor::from_u32",
            )),
            DType::F16 | DType::BF16 => {
                let mut bits = vec![0u16; data.len()];
                narrow(dtype, data, &mut bits);
                Self::from_slice(device, shape, dtype, &bits)
            }
        }
    }

    /// A tensor of labels or indices.
    ///
    /// # Errors
    /// As [`Tensor::from_f32`].
    pub fn from_u32(device: &Device, shape: &[usize], data: &[u32]) -> Result<Self> {
        Self::from_slice(device, shape, DType::U32, data)
    }

    fn from_slice<T: bytemuck::Pod>(
        device: &Device,
        shape: &[usize],
        dtype: DType,
        data: &[T],
    ) -> Result<Self> {
        let numel = checked_len(shape)?;
        if data.len() != numel {
            let message =
                format!("shape {shape:?} holds {numel} elements, but {} were given", data.len());
            return Err(Error::shape("tensor", message));
        }
        let t = Self::uninit(device, shape, dtype)?;
        device.backend().write(t.buffer(), t.offset(), bytemuck::cast_slice(data))?;
        Ok(t)
    }

    /// A tensor of equal elements.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn full(device: &Device, shape: &[usize], value: f32) -> Result<Self> {
        let t = Self::empty(device, shape)?;
        fill::fill(&t, value)?;
        Ok(t)
    }

    /// A tensor of equal elements, of this one's shape, dtype and device.
    ///
    /// # Errors
    /// As [`Tensor::empty_like`].
    pub fn full_like(&self, value: f32) -> Result<Self> {
        let t = self.empty_like()?;
        fill::fill(&t, value)?;
        Ok(t)
    }

    /// A tensor of zeros.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn zeros(device: &Device, shape: &[usize]) -> Result<Self> {
        Self::full(device, shape, 0.0)
    }

    /// Standard normal elements from a counter-based stream: the same on every device.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn randn(device: &Device, shape: &[usize], stream: philox::Philox) -> Result<Self> {
        let data: Vec<f32> = (0..checked_len(shape)? as u64).map(|i| stream.normal(i)).collect();
        Self::from_f32(device, shape, &data)
    }

    /// The part of a flat tensor that starts at element `start`, as a leaf of its own that shares the memory.
    /// `start` must be a multiple of [`ALIGN`].
    ///
    /// # Errors
    /// [`Error::Shape`] where the range does not lie inside the flat tensor or is not aligned.
    pub fn view(&self, start: usize, shape: &[usize]) -> Result<Self> {
        let numel = checked_len(shape)?;
        if start + numel > self.numel() || !start.is_multiple_of(ALIGN) {
            let message = format!(
                "a view of {numel} elements at {start} does not fit a tensor of {} (starts are multiples of {ALIGN})",
                self.numel()
            );
            return Err(Error::shape("view", message));
        }
        let offset = self.offset() + start * self.dtype().bytes();
        Ok(Self::build(shape, self.dtype(), self.0.buffer.clone(), offset))
    }

    /// Sizes along each axis, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// The shape as an array.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `op` and `name` where the tensor has another number of axes.
    pub fn dims<const R: usize>(&self, op: &'static str, name: &str) -> Result<[usize; R]> {
        self.shape().try_into().map_err(|_| {
            Error::shape(
                op,
                format!("{name} must have {R} axes, but its shape is {:?}", self.shape()),
            )
        })
    }

    /// The number of elements.
    pub fn numel(&self) -> usize {
        self.shape().iter().product()
    }

    /// How the elements are stored.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// Where the tensor lives.
    pub fn device(&self) -> &Device {
        self.0.buffer.device()
    }

    pub(crate) fn id(&self) -> Id {
        self.0.id
    }

    pub(crate) fn buffer(&self) -> &Buffer {
        &self.0.buffer
    }

    /// Bytes from the start of the buffer.
    pub(crate) fn offset(&self) -> usize {
        self.0.offset
    }

    pub(crate) fn node(&self) -> Option<&Arc<Node>> {
        self.0.node.as_ref()
    }

    /// Whether a gradient has to flow into this tensor.
    pub fn wants_grad(&self) -> bool {
        self.0.leaf || self.0.node.is_some()
    }

    /// The same memory as a leaf that wants a gradient ([`crate::tape::Gradients::get`] finds it by this handle).
    pub fn requires_grad(&self) -> Self {
        self.with(true, None)
    }

    /// The same memory off the tape: no gradient flows through it.
    pub fn detach(&self) -> Self {
        self.with(false, None)
    }

    pub(crate) fn with_node(&self, node: Arc<Node>) -> Self {
        self.with(false, Some(node))
    }

    fn with(&self, leaf: bool, node: Option<Arc<Node>>) -> Self {
        Self(Arc::new(Inner {
            id: next_id(),
            shape: self.0.shape.clone(),
            dtype: self.0.dtype,
            buffer: self.0.buffer.clone(),
            offset: self.0.offset,
            leaf,
            node,
        }))
    }

    /// The same elements under another shape; no copy.
    ///
    /// # Errors
    /// [`Error::Shape`] where the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if checked_len(shape)? != self.numel() {
            let message = format!(
                "{:?} has {} elements, {shape:?} has another number",
                self.shape(),
                self.numel()
            );
            return Err(Error::shape("reshape", message));
        }
        let y = Self::build(shape, self.dtype(), self.0.buffer.clone(), self.offset());
        let from = self.0.shape.clone();
        Ok(tape::record("reshape", &[self], y, move |dy, _| Ok(vec![Some(dy.reshape(&from)?)])))
    }

    /// Copies the elements to the host; those in half precision are widened, which changes no value.
    ///
    /// # Errors
    /// [`Error::Shape`] for a tensor of u32, [`Error::Device`] when the device is lost.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match self.dtype().is_half() {
            true => Ok(widen(self.dtype(), &self.to_host(self.dtype())?)),
            false => self.to_host(DType::F32),
        }
    }

    /// Copies labels or indices to the host.
    ///
    /// # Errors
    /// As [`Tensor::to_f32`].
    pub fn to_u32(&self) -> Result<Vec<u32>> {
        self.to_host(DType::U32)
    }

    fn to_host<T: bytemuck::Pod>(&self, dtype: DType) -> Result<Vec<T>> {
        if self.dtype() != dtype {
            let message =
                format!("the tensor is {}, not {}", self.dtype().suffix(), dtype.suffix());
            return Err(Error::shape("to_host", message));
        }
        let mut data = vec![T::zeroed(); self.numel()];
        self.device().backend().read(
            self.buffer(),
            self.offset(),
            bytemuck::cast_slice_mut(&mut data),
        )?;
        Ok(data)
    }

    /// The value of a tensor with one element.
    ///
    /// # Errors
    /// [`Error::Shape`] where there are more elements.
    pub fn item(&self) -> Result<f32> {
        if self.numel() != 1 {
            return Err(Error::shape(
                "item",
                format!("shape {:?} has more than one element", self.shape()),
            ));
        }
        Ok(self.to_f32()?[0])
    }

    /// A copy on another device (off the tape).
    ///
    /// # Errors
    /// [`Error::Device`] when memory runs out or a device is lost.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let mut bytes = vec![0u8; self.numel() * self.dtype().bytes()];
        self.device().backend().read(self.buffer(), self.offset(), &mut bytes)?;
        let t = Self::uninit(device, self.shape(), self.dtype())?;
        device.backend().write(t.buffer(), t.offset(), &bytes)?;
        Ok(t)
    }

    /// Overwrites the elements from `source`, on the device, in place. For parameters and gradients in flat buffers: a
    /// tensor that the tape has saved must not be changed before `backward`.
    ///
    /// # Errors
    /// [`Error::Shape`] where number of elements, dtype or device differ.
    pub fn copy_from(&self, source: &Self) -> Result<()> {
        self.copy_range_from(0, source)
    }

    /// As [`Tensor::copy_from`], into the elements from `start` on.
    ///
    /// # Errors
    /// As [`Tensor::copy_from`].
    pub fn copy_range_from(&self, start: usize, source: &Self) -> Result<()> {
        let fits = start + source.numel() <= self.numel()
            && self.dtype() == source.dtype()
            && self.device().same(source.device());
        if !fits {
            let message = format!(
                "cannot copy {:?} {} on {} to element {start} of {:?} {} on {}",
                source.shape(),
                source.dtype().suffix(),
                source.device().name(),
                self.shape(),
                self.dtype().suffix(),
                self.device().name()
            );
            return Err(Error::shape("copy_from", message));
        }
        let size = self.dtype().bytes();
        self.device().backend().copy(
            source.buffer(),
            source.offset(),
            self.buffer(),
            self.offset() + start * size,
            source.numel() * size,
        )
    }

    /// Overwrites the elements from the host, in place.
    ///
    /// # Errors
    /// [`Error::Shape`] where `data` does not fill the tensor or it is not f32.
    pub fn write_f32(&self, data: &[f32]) -> Result<()> {
        if data.len() != self.numel() || self.dtype() != DType::F32 {
            let message = format!(
                "{} numbers do not fill {:?} {}",
                data.len(),
                self.shape(),
                self.dtype().suffix()
            );
            return Err(Error::shape("write", message));
        }
        self.device().backend().write(self.buffer(), self.offset(), bytemuck::cast_slice(data))
    }
}

impl Device {
    /// A tiny tensor to bind where an optional input of a kernel is absent.
    ///
    /// # Errors
    /// [`Error::Device`] when memory runs out.
    pub fn none(&self) -> Result<Tensor> {
        Tensor::empty(self, &[4])
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Tensor({:?} {} on {})",
            self.shape(),
            self.dtype().suffix(),
            self.device().name()
        )
    }
}
