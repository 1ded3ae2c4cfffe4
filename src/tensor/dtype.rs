//! Element types.

use half::{bf16, f16};

/// How the elements of a tensor are stored. Sums, softmax, norms and losses are computed in f32 whatever the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision: 11 significant bits, at most 65,504.
    F16,
    /// bfloat16: 8 significant bits, the range of f32.
    BF16,
    /// Unsigned 32-bit integers: class labels, saved indices.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Whether it holds real numbers.
    pub const fn is_float(self) -> bool {
        !matches!(self, Self::U32)
    }

    /// Whether it is one of the 16-bit types.
    pub const fn is_half(self) -> bool {
        matches!(self, Self::F16 | Self::BF16)
    }

    /// The largest relative error of rounding a number to this type (normal range): half a unit in the last place.
    pub const fn epsilon(self) -> f64 {
        match self {
            Self::F32 => 1.0 / (1u64 << 24) as f64,
            Self::F16 => 1.0 / (1u64 << 11) as f64,
            Self::BF16 => 1.0 / (1u64 << 8) as f64,
            Self::U32 => 0.0,
        }
    }

    /// The suffix of kernel entry points: `f32`, `f16`, `bf16`, `u32`.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::U32 => "u32",
        }
    }
}

/// Numbers of their 16-bit patterns; `dtype` is f16 or bf16.
pub(crate) fn widen(dtype: DType, bits: &[u16]) -> Vec<f32> {
    match dtype {
        DType::F16 => bits.iter().map(|b| f16::from_bits(*b).to_f32()).collect(),
        _ => bits.iter().map(|b| bf16::from_bits(*b).to_f32()).collect(),
    }
}

/// The 16-bit patterns of the nearest f16 or bf16 numbers, ties to even.
pub(crate) fn narrow(dtype: DType, numbers: &[f32], bits: &mut [u16]) {
    for (bits, x) in bits.iter_mut().zip(numbers) {
        *bits = match dtype {
            DType::F16 => f16::from_f32(*x).to_bits(),
            _ => bf16::from_f32(*x).to_bits(),
        };
    }
}
