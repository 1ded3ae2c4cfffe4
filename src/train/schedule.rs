//! The learning rate as a pure function of the step, so that a resumed run needs to remember nothing.

use crate::config::{Optim, Sched, SchedName};

/// A learning rate for every step of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    name: SchedName,
    peak: f64,
    min: f64,
    warmup_steps: f64,
    total_steps: f64,
    decay_steps: f64,
    decay_rate: f64,
}

impl Schedule {
    /// The schedule of a run of `epochs` with `steps_per_epoch` optimiser steps each.
    pub fn new(sched: &Sched, optim: &Optim, epochs: usize, steps_per_epoch: usize) -> Self {
        let steps = |epochs: f64| epochs * steps_per_epoch as f64;
        Self {
            name: sched.name,
            peak: optim.lr,
            min: sched.min_lr,
            warmup_steps: steps(sched.warmup_epochs).round(),
            total_steps: steps(epochs as f64),
            decay_steps: steps(sched.decay_epochs),
            decay_rate: sched.decay_rate,
        }
    }

    /// The learning rate of step `step` (the first is 0).
    ///
    /// Warm-up over `w` steps: `peak * (step + 1) / w`. After it, with `t` from 0 to 1 over the steps that are left:
    /// cosine `min + (peak - min) * (1 + cos(pi t)) / 2` (Loshchilov and Hutter 2017, eq. 5, without restarts);
    /// step `max(peak * rate ^ floor(step / decay_steps), min)`, where `step` counts the warm-up too.
    pub fn lr(&self, step: u64) -> f64 {
        let step = step as f64;
        if step < self.warmup_steps {
            return self.peak * (step + 1.0) / self.warmup_steps;
        }
        match self.name {
            SchedName::Constant => self.peak,
            SchedName::Step => {
                let drops = (step / self.decay_steps).floor().min(f64::from(i32::MAX)) as i32;
                (self.peak * self.decay_rate.powi(drops)).max(self.min)
            }
            SchedName::Cosine => {
                let left = (self.total_steps - self.warmup_steps).max(1.0);
                let t = ((step - self.warmup_steps) / left).clamp(0.0, 1.0);
                self.min + (self.peak - self.min) * 0.5 * (1.0 + (std::f64::consts::PI * t).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(name: SchedName) -> Schedule {
        let sched =
            Sched { name, warmup_epochs: 1.0, min_lr: 0.1, decay_epochs: 2.0, decay_rate: 0.5 };
        let optim = Optim { lr: 1.0, ..Optim::default() };
        Schedule::new(&sched, &optim, 9, 10)
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} against {b}");
    }

    #[test]
    fn warm_up_is_linear_and_ends_at_the_peak() {
        for name in [SchedName::Cosine, SchedName::Step, SchedName::Constant] {
            let s = schedule(name);
            close(s.lr(0), 0.1);
            close(s.lr(4), 0.5);
            close(s.lr(9), 1.0);
            close(s.lr(10), 1.0);
        }
    }

    #[test]
    fn cosine_by_hand() {
        let s = schedule(SchedName::Cosine);
        // 80 steps after the warm-up: a quarter, half and all of the way.
        close(s.lr(10 + 20), 0.1 + 0.9 * 0.5 * (1.0 + 0.5_f64.sqrt()));
        close(s.lr(10 + 40), 0.55);
        close(s.lr(90), 0.1);
        close(s.lr(1000), 0.1);
    }

    #[test]
    fn step_by_hand() {
        let s = schedule(SchedName::Step);
        close(s.lr(19), 1.0);
        close(s.lr(20), 0.5);
        close(s.lr(40), 0.25);
        close(s.lr(80), 0.1);
        close(s.lr(u64::MAX), 0.1);
    }

    #[test]
    fn without_warm_up_it_starts_at_the_peak() {
        let sched = Sched { warmup_epochs: 0.0, ..Sched::default() };
        let s = Schedule::new(&sched, &Optim { lr: 0.3, ..Optim::default() }, 1, 1);
        close(s.lr(0), 0.3);
        close(s.lr(1), 0.0);
    }
}
