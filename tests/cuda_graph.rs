//! Steps as graphs, on the emulated device: its graphs run with the arguments they were built with or updated to, so an update
//! that is forgotten gives other numbers.
#![cfg(feature = "cuda-emu")]

use attn2d::models::Model;
use attn2d::nn::{Data, Mode};
use attn2d::ops::{self, AdamW, ClipGradNorm, CrossEntropy, Guide};
use attn2d::tensor::philox::Philox;
use attn2d::{DType, Device, Error, Result, Tensor};
use std::panic::{AssertUnwindSafe, catch_unwind};

const CLASSES: usize = 3;

/// A small network in training, with dropout on its images and a learning rate that falls.
struct Training {
    device: Device,
    model: Model,
    state: [Tensor; 2],
    graph: bool,
}

impl Training {
    fn new(graph: bool) -> Self {
        let device = Device::new("cuda-emu").unwrap();
        let spec = "resnet18:w4,stem=small+la3@4:heads=1".parse().unwrap();
        let model = Model::build(&spec, CLASSES, (8, 8), &device, 5).unwrap();
        let zeros = || Tensor::zeros(&device, model.parameters().values().shape()).unwrap();
        let state = [zeros(), zeros()];
        Self { device, model, state, graph }
    }

    /// One step on random images; its loss.
    fn step(&self, step: u32, batch: usize, dropout: f32) -> f32 {
        let stream = Philox { seed: 1, step, op: 0 };
        let images = Tensor::randn(&self.device, &[batch, 8, 8, 3], stream).unwrap();
        let labels: Vec<u32> = (0..batch as u32).map(|i| (i + step) % CLASSES as u32).collect();
        let labels = ops::class_labels(&self.device, &labels, CLASSES).unwrap();
        let work = || {
            let mode = Mode::train(7, step);
            let images = ops::dropout(&images, dropout, mode.random(99))?;
            let logits = self.model.forward(&images, &mode)?;
            let loss = ops::cross_entropy(&logits, &labels, None, CrossEntropy::default())?;
            let parameters = self.model.parameters();
            parameters.gather(&loss.backward()?)?;
            let opt = AdamW { lr: 1e-2 / step as f32, ..AdamW::default() };
            let (values, gradients) = (parameters.values(), parameters.gradients());
            let state = (&self.state[0], &self.state[1]);
            ops::adamw_step(values, gradients, state, None, opt, u64::from(step))?;
            Ok(loss)
        };
        let loss = if self.graph { self.device.step(work) } else { work() };
        loss.unwrap().item().unwrap()
    }

    /// One step in f16 whose loss is scaled; the norm of its gradients, and the parameters after it.
    fn half_step(&self, step: u32, loss_scale: f32) -> (f32, Vec<f32>) {
        let stream = Philox { seed: 1, step, op: 0 };
        let images = Tensor::randn(&self.device, &[2, 8, 8, 3], stream).unwrap();
        let labels = ops::class_labels(&self.device, &[0, 1], CLASSES).unwrap();
        let parameters = self.model.parameters();
        let work = || {
            let images = ops::cast(&images, DType::F16)?;
            let logits = self.model.forward(&images, &Mode::train(7, step))?;
            let loss = ops::cross_entropy(&logits, &labels, None, CrossEntropy::default())?;
            parameters.gather(&loss.backward_with(&loss.full_like(loss_scale)?)?)?;
            let (values, gradients) = (parameters.values(), parameters.gradients());
            let opt = ClipGradNorm { max_norm: Some(0.5), loss_scale };
            let control = ops::clip_grad_norm(gradients, opt)?;
            let by = Guide { control: Some(&control), ..Guide::default() };
            let state = (&self.state[0], &self.state[1]);
            ops::adamw_step(values, gradients, state, by, AdamW::default(), u64::from(step))?;
            Ok(control)
        };
        let control = if self.graph { self.device.step(work) } else { work() }.unwrap();
        (control.to_f32().unwrap()[0], parameters.values().to_f32().unwrap())
    }

