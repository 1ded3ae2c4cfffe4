//! An emulator is worth what it finds: kernels with one fault each (`kernels/emu/faults.cu`), and what is said of them.

use crate::kernel::{Access, Cuda, CudaPlan, CudaText, F32, Kernel, Plan};
use crate::{Device, Tensor};

/// The error of a kernel over 100 elements in two blocks of 64; `None` where it runs.
fn outcome(name: &'static str, plan: fn(&[u8], &crate::Caps) -> CudaPlan) -> Option<String> {
    let kernel: &'static Kernel = Box::leak(Box::new(Kernel {
        name,
        bindings: &[("x", Access::Read, F32), ("y", Access::Write, F32)],
        cpu: |_| {},
        wgsl: "",
        cuda: Some(Cuda { text: CudaText { name: "emu/faults", source: "" }, half: None, plan }),
        plan: |_, _| Plan::items(1, 1),
    }));
    let device = Device::new("cuda-emu").unwrap();
    let data: Vec<f32> = (0..100).map(|i| i as f32).collect();
    let x = Tensor::from_f32(&device, &[100], &data).unwrap();
    let y = Tensor::empty(&device, &[100]).unwrap();
    let error = kernel.launch(&100u32, &[&x, &y]).err().map(|e| e.to_string());
    if error.is_none() {
        assert_eq!(y.to_f32().unwrap(), data);
    }
    assert_eq!(x.to_f32().unwrap(), data, "an input changed");
    error
}

fn fault(name: &'static str, words: &[&str]) {
    let plan = |_: &[u8], _: &crate::Caps| CudaPlan::grid([2, 1, 1], 64).shared(256);
    let error = outcome(name, plan).unwrap_or_else(|| panic!("{name} was not found"));
    for word in [name].iter().chain(words) {
        assert!(error.contains(word), "{name}: '{word}' is not in: {error}");
    }
}

#[test]
fn a_sound_kernel_runs() {
    assert_eq!(outcome("fault_none_f32", |_, _| CudaPlan::grid([2, 1, 1], 64).shared(256)), None);
}

#[test]
fn memory_faults_name_the_thread_and_the_element() {
    fault("fault_read_past_f32", &["), thread", "element 1", "'x', which has 100"]);
    fault("fault_write_past_f32", &["thread 36", "element 100 of 'y', which has 100"]);
    fault("fault_write_before_f32", &["before the memory of 'y'", "element -1"]);
    fault(
        "fault_write_input_f32",
        &["block (0, 0, 0), thread 5", "element 5 of 'x'", "only reads"],
    );
    fault("fault_shared_f32", &["past a shared array of 252 bytes"]);
    fault("fault_dynamic_f32", &["256 bytes of dynamic shared memory", "thread"]);
    fault("fault_division_u32", &["divides an integer by zero", "thread"]);
}

#[test]
fn barriers_not_reached_by_all_threads_are_found() {
    fault("fault_divergent_f32", &["waits at the barrier", "faults.cu:", "while thread"]);
    fault(
        "fault_early_return_f32",
        &["block (1, 0, 0)", "has returned while thread", "faults.cu:"],
    );
    fault("fault_shuffle_f32", &["waits for lanes that do not come"]);
}

#[test]
fn races_and_memory_that_nobody_wrote_are_found() {
    for name in
        ["fault_unwritten_f32", "fault_race_f32", "fault_blocks_race_f32", "fault_unwaited_f32"]
    {
        fault(name, &["under the schedule forward", "'y' element"]);
    }
}

#[test]
fn wrong_use_of_tensor_cores_and_copies_is_found() {
    fault("fault_misaligned_f32", &["thread 0", "no multiple of 16", "faults.cu:"]);
    fault("fault_lane_missing_f32", &["waits for lanes that do not come", "faults.cu:"]);
}

#[test]
fn launches_that_a_driver_refuses_are_refused() {
    let message = |plan| outcome("fault_none_f32", plan).unwrap();
    assert!(
        message(|_, _| CudaPlan::grid([2, 1, 1], 128).shared(512)).contains("at most 64 threads")
    );
    assert!(message(|_, _| CudaPlan::grid([2, 70_000, 1], 64)).contains("65535 along y"));
    assert!(
        message(|_, _| CudaPlan::grid([2, 1, 1], 64).shared(1 << 20)).contains("shared memory")
    );
    assert!(message(|_, _| CudaPlan::grid([2, 1, 1], 2048)).contains("1 to 1024"));
    assert!(message(|_, _| CudaPlan::REFUSED).contains("beyond its limits"));
    let missing = outcome("fault_unheard_of_f32", |_, _| CudaPlan::grid([1, 1, 1], 64)).unwrap();
    assert!(missing.contains("not among the emulated kernels"), "{missing}");
}
