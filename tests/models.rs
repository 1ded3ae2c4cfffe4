//! The models of the study: parameter counts, torchvision's names, first values.

use attn2d::models::{Backbone, Family, Model, Spec, count};
use attn2d::nn::Mode;
use attn2d::{Device, Tensor};

#[test]
fn every_backbone_has_its_published_number_of_parameters() {
    for (name, parameters) in [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("efficientnet_b0", 5_288_548),
        ("efficientnet_b1", 7_794_184),
        ("efficientnet_b2", 9_109_994),
        ("vit_ti_16", 5_717_416),
        ("vit_s_16", 22_050_664),
        ("vit_b_16", 86_567_656),
        // An added non-local block, as its authors' formula has it: 256 and 512 channels.
        ("resnet18+nonlocal@3.1,4.1", 11_689_512 + 132_224 + 526_592),
        // Without attention, and with stand-alone self-attention of 7x7 for every second 3x3 of stage 4.
        ("resnet18+la7@4:sasa", 11_689_512 - 2 * (9 - 3) * 512 * 512 + 2 * 7 * 512),
        // Tables of 2 * 7 - 1 rows of one head's 128 channels, for height and width.
        ("resnet50+botnet@4.2", 25_557_032 - (9 - 3) * 512 * 512 + 2 * 13 * 128),
    ] {
        let spec: Spec = name.parse().unwrap();
        assert_eq!(count(&spec, 1000, (224, 224)).unwrap(), parameters, "{name}");
    }
}

/// `tests/torchvision/*.txt` list torchvision's state dicts: name and shape.
#[test]
fn state_dicts_are_torchvisions() {
    for name in
        ["resnet18", "resnet34", "resnet50", "efficientnet_b0", "efficientnet_b2", "vit_b_16"]
    {
        let file = format!("{}/tests/torchvision/{name}.txt", env!("CARGO_MANIFEST_DIR"));
        let mut wanted: Vec<String> =
            std::fs::read_to_string(&file).unwrap().lines().map(str::to_string).collect();
        let device = Device::cpu();
        let model = Model::build(&name.parse().unwrap(), 1000, (224, 224), &device, 0).unwrap();
        let state = model.state().unwrap();
        let mut ours: Vec<String> = state
            .arrays
            .iter()
            .map(|(name, array)| {
                array.shape.iter().fold(name.clone(), |line, n| format!("{line} {n}"))
            })
            .collect();
        wanted.sort();
        ours.sort();
        assert_eq!(ours, wanted, "{name}");
    }
}

/// Dropout and stochastic depth draw anew in each step, the same for the same seed, and not at all in evaluation.
#[test]
fn random_layers_are_functions_of_seed_and_step() {
    let device = Device::cpu();
    for text in [
        "efficientnet_b0:w8,stages=3,stochastic_depth=0.5",
        "vit_ti_16:w24,depth=3,patch=8,dropout=0.3,stochastic_depth=0.5",
        "resnet18:w8,stages=1,dropout=0.5",
    ] {
        let model = Model::build(&text.parse().unwrap(), 5, (16, 16), &device, 1).unwrap();
        let pixels: Vec<f32> = (0..4 * 16 * 16 * 3).map(|i| (i as f32 * 0.37).sin()).collect();
        let images = Tensor::from_f32(&device, &[4, 16, 16, 3], &pixels).unwrap();
        let run = |mode: Mode| model.forward(&images, &mode).unwrap().to_f32().unwrap();
        let first = run(Mode::train(7, 1));
        assert_eq!(first, run(Mode::train(7, 1)), "{text}");
        assert_ne!(first, run(Mode::train(7, 2)), "{text}: another step");
        assert_ne!(first, run(Mode::train(8, 1)), "{text}: another seed");
        // Training has moved the running statistics, but evaluation itself is no matter of chance.
        assert_eq!(run(Mode::EVAL), run(Mode { seed: 3, ..Mode::EVAL }), "{text}");
    }
}

/// Attention that is appended, and a non-local block anywhere, adds nothing at first: the logits are the plain net's.
#[test]
fn appended_branches_start_as_the_plain_net() {
    let device = Device::cpu();
    let images = Tensor::full(&device, &[2, 32, 32, 3], 0.3).unwrap();
    for (plain, tail) in [
        ("resnet18:w8,stages=2", "+ga@2:append,heads=2"),
        ("resnet18:w8,stages=2", "+nonlocal@2"),
        ("resnet50:w8,stages=2", "+ela-bottleneck3@2:append"),
        ("efficientnet_b0:w8,stages=2", "+ela-gaussian3@2"),
        ("efficientnet_b0:w8,stages=2", "+botnet@2.1:append"),
    ] {
        let build =
            |text: &str| Model::build(&text.parse().unwrap(), 3, (32, 32), &device, 4).unwrap();
        let (without, with) = (build(plain), build(&format!("{plain}{tail}")));
        with.load(&without.state().unwrap(), attn2d::models::Load::Pretrained { drop_head: false })
            .unwrap();
        let logits = |m: &Model| m.forward(&images, &Mode::EVAL).unwrap().to_f32().unwrap();
        assert_eq!(logits(&without), logits(&with), "{plain}{tail}");
    }
}

/// Every variant in every conv family, in place of and after blocks of stride 1 and 2, on maps of odd sides: a step has finite
/// gradients for all parameters.
#[test]
fn every_variant_works_in_every_block() {
    use attn2d::models::Variant;
    let device = Device::cpu();
    let images = Tensor::full(&device, &[2, 26, 22, 3], 0.1).unwrap();
    for backbone in [Backbone::ResNet18, Backbone::ResNet50, Backbone::EfficientNetB0] {
        for variant in Variant::ALL {
            for placement in ["replace", "append"] {
                let text = format!(
                    "{}:w8,stages=2+{}@1.0,2:{placement},heads=1",
                    backbone.name(),
                    variant.name()
                );
                let model = Model::build(&text.parse().unwrap(), 3, (26, 22), &device, 0).unwrap();
                let logits = model.forward(&images, &Mode::train(0, 1)).unwrap();
                assert_eq!(logits.shape(), [2, 3], "{text}");
                let ones = Tensor::full(&device, &[2, 3], 1.0).unwrap();
                let gradients = logits.backward_with(&ones).unwrap();
                model.parameters().gather(&gradients).unwrap();
                let all = model.parameters().gradients().to_f32().unwrap();
                assert!(all.iter().all(|g| g.is_finite()), "{text}");
            }
        }
    }
}

#[test]
fn images_that_patches_do_not_fit_are_refused() {
    let device = Device::cpu();
    let spec: Spec = "vit_tiny_patch16_224".parse().unwrap();
    assert_eq!(spec.backbone.family(), Family::ViT);
    let error = Model::build(&spec, 2, (65, 64), &device, 0).err().unwrap().to_string();
    assert!(error.contains("65x64") && error.contains("16x16"), "{error}");
    assert!(error.contains("--img-size 80"), "{error}");
    let model =
        Model::build(&"vit_ti_16:depth=1".parse().unwrap(), 2, (32, 32), &device, 0).unwrap();
    let images = Tensor::zeros(&device, &[1, 48, 32, 3]).unwrap();
    let error = model.forward(&images, &Mode::EVAL).err().unwrap().to_string();
    assert!(error.contains("32x32") && error.contains("48x32"), "{error}");
}
