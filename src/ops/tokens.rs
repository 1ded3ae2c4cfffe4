//! Where a vision transformer begins and ends (Dosovitskiy et al. 2021): a class token put before the patches with learned positions
//! added, and the class token taken out again.

use super::case::{Array, Arrays, Case, Layout, OpSpec, Port, Tensors, need};
use super::columns::HALF_WIDE;
use super::reduce::sum_rows;
use crate::Caps;
use crate::cpu::tokens as cpu;
use crate::error::{Error, Result};
use crate::kernel::{
    Access, Cuda, CudaPlan, F32, Kernel, Plan, Stored, cuda_text, params, require_f32,
    require_float,
};
use crate::tape;
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

const EMBED_OP: &str = "embed_tokens";
const FIRST_OP: &str = "first_token";
const WGSL: &str = include_str!("../../shaders/tokens.wgsl");

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct TokenParams {
    pub(crate) images: u32,
    /// With the class token.
    pub(crate) tokens: u32,
    pub(crate) channels: u32,
}

impl TokenParams {
    /// Elements of the outputs of the four kernels.
    fn all(bytes: &[u8]) -> usize {
        let p: Self = params(bytes);
        [p.images, p.tokens, p.channels].iter().map(|&v| v as usize).product()
    }

    fn patches(bytes: &[u8]) -> usize {
        let p: Self = params(bytes);
        [p.images, p.tokens - 1, p.channels].iter().map(|&v| v as usize).product()
    }

    fn first(bytes: &[u8]) -> usize {
        let p: Self = params(bytes);
        p.images as usize * p.channels as usize
    }
}

/// A thread for 16 bytes of the output.
const fn cuda(
    plan: fn(&[u8], &Caps) -> CudaPlan,
    half: fn(&[u8], &Caps) -> CudaPlan,
) -> Option<Cuda> {
    Some(Cuda { text: cuda_text!("tokens"), plan, half: Some(half) })
}

const ALL: Option<Cuda> = cuda(
    |bytes, _| CudaPlan::items(TokenParams::all(bytes), 4, 256),
    |bytes, _| CudaPlan::items(TokenParams::all(bytes), HALF_WIDE, 256),
);

static EMBED_FWD: Kernel = Kernel {
    name: "embed_tokens_fwd_f32",
    bindings: &[
        ("patches", Access::Read, Stored),
        ("cls", Access::Read, F32),
        ("pos", Access::Read, F32),
        ("y", Access::Write, Stored),
    ],
    cpu: cpu::embed_fwd,
    wgsl: WGSL,
    cuda: ALL,
    plan: |bytes, _| Plan::items(TokenParams::all(bytes), 256),
};

static EMBED_BWD: Kernel = Kernel {
    name: "embed_tokens_bwd_f32",
    bindings: &[("dy", Access::Read, Stored), ("dpatches", Access::Write, Stored)],
    cpu: cpu::embed_bwd,
    wgsl: WGSL,
    cuda: cuda(
        |bytes, _| CudaPlan::items(TokenParams::patches(bytes), 4, 256),
        |bytes, _| CudaPlan::items(TokenParams::patches(bytes), HALF_WIDE, 256),
    ),
    plan: |bytes, _| Plan::items(TokenParams::patches(bytes), 256),
};

static FIRST_FWD: Kernel = Kernel {
    name: "first_token_fwd_f32",
    bindings: &[("x", Access::Read, Stored), ("y", Access::Write, Stored)],
    cpu: cpu::first_fwd,
    wgsl: WGSL,
    cuda: cuda(
        |bytes, _| CudaPlan::items(TokenParams::first(bytes), 4, 256),
        |bytes, _| CudaPlan::items(TokenParams::first(bytes), HALF_WIDE, 256),
    ),
    plan: |bytes, _| Plan::items(TokenParams::first(bytes), 256),
};

static FIRST_BWD: Kernel = Kernel {
    name: "first_token_bwd_f32",
    bindings: &[("dy", Access::Read, Stored), ("dx", Access::Write, Stored)],
    cpu: cpu::first_bwd,
    wgsl: WGSL,
    cuda: ALL,
    plan: |bytes, _| Plan::items(TokenParams::all(bytes), 256),
};

/// `y[n, 0] = cls + pos[0]`, `y[n, 1 + t] = patches[n, t] + pos[1 + t]`: patches `[N, T, C]`, cls `[C]`, pos `[T + 1, C]`,
/// y `[N, T + 1, C]`. Gradients for all three; those of cls and pos are sums over the images in a fixed order.
///
/// Patches may be f32, f16 or bf16, and y and their gradient are stored as they are; cls, pos and their gradients are f32.
///
/// # Errors
/// [`Error::Shape`] where shapes or storage do not fit.
pub fn embed_tokens(patches: &Tensor, cls: &Tensor, pos: &Tensor) -> Result<Tensor> {
    require_float(EMBED_OP, "patches", patches)?;
    let [n, t, c] = patches.dims(EMBED_OP, "patches")?;
    for (name, given, wanted) in [("cls", cls, &[c][..]), ("pos", pos, &[t + 1, c])] {
        require_f32(EMBED_OP, name, given)?;
        if given.shape() != wanted {
            let message = format!(
                "{name} must be {wanted:?} for patches {:?}, but it is {:?}",
                patches.shape(),
                given.shape()
            );
            return Err(Error::shape(EMBED_OP, message));
        }
    }
    let p = TokenParams { images: n as u32, tokens: t as u32 + 1, channels: c as u32 };
    let y = Tensor::uninit(patches.device(), &[n, t + 1, c], patches.dtype())?;
    EMBED_FWD.launch(&p, &[patches, cls, pos, &y])?;
    Ok(tape::record(EMBED_OP, &[patches, cls, pos], y, move |dy, needs| {
        let mut grads = vec![None, None, None];
        if needs[0] {
            let dpatches = Tensor::uninit(dy.device(), &[n, t, c], dy.dtype())?;
            EMBED_BWD.launch(&p, &[dy, &dpatches])?;
            grads[0] = Some(dpatches);
        }
        if needs[1] || needs[2] {
            let dpos = sum_rows(&dy.reshape(&[n, (t + 1) * c])?)?;
            grads[1] = Some(dpos.view(0, &[c])?);
            grads[2] = Some(dpos.reshape(&[t + 1, c])?);
        }
        Ok(grads)
    }))
}