    /// Every parameter and running statistic, as bits.
    fn bits(&self) -> Vec<u32> {
        let arrays = self.model.state().unwrap().arrays;
        let of = |data: &Data| match data {
            Data::F32(v) => v.iter().map(|x| x.to_bits()).collect(),
            Data::I64(v) => v.iter().map(|n| *n as u32).collect::<Vec<_>>(),
        };
        arrays.values().flat_map(|array| of(&array.data)).collect()
    }
}

#[test]
fn a_recorded_run_is_the_same_to_the_bit() {
    let [eager, graph] = [false, true].map(Training::new);
    let mut before = graph.device.graph_counts();
    for step in 1..=6 {
        let losses = [&eager, &graph].map(|t| t.step(step, 2, 0.3));
        assert_eq!(losses[0].to_bits(), losses[1].to_bits(), "step {step}: {losses:?}");
        let counts = graph.device.graph_counts();
        let (nodes, updated) = (counts.nodes - before.nodes, counts.updated - before.updated);
        println!("step {step}: loss {:.6}, {nodes} nodes, {updated} updated", losses[1]);
        assert!(nodes > 100 && counts.runs == before.runs + 1, "{counts:?}");
        // The step of the dropout and the learning rate; addresses settle after the first step.
        assert!(step < 3 || updated == 2, "{counts:?}");
        before = counts;
    }
    assert_eq!(before.built, 1, "one graph is the whole step");
    assert_eq!(eager.bits(), graph.bits());
    assert_eq!(eager.device.graph_counts(), attn2d::GraphCounts::default());
}

/// An overflow in f16 is known to the device alone, which leaves the step out: the graph is the same one.
#[test]
fn a_step_that_overflows_is_left_out_inside_its_graph() {
    let [eager, graph] = [false, true].map(Training::new);
    let mut before = graph.model.parameters().values().to_f32().unwrap();
    for (step, scale) in (1..).zip([1024.0, 1e35, 1e35, 512.0, 1024.0]) {
        let (norm, values) = graph.half_step(step, scale);
        println!("step {step}: loss scale {scale:e}, norm {norm}");
        assert_eq!(norm.is_finite(), scale < 1e35, "step {step}");
        assert_eq!(values == before, scale == 1e35, "step {step}");
        assert!(eager.half_step(step, scale).1 == values, "step {step}");
        before = values;
    }
    assert_eq!(graph.device.graph_counts().built, 1, "one graph is the whole step");
    assert_eq!(eager.bits(), graph.bits());
}

#[test]
fn batches_and_kernels_may_change_from_step_to_step() {
    let [eager, graph] = [false, true].map(Training::new);
    let mut built = Vec::new();
    for (step, (batch, dropout)) in (1..).zip([(2, 0.3), (3, 0.3), (2, 0.3), (2, 0.0), (2, 0.3)]) {
        let losses = [&eager, &graph].map(|t| t.step(step, batch, dropout));
        assert_eq!(losses[0].to_bits(), losses[1].to_bits(), "step {step}: {losses:?}");
        built.push(graph.device.graph_counts().built);
    }
    assert_eq!(eager.bits(), graph.bits());
    // Another batch is other arguments of the same kernels, or other kernels; no dropout is certainly one kernel less. A
    // graph that was built once is found again.
    assert!(built[1] <= 2 && built[2] == built[1], "{built:?}");
    assert_eq!(built[3..], [built[2] + 1, built[2] + 1], "{built:?}");
}

fn tensors() -> (Device, Tensor, Tensor) {
    let device = Device::new("cuda-emu").unwrap();
    let x = Tensor::from_f32(&device, &[3], &[1.0, 2.0, 3.0]).unwrap();
    let y = Tensor::zeros(&device, &[3]).unwrap();
    (device, x, y)
}

