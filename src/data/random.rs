//! Random numbers for data: keyed, not sequential. Whoever asks for the draws of (seed, epoch, item) gets the same ones, in whatever
//! order threads get to it. (Kernels use Philox, which also runs on GPUs; this is the small host-side cousin.)

/// A stream of random numbers that depends on nothing but the key it was made from.
///
/// The generator is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): a counter with an odd
/// stride, put through a mixing function. The key's parts are folded into the counter's start by the same mixing function.
#[derive(Debug, Clone)]
pub struct Draws {
    state: u64,
}

const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Draws {
    /// The stream of `key`, for instance `[seed, epoch, index]`. Keys of other lengths or orders give unrelated streams.
    pub fn new(key: &[u64]) -> Self {
        let state = key.iter().fold(key.len() as u64, |state, part| {
            mix(state.wrapping_add(STRIDE) ^ mix(part.wrapping_add(STRIDE)))
        });
        Self { state }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STRIDE);
        mix(self.state)
    }

    /// Uniform in `[0, 1)`, a multiple of 2^-24.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Uniform in `[lo, hi)`; `lo` where both are equal.
    pub fn range(&mut self, lo: f32, hi: f32) -> f32 {
        lo + (hi - lo) * self.unit()
    }

    /// Uniform over `0..n`; 0 where `n` is 0. (Multiply-shift; the bias is below n / 2^64.)
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f32) -> bool {
        self.unit() < p
    }

    /// Roughly N(0, 1): the sum of twelve uniforms less six, bounded by 6 in size, which suits noise in pictures.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
    }

    /// Shuffles `items` in place (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Draws;

    #[test]
    fn the_key_decides_the_stream() {
        let take = |key: &[u64]| {
            let mut draws = Draws::new(key);
            [draws.bits(), draws.bits(), draws.bits()]
        };
        assert_eq!(take(&[1, 2, 3]), take(&[1, 2, 3]));
        for other in [&[1, 2, 4][..], &[1, 3, 2], &[2, 1, 3], &[1, 2], &[1, 2, 3, 0], &[]] {
            assert_ne!(take(&[1, 2, 3]), take(other), "{other:?}");
        }
    }

    #[test]
    fn draws_are_uniform_and_within_bounds() {
        let mut draws = Draws::new(&[7]);
        let (mut sum, mut counts) = (0.0, [0usize; 5]);
        for _ in 0..20_000 {
            let unit = draws.unit();
            assert!((0.0..1.0).contains(&unit));
            sum += unit;
            counts[draws.below(5)] += 1;
        }
        assert!((sum / 20_000.0 - 0.5).abs() < 0.01, "mean {}", sum / 20_000.0);
        assert!(counts.iter().all(|&count| (3_700..4_300).contains(&count)), "{counts:?}");
        assert_eq!(draws.below(0), 0);
        assert_eq!(draws.below(1), 0);
    }

    #[test]
    fn shuffle_is_a_permutation() {
        let mut items: Vec<usize> = (0..100).collect();
        Draws::new(&[3]).shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
