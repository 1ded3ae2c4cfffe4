//! CPU kernels of [`crate::ops::tokens`].

use super::rows;
use crate::kernel::CpuArgs;
use crate::ops::tokens::TokenParams;

/// `rows_of!(y, c, |row, y| ..)`: for every row of `c` elements, with its number.
macro_rules! rows_of {
    ($y:expr, $c:expr, |$row:ident, $one:ident| $f:expr) => {{
        let (y, c): (&mut [f32], usize) = ($y, $c);
        let (slab, size) = (rows::slab_len(c), y.len());
        rows::each!(y, slab, size, |number, y| {
            for (r, $one) in y.chunks_exact_mut(c).enumerate() {
                let $row = number * (slab / c) + r;
                $f
            }
        });
    }};
}

/// `patches, cls, pos -> y`.
pub(crate) fn embed_fwd(a: &CpuArgs<'_>) {
    let p: TokenParams = a.params();
    let (tokens, c) = (p.tokens as usize, p.channels as usize);
    let (patches, cls, pos) = (a.f32(0), a.f32(1), a.f32(2));
    rows_of!(a.f32_mut(3), c, |row, y| {
        let (image, token) = (row / tokens, row % tokens);
        let from = match token {
            0 => cls,
            _ => &patches[(image * (tokens - 1) + token - 1) * c..],
        };
        for ((y, &x), &pos) in y.iter_mut().zip(from).zip(&pos[token * c..]) {
            *y = x + pos;
        }
    });
}

/// `dy -> dpatches`: all but the first token of each image.
pub(crate) fn embed_bwd(a: &CpuArgs<'_>) {
    let p: TokenParams = a.params();
    let (patches, c) = (p.tokens as usize - 1, p.channels as usize);
    let dy = a.f32(0);
    rows_of!(a.f32_mut(1), c, |row, dx| {
        dx.copy_from_slice(&dy[(row + row / patches + 1) * c..][..c]);
    });
}

/// `x -> y`: the first token of each image.
pub(crate) fn first_fwd(a: &CpuArgs<'_>) {
    let p: TokenParams = a.params();
    let (tokens, c) = (p.tokens as usize, p.channels as usize);
    let x = a.f32(0);
    rows_of!(a.f32_mut(1), c, |row, y| y.copy_from_slice(&x[row * tokens * c..][..c]));
}

/// `dy -> dx`: zero for all other tokens.
pub(crate) fn first_bwd(a: &CpuArgs<'_>) {
    let p: TokenParams = a.params();
    let (tokens, c) = (p.tokens as usize, p.channels as usize);
    let dy = a.f32(0);
    rows_of!(a.f32_mut(1), c, |row, dx| match row % tokens {
        0 => dx.copy_from_slice(&dy[row / tokens * c..][..c]),
        _ => dx.fill(0.0),
    });
}
