//! Dynamic loss scaling for f16, whose smallest number is 6e-8: the loss is multiplied by a power of two before the backward, the
//! gradients divided by it after ([`crate::ops::clip_grad_norm()`]). The rule is that of `torch.amp.GradScaler` (Micikevicius et al. 2018,
//! arXiv 1710.03740): begin with 65,536; where a gradient is not finite, leave the step out and halve; after 2,000 good steps, double.

use serde::{Deserialize, Serialize};

/// The scale of the next step's loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LossScale {
    /// The scale is 2 to this power.
    pub exponent: i32,
    /// Steps since it last changed.
    pub good_steps: u32,
}

/// Good steps after which the scale is doubled.
const GROWTH_INTERVAL: u32 = 2000;

/// Beyond these it is not the scale that is at fault.
const EXPONENTS: std::ops::RangeInclusive<i32> = -24..=64;

impl Default for LossScale {
    fn default() -> Self {
        Self { exponent: 16, good_steps: 0 }
    }
}

impl LossScale {
    /// What the loss is multiplied by.
    pub fn scale(self) -> f32 {
        2.0f32.powi(self.exponent)
    }

    /// Takes note of a step; `false` where the scale is as small as it may be and the gradients are still not finite.
    #[must_use]
    pub fn update(&mut self, finite: bool) -> bool {
        if !finite {
            *self = Self { exponent: self.exponent - 1, good_steps: 0 };
            return EXPONENTS.contains(&self.exponent);
        }
        self.good_steps += 1;
        if self.good_steps == GROWTH_INTERVAL {
            let exponent = (self.exponent + 1).min(*EXPONENTS.end());
            *self = Self { exponent, good_steps: 0 };
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_moves_as_grad_scaler() {
        let mut scale = LossScale::default();
        assert_eq!(scale.scale(), 65_536.0);
        for _ in 0..1999 {
            assert!(scale.update(true));
        }
        assert!(scale.update(false), "an overflow starts the count anew");
        assert_eq!((scale.scale(), scale.good_steps), (32_768.0, 0));
        for _ in 0..2000 {
            assert!(scale.update(true));
        }
        assert_eq!((scale.scale(), scale.good_steps), (65_536.0, 0));
        assert_eq!((1..100).take_while(|_| scale.update(false)).count(), 40, "down to 2^-24");
    }
}
