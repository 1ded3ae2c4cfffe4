//! Run a closure compiled for the vector unit of the CPU at hand.
//!
//! Cargo builds for the oldest CPU of an architecture, so a plain loop gets 4-wide vectors and no fused multiply-add. [`vectorise!`] compiles what it
//! is given a second time with AVX2 and FMA and picks that version where the CPU has them.

/// `vectorise!(|| ..)` calls the closure, compiled with AVX2 and FMA where the CPU has both.
///
/// What the closure calls is compiled that way only if it is inlined: mark inner functions `#[inline(always)]`. The compiler does not reorder float
/// sums: keep explicit lanes (`[f32; 8]`) where a sum should be vectorised. `f32::mul_add` is one instruction inside, and a slow library call on an
/// x86-64 CPU without FMA (any since 2013 has it).
///
/// A macro, because the closure has to be written out once for each version: a closure with two callers that is not small is not inlined into
/// either, and then runs without AVX2 (seen: attention's backward 2x slower, every `mul_add` a call).
macro_rules! vectorise {
    ($work:expr) => {{
        #[cfg(target_arch = "x86_64")]
        if $crate::cpu::simd::has_avx2_fma() {
            // SAFETY: the two features were just detected.
            unsafe { $crate::cpu::simd::with_avx2_fma($work) }
        } else {
            ($work)()
        }
        #[cfg(not(target_arch = "x86_64"))]
        ($work)()
    }};
}
pub(crate) use vectorise;

/// `vector_fn! { fn name(x: T, ..) -> R { .. } }` (or `fn name<const C: u32>(..)`) defines a function whose body is compiled twice, as by [`vectorise!`], and
/// which picks the version for the CPU at hand. For bodies too long for a closure to be inlined.
macro_rules! vector_fn {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<const $constant:ident: u32>)? ($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)?
        $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name $(<const $constant: u32>)? ($($arg: $type),*) $(-> $out)? {
            #[inline(always)]
            fn any $(<const $constant: u32>)? ($($arg: $type),*) $(-> $out)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn fast $(<const $constant: u32>)? ($($arg: $type),*) $(-> $out)? {
                    any $(::<$constant>)? ($($arg),*)
                }
                if $crate::cpu::simd::has_avx2_fma() {
                    // SAFETY: the two features were just detected.
                    return unsafe { fast $(::<$constant>)? ($($arg),*) };
                }
            }
            any $(::<$constant>)? ($($arg),*)
        }
    };
}
pub(crate) use vector_fn;

/// Whether this CPU has AVX2 and FMA (asked once, then cached by the standard library).
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn has_avx2_fma() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// The fast version of [`vectorise!`]; unsafe to call where the CPU lacks the features.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn with_avx2_fma<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// What [`vectorise!`] uses here, in words.
pub(crate) fn description() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    return if has_avx2_fma() { "AVX2 + FMA" } else { "SSE2 (no AVX2: slow)" };
    #[cfg(not(target_arch = "x86_64"))]
    std::env::consts::ARCH
}

#[cfg(test)]
mod tests {
    #[test]
    fn returns_what_the_closure_returns() {
        let x: Vec<f32> = (0..100).map(|i| i as f32).collect();
        assert_eq!(super::vectorise!(|| x.iter().sum::<f32>()), 4950.0);
    }
}
