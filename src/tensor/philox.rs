//! Counter-based random numbers: Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
//!
//! A number depends only on (seed, step, op, element), never on who asks first: the same on every backend and thread
//! count, and a resumed run needs no saved state. `shaders/common.wgsl` has the same function.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds of Philox 4x32: four random words for one counter under one key.
#[inline(always)]
pub fn philox4x32_10(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
    }
    counter
}

/// A stream of random numbers, one per element index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    /// The run's seed.
    pub seed: u64,
    /// The training step (0 for initialisation).
    pub step: u32,
    /// Which op or parameter draws: streams of different ops are independent.
    pub op: u32,
}

impl Philox {
    /// The random word of element `i`.
    #[inline(always)]
    pub fn word(&self, i: u64) -> u32 {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let block = i / 4;
        philox4x32_10(key, [block as u32, (block >> 32) as u32, self.step, self.op])
            [(i % 4) as usize]
    }

    /// Uniform in [0, 1), 24 bits.
    #[inline(always)]
    pub fn uniform(&self, i: u64) -> f32 {
        (self.word(i) >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Standard normal by Box-Muller; element `i` uses words `2i` and `2i + 1`.
    pub fn normal(&self, i: u64) -> f32 {
        let u = (f64::from(self.word(2 * i)) + 0.5) / 4_294_967_296.0;
        let v = (f64::from(self.word(2 * i + 1)) + 0.5) / 4_294_967_296.0;
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with the Random123 library (kat_vectors).
    #[test]
    fn known_answers() {
        assert_eq!(
            philox4x32_10([0, 0], [0; 4]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32_10([u32::MAX; 2], [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn normal_has_zero_mean_and_unit_variance() {
        let stream = Philox { seed: 7, step: 0, op: 3 };
        let n = 20_000;
        let (mut sum, mut squares) = (0.0f64, 0.0f64);
        for i in 0..n {
            let v = f64::from(stream.normal(i));
            sum += v;
            squares += v * v;
        }
        assert!((sum / n as f64).abs() < 0.03);
        assert!((squares / n as f64 - 1.0).abs() < 0.05);
    }
}
