//! Between f32 and the 16-bit types: where mixed precision begins and ends.

use super::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use crate::cpu::cast as cpu;
use crate::error::{Error, Result};
use crate::kernel::{
    Access, Cuda, CudaPlan, F32, Kernel, Plan, Stored, cuda_text, params, require_float,
};
use crate::tape;
use crate::tensor::{DType, Tensor, narrow, widen};
use bytemuck::{Pod, Zeroable};

const OP: &str = "cast";

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CastParams {
    len: u32,
}

const CUDA: Option<Cuda> = Some(Cuda {
    text: cuda_text!("cast"),
    half: None,
    plan: |bytes, _| CudaPlan::items(params::<CastParams>(bytes).len as usize, 4, 256),
});

static TO: Kernel = Kernel {
    name: "cast_to_f32",
    bindings: &[("x", Access::Read, F32), ("y", Access::Write, Stored)],
    cpu: cpu::copy,
    wgsl: include_str!("../../shaders/cast.wgsl"),
    cuda: CUDA,
    plan: |bytes, _| Plan::items(params::<CastParams>(bytes).len as usize, 256),
};

static FROM: Kernel = Kernel {
    name: "cast_from_f32",
    bindings: &[("x", Access::Read, Stored), ("y", Access::Write, F32)],
    cpu: cpu::copy,
    wgsl: include_str!("../../shaders/cast.wgsl"),
    cuda: CUDA,
    plan: |bytes, _| Plan::items(params::<CastParams>(bytes).len as usize, 256),
};

/// The same numbers stored as `dtype`, each rounded to the nearest it has (ties to even; beyond f16's range to infinity). A
/// tensor that is stored so already is returned as it is. Any shape; the gradient is stored as x is.
///
/// # Errors
/// [`Error::Shape`] from or to u32, [`Error::Device`] on a device whose kernels do not have the type ([`crate::Caps::half`]).
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    require_float(OP, "x", x)?;
    if !dtype.is_float() {
        return Err(Error::shape(
            OP,
            "numbers cannot be cast to u32; Tensor::from_u32 makes labels",
        ));
    }
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    let from = x.dtype();
    let y = convert(x, dtype)?;
    Ok(tape::record(OP, &[x], y, move |dy, _| Ok(vec![Some(convert(dy, from)?)])))
}

/// Off the tape; from one 16-bit type to the other by way of f32, which has all numbers of both.
fn convert(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.dtype() == dtype {
        return Ok(x.detach());
    }
    if x.dtype().is_half() && dtype.is_half() {
        return convert(&convert(x, DType::F32)?, dtype);
    }
    let y = Tensor::uninit(x.device(), x.shape(), dtype)?;
    let kernel = if dtype == DType::F32 { &FROM } else { &TO };
    kernel.launch(&CastParams { len: x.numel() as u32 }, &[x, &y])?;
    Ok(y)
}

fn target(attrs: &Attrs) -> Result<DType> {
    match attrs.str("to", "f16")?.as_str() {
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        other => {
            Err(Error::usage(format!("attribute 'to' is '{other}', expected 'f16' or 'bf16'")))
        }
    }
}

/// Conformance of [`cast`]: there, and back to the storage of x.
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[Port::new("x", Layout::Plain).half_only()],
    outputs: &[Port::new("y", Layout::Plain)],
    attrs: &["to"],
    cases: || {
        let case = |label, shape: &[usize]| Case::new(label).normal("x", shape).no_gradcheck();
        vec![
            case("one element", &[1]),
            case("odd", &[3, 5, 7]),
            case("past a block", &[2, 17, 65]),
            case("bf16 between", &[129])
                .attr("to", "bf16")
                .only_where(|caps| caps.half.contains(&DType::BF16)),
        ]
    },
    run: |attrs, t: &Tensors| {
        let x = need(OP, t, "x")?;
        let there = cast(x, target(attrs)?)?;
        Ok(Tensors::from([("y".into(), cast(&there, DType::F32)?)]))
    },
    reference: |attrs, a: &Arrays| {
        let x = need(OP, a, "x")?;
        let numbers: Vec<f32> = x.data.iter().map(|v| *v as f32).collect();
        let mut bits = vec![0u16; numbers.len()];
        narrow(target(attrs)?, &numbers, &mut bits);
        let data = widen(target(attrs)?, &bits).into_iter().map(f64::from).collect();
        Ok(Arrays::from([("y".into(), Array { shape: x.shape.clone(), data })]))
    },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    /// Every number of both types, numbers between and beyond them, as the `half` crate rounds them.
    #[test]
    fn every_device_rounds_to_nearest_even() {
        let mut x: Vec<f32> = (0..=u16::MAX)
            .flat_map(|b| [half::f16::from_bits(b).to_f32(), half::bf16::from_bits(b).to_f32()])
            .flat_map(|v| [v, v * 1.000_244_1, v * 1.001_953_1, f32::from_bits(v.to_bits() ^ 1)])
            .filter(|v| !v.is_nan())
            .collect();
        x.extend([
            65_519.0,
            65_520.0,
            -65_520.0,
            6e-8,
            2.9e-8,
            3.0e-8,
            f32::MAX,
            f32::MIN_POSITIVE,
        ]);
        let mut devices = vec![Device::cpu()];
        if cfg!(feature = "cuda-emu") {
            devices.push(Device::new("cuda-emu").unwrap());
        }
        for device in &devices {
            let tensor = Tensor::from_f32(device, &[x.len()], &x).unwrap();
            for dtype in [DType::F16, DType::BF16] {
                let mut bits = vec![0u16; x.len()];
                narrow(dtype, &x, &mut bits);
                let y = cast(&tensor, dtype).unwrap();
                assert_eq!(y.to_f32().unwrap(), widen(dtype, &bits), "{} {dtype:?}", device.name());
                assert_eq!(cast(&y, DType::F32).unwrap().to_f32().unwrap(), y.to_f32().unwrap());
            }
        }
    }

    #[test]
    fn labels_are_no_numbers() {
        let labels = Tensor::from_u32(&Device::cpu(), &[2], &[0, 1]).unwrap();
        let message = cast(&labels, DType::F16).unwrap_err().to_string();
        assert!(message.contains("x must be f32, f16 or bf16, but it is u32"), "{message}");
        let x = Tensor::zeros(&Device::cpu(), &[2]).unwrap();
        assert!(cast(&x, DType::U32).unwrap_err().to_string().contains("cannot be cast to u32"));
    }
}
