//! Element types.

/// How the elements of a tensor are stored. Sums, softmax, norms and losses are computed in f32 whatever the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision: the type of every kernel today.
    F32,
    /// IEEE half precision; storage only, for mixed precision.
    F16,
    /// bfloat16; storage only, for mixed precision.
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