/// The class token: `y[n] = x[n, 0]`, `[N, T, C] -> [N, C]`. x may be f32, f16 or bf16; y and dx are stored as it is.
///
/// # Errors
/// [`Error::Shape`] where x has other axes or is u32.
pub fn first_token(x: &Tensor) -> Result<Tensor> {
    require_float(FIRST_OP, "x", x)?;
    let [n, t, c] = x.dims(FIRST_OP, "x")?;
    let p = TokenParams { images: n as u32, tokens: t as u32, channels: c as u32 };
    let y = Tensor::uninit(x.device(), &[n, c], x.dtype())?;
    FIRST_FWD.launch(&p, &[x, &y])?;
    Ok(tape::record(FIRST_OP, &[x], y, move |dy, _| {
        let dx = Tensor::uninit(dy.device(), &[n, t, c], dy.dtype())?;
        FIRST_BWD.launch(&p, &[dy, &dx])?;
        Ok(vec![Some(dx)])
    }))
}

/// Conformance of [`embed_tokens`].
pub(crate) static EMBED: OpSpec = OpSpec {
    name: EMBED_OP,
    inputs: &[
        Port::new("patches", Layout::Plain).stored(),
        Port::new("cls", Layout::Plain),
        Port::new("pos", Layout::Plain),
    ],
    outputs: &[Port::new("y", Layout::Plain).stored()],
    attrs: &[],
    cases: || {
        let case = |label, [n, t, c]: [usize; 3]| {
            Case::new(label)
                .normal("patches", &[n, t, c])
                .normal("cls", &[c])
                .normal("pos", &[t + 1, c])
        };
        vec![
            case("one element", [1, 1, 1]),
            case("odd", [3, 7, 5]),
            case("packs", [2, 9, 8]),
            case("12 channels", [1, 4, 12]),
            case("several workgroups", [5, 33, 24]).no_gradcheck(),
        ]
    },
    run: |_, t: &Tensors| {
        let (patches, cls) = (need(EMBED_OP, t, "patches")?, need(EMBED_OP, t, "cls")?);
        let y = embed_tokens(patches, cls, need(EMBED_OP, t, "pos")?)?;
        Ok(Tensors::from([("y".into(), y)]))
    },
    reference: |_, a: &Arrays| {
        let patches = need(EMBED_OP, a, "patches")?;
        let (cls, pos) = (need(EMBED_OP, a, "cls")?, need(EMBED_OP, a, "pos")?);
        let [n, t, c] = [0, 1, 2].map(|i| patches.shape[i]);
        let mut y = Array::zeros(&[n, t + 1, c]);
        for (i, y) in y.data.iter_mut().enumerate() {
            let (image, token, channel) = (i / c / (t + 1), i / c % (t + 1), i % c);
            let from = match token {
                0 => cls.data[channel],
                _ => patches.get(&[image, token - 1, channel]),
            };
            *y = from + pos.get(&[token, channel]);
        }
        Ok(Arrays::from([("y".into(), y)]))
    },
};

/// Conformance of [`first_token`].
pub(crate) static FIRST: OpSpec = OpSpec {
    name: FIRST_OP,
    inputs: &[Port::new("x", Layout::Plain).stored()],
    outputs: &[Port::new("y", Layout::Plain).stored()],
    attrs: &[],
    cases: || {
        let case = |label, shape: &[usize]| Case::new(label).normal("x", shape);
        vec![
            case("one token", &[3, 1, 7]),
            case("odd", &[2, 5, 3]),
            case("packs", &[3, 7, 8]),
            case("several workgroups", &[9, 33, 12]).no_gradcheck(),
        ]
    },
    run: |_, t: &Tensors| Ok(Tensors::from([("y".into(), first_token(need(FIRST_OP, t, "x")?)?)])),
    reference: |_, a: &Arrays| {
        let x = need(FIRST_OP, a, "x")?;
        let [n, t, c] = [0, 1, 2].map(|i| x.shape[i]);
        let data = x.data.chunks(t * c).flat_map(|image| &image[..c]).copied().collect();
        Ok(Arrays::from([("y".into(), Array { shape: vec![n, c], data })]))
    },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let ones = |shape: &[usize]| Tensor::full(&Device::cpu(), shape, 1.0).unwrap();
        let refused = |patches: &[usize], cls: &[usize], pos: &[usize]| {
            embed_tokens(&ones(patches), &ones(cls), &ones(pos)).expect_err("refused").to_string()
        };
        assert!(refused(&[2, 3, 4], &[3], &[4, 4]).contains("cls must be [4]"));
        assert!(refused(&[2, 3, 4], &[4], &[3, 4]).contains("pos must be [4, 4]"));
        assert!(refused(&[6, 4], &[4], &[3, 4]).contains("3 axes"));
    }
}