#[test]
fn an_error_or_a_panic_inside_leaves_a_device_that_works() {
    let (device, x, y) = tensors();
    let failing = device.step(|| {
        y.copy_from(&ops::add(&x, &x)?)?;
        Err::<(), _>(Error::Training("on purpose".into()))
    });
    assert!(failing.unwrap_err().to_string().contains("on purpose"));
    assert_eq!(y.to_f32().unwrap(), [0.0; 3], "what was recorded is not run");
    let panicking = catch_unwind(AssertUnwindSafe(|| {
        device.step(|| {
            y.copy_from(&x)?;
            if y.numel() == 3 { panic!("on purpose") } else { Ok(()) }
        })
    }));
    assert!(panicking.is_err());
    assert_eq!(ops::add(&x, &y).unwrap().to_f32().unwrap(), [1.0, 2.0, 3.0]);
    device.step(|| y.copy_from(&x)).unwrap();
    assert_eq!(y.to_f32().unwrap(), [1.0, 2.0, 3.0]);
    assert_eq!(device.graph_counts().runs, 1);
}

#[test]
fn a_host_copy_ends_a_graph_before_it_touches_memory() {
    let (device, x, _) = tensors();
    let work = |guarded: bool| -> Result<[Vec<f32>; 3]> {
        device.step(|| {
            let a = ops::add(&x, &x)?;
            let b = ops::add(&a, &x)?;
            device.set_guarded(guarded);
            // The memory that `a` had is the next to be lent, while what reads it is only recorded.
            drop(a);
            let c = Tensor::from_f32(&device, &[3], &[-1.0; 3]);
            device.set_guarded(false);
            let c = c?;
            let seen = b.to_f32()?;
            Ok([seen, b.to_f32()?, ops::add(&b, &c)?.to_f32()?])
        })
    };
    for (i, guarded) in [false, false, true].into_iter().enumerate() {
        let [seen, b, sum] = work(guarded).unwrap();
        assert_eq!((seen, b, sum), (vec![3.0, 6.0, 9.0], vec![3.0, 6.0, 9.0], vec![2.0, 5.0, 8.0]));
        let counts = device.graph_counts();
        assert_eq!((counts.built, counts.runs), (2, 2 * (i + 1)), "two graphs a step, kept");
    }
}

#[test]
fn steps_within_steps_and_times_of_kernels() {
    let (device, x, y) = tensors();
    device.step(|| device.step(|| y.copy_from(&ops::add(&x, &x)?))).unwrap();
    assert_eq!(y.to_f32().unwrap(), [2.0, 4.0, 6.0]);
    assert_eq!((device.graph_counts().runs, device.graph_counts().nodes), (1, 2));
    device.set_profiling(true).unwrap();
    device.step(|| y.copy_from(&ops::mul(&x, &x)?)).unwrap();
    let times = device.take_profile().unwrap();
    assert_eq!(times.iter().map(|t| t.entry).collect::<Vec<_>>(), ["mul_fwd_f32"]);
    device.set_profiling(false).unwrap();
    assert_eq!(y.to_f32().unwrap(), [1.0, 4.0, 9.0]);
    assert_eq!(device.graph_counts().runs, 1, "timed launches are not in a graph");
    let started_inside = device.step(|| {
        y.copy_from(&x)?;
        device.set_profiling(true)?;
        ops::add(&x, &y)
    });
    assert_eq!(started_inside.unwrap().to_f32().unwrap(), [2.0, 4.0, 6.0]);
    assert_eq!(device.take_profile().unwrap().len(), 1);
}

#[test]
fn devices_without_graphs_just_run() {
    let device = Device::cpu();
    let x = Tensor::full(&device, &[2], 1.5).unwrap();
    let y = device.step(|| ops::add(&x, &x)).unwrap();
    assert_eq!(y.to_f32().unwrap(), [3.0, 3.0]);
    assert_eq!(device.graph_counts(), attn2d::GraphCounts::default());
}
