//! A device of tensors that have shapes and no memory: to build a net, count it and name its parts, however large it is.

use super::{Backend, Buffer, Caps, KernelTime, Slot};
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use std::any::Any;

struct ShapesBackend(Caps);

/// A device on which making and writing a tensor costs nothing, and reading or computing is an error.
pub(super) fn backend() -> Box<dyn Backend> {
    Box::new(ShapesBackend(Caps {
        name: "shapes".into(),
        adapter: "no memory".into(),
        software: true,
        workgroup_memory: 0,
        max_invocations: 1,
        subgroup: None,
        tiles: false,
        f16: false,
        half: &[],
        max_binding: u64::MAX,
        timestamps: false,
    }))
}

impl ShapesBackend {
    fn refuse<T>(&self) -> Result<T> {
        let message = "tensors have shapes only; build the model on a device such as cpu";
        Err(Error::device(&self.0.name, message))
    }
}

impl Backend for ShapesBackend {
    fn caps(&self) -> &Caps {
        &self.0
    }

    fn alloc(&self, _: usize) -> Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new(()))
    }

    fn write(&self, _: &Buffer, _: usize, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn read(&self, _: &Buffer, _: usize, _: &mut [u8]) -> Result<()> {
        self.refuse()
    }

    fn copy(&self, _: &Buffer, _: usize, _: &Buffer, _: usize, _: usize) -> Result<()> {
        self.refuse()
    }

    fn launch(&self, _: &'static Kernel, _: &[u8], _: &[Slot<'_>]) -> Result<()> {
        self.refuse()
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn set_profiling(&self, _: bool) -> Result<()> {
        self.refuse()
    }

    fn take_profile(&self) -> Result<Vec<KernelTime>> {
        self.refuse()
    }
}
