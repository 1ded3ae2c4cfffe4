//! Every WGSL text that the built-in cases launch, in f32 and f16, read and translated (not compiled) for Vulkan, Metal and DirectX 12 by what
//! wgpu translates with: most machines have one of these and many lack f16, so nothing else would tell that a text does not hold there.

use super::trial::Trial;
use crate::Device;
use crate::backend::wgsl_half::source;
use crate::backend::{Backend, Buffer, Caps, KernelTime, Slot};
use crate::error::Result;
use crate::kernel::{Element, Kernel};
use crate::ops::specs;
use crate::tensor::DType;
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use rayon::prelude::*;
use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

type Launched = BTreeMap<(&'static str, &'static str), &'static Kernel>;

/// A device that computes nothing and notes what it is to launch, by kernel and storage.
struct Notes {
    caps: Caps,
    launched: Arc<Mutex<Launched>>,
}

impl Backend for Notes {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, _: usize) -> Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new(()))
    }

    fn write(&self, _: &Buffer, _: usize, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn read(&self, _: &Buffer, _: usize, out: &mut [u8]) -> Result<()> {
        out.fill(0);
        Ok(())
    }

    fn copy(&self, _: &Buffer, _: usize, _: &Buffer, _: usize, _: usize) -> Result<()> {
        Ok(())
    }

    fn launch(&self, kernel: &'static Kernel, _: &[u8], slots: &[Slot<'_>]) -> Result<()> {
        let stored = slots.iter().zip(kernel.bindings).find(|(_, b)| b.2 == Element::Stored);
        let stored = stored.map_or(DType::F32, |(slot, _)| slot.dtype);
        self.launched.lock().unwrap().insert((kernel.name, stored.suffix()), kernel);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn set_profiling(&self, _: bool) -> Result<()> {
        Ok(())
    }

    fn take_profile(&self) -> Result<Vec<KernelTime>> {
        Ok(Vec::new())
    }
}

/// What the built-in cases launch on a GPU that has f16.
fn launched() -> Launched {
    let launched = Arc::new(Mutex::new(Launched::new()));
    let caps = Caps {
        name: "wgpu:0".into(),
        max_invocations: 256,
        half: &[DType::F16],
        f16: true,
        ..Device::cpu().caps().clone()
    };
    let notes = Notes { caps, launched: launched.clone() };
    let device = Device::from_backend(Box::new(notes));
    for precision in [DType::F32, DType::F16] {
        for spec in specs().into_iter().filter(|spec| spec.has(precision)) {
            for case in (spec.cases)().into_iter().filter(|case| (case.able)(device.caps())) {
                let trial = Trial::built_in(spec, &case.no_gradcheck(), precision).unwrap();
                let wanted: Vec<&str> =
                    trial.expected.gradients.keys().map(String::as_str).collect();
                trial.forward_backward(&device, &wanted).unwrap();
            }
        }
    }
    let launched = launched.lock().unwrap();
    launched.clone()
}

/// A text as wgpu takes it, and what it says on the way.
fn translated(text: &str) -> Result<(), String> {
    let module =
        naga::front::wgsl::parse_str(text).map_err(|e| e.emit_to_string(text).to_string())?;
    let capabilities = Capabilities::SHADER_FLOAT16 | Capabilities::SUBGROUP;
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    let info = validator.validate(&module).map_err(|e| e.emit_to_string(text))?;
    spv::write_vec(&module, &info, &spv::Options::default(), None)
        .map_err(|e| format!("Vulkan: {e}"))?;
    let metal = msl::Options { lang_version: (2, 4), ..Default::default() };
    msl::write_string(&module, &info, &metal, &msl::PipelineOptions::default())
        .map_err(|e| format!("Metal: {e}"))?;
    // The older compiler, which has no f16 and no subgroups, is what Windows comes with.
    let old = !text.contains("enable f16;") && !text.contains("subgroupBroadcast");
    let models = [hlsl::ShaderModel::V6_2, hlsl::ShaderModel::V5_1];
    for shader_model in models.into_iter().filter(|m| old || *m == hlsl::ShaderModel::V6_2) {
        let direct = hlsl::Options { shader_model, ..Default::default() };
        let mut out = String::new();
        hlsl::Writer::new(&mut out, &direct, &hlsl::PipelineOptions::default())
            .write(&module, &info, None)
            .map_err(|e| format!("DirectX 12, {shader_model:?}: {e}"))?;
    }
    Ok(())
}

#[test]
fn every_text_holds_for_vulkan_metal_and_directx_in_f32_and_f16() {
    let mut texts = BTreeMap::new();
    for (&(name, stored), kernel) in &launched() {
        let stored = if stored == "f16" { DType::F16 } else { DType::F32 };
        for subgroups in [false, true] {
            let text = source(kernel, stored, subgroups);
            assert!(text.contains(&format!("fn {name}(")), "{name} has no entry of its name");
            texts.entry(text).or_insert(format!("{name} in {}", stored.suffix()));
        }
    }
    let in_half = texts.values().filter(|name| name.ends_with("f16")).count();
    assert!(in_half > 20 && texts.len() > in_half + 20, "{in_half} of {}", texts.len());
    let wrong: Vec<String> = texts
        .par_iter()
        .filter_map(|(text, name)| translated(text).err().map(|e| format!("{name}: {e}")))
        .collect();
    assert!(wrong.is_empty(), "{} texts:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_text_that_does_not_hold_is_told() {
    assert!(translated("fn f() -> f32 { return 1u; }").is_err());
    // Written, but bound to be read; f16 without its line at the top.
    let read = "@group(0) @binding(0) var<storage, read> x: array<f32>;\n";
    assert!(translated(&format!("{read}fn f() {{ x[0] = 1.0; }}")).is_err());
    assert!(translated("fn f() -> f32 { return f32(f16(1.0)); }").is_err());
}
