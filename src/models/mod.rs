//! Models by name.
//!
//! ```no_run
//! use attn2d::{Device, Tensor, models::Model, nn::Mode};
//! # fn main() -> attn2d::Result<()> {
//! let device = Device::cpu();
//! let model = Model::build(&"resnet18+ga@4".parse()?, 10, (64, 64), &device, 0)?;
//! let images = Tensor::zeros(&device, &[8, 64, 64, 3])?;
//! let logits = model.forward(&images, &Mode::EVAL)?; // [8, 10]
//! # Ok(())
//! # }
//! ```

mod attention;
mod case;
mod efficientnet;
mod freeze;
mod matched;
mod parts;
mod positions;
mod pretrained;
mod resnet;
pub mod spec;
mod timm;
mod vit;

pub use case::{CaseResult, run_case};
pub use efficientnet::EfficientNet;
pub use matched::{Matched, matched};
pub use parts::{PartCount, count_parts};
pub use pretrained::Loaded;
pub use resnet::ResNet;
pub use spec::{Backbone, Family, Spec, Variant};
pub use vit::ViT;

use crate::Device;
use crate::error::{Error, Result};
use crate::nn::{Differences, Init, Layer, Mode, Module, Parameters, StateDict, Value, join};
use crate::tensor::Tensor;

/// A net and the store of all that it owns.
pub struct Model {
    spec: Spec,
    num_classes: usize,
    image: (usize, usize),
    net: Box<dyn Module>,
    parameters: Parameters,
}

/// What a state dict must bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Every name and shape of the model, and no other: to go on with a run, to evaluate it.
    Exact,
    /// Weights of the plain net, to start from, by torchvision's names or timm's. Attention layers may be missing (they keep their
    /// first values), and so may
    /// `num_batches_tracked`; a convolution that an attention replaces is left out.
    Pretrained {
        /// Leave the classifier of the state dict out (it has other classes).
        drop_head: bool,
    },
}

impl Model {
    /// Builds a model with fresh parameters, drawn from `seed` and equal on every device. `image` is the height and width
    /// of its input: the position tables of global attention have a row for each offset of their map, so a model with `ga`
    /// takes images of this size only; without `ga` any size will do.
    ///
    /// # Errors
    /// [`Error::Usage`] for no classes, an empty image, or so many that a parameter would have more than 2^31 - 1 numbers,
    /// [`Error::Device`] when memory runs out.
    pub fn build(
        spec: &Spec,
        num_classes: usize,
        image: (usize, usize),
        device: &Device,
        seed: u64,
    ) -> Result<Self> {
        Self::from_init(&mut Init::new(device, seed), spec, num_classes, image)
    }

    fn from_init(
        init: &mut Init,
        spec: &Spec,
        num_classes: usize,
        image: (usize, usize),
    ) -> Result<Self> {
        let mut net = network(init, spec, num_classes, image)?;
        let parameters = Parameters::flatten(&mut *net)?;
        Ok(Self { spec: spec.clone(), num_classes, image, net, parameters })
    }

    /// Logits `[N, classes]` of normalised images `[N, H, W, 3]`.
    ///
    /// With images in f16 or bf16 ([`crate::ops::cast`]) activations and logits are stored so too; parameters, their gradients and
    /// running statistics stay in f32.
    ///
    /// # Errors
    /// [`Error::Shape`] for images of another form, or of another size where the model has global position tables.
    pub fn forward(&self, images: &Tensor, mode: &Mode) -> Result<Tensor> {
        match images.shape() {
            [_, _, _, 3] => self.net.forward(images, mode),
            other => Err(Error::shape(
                "model",
                format!("images must be [N, H, W, 3], but their shape is {other:?}"),
            )),
        }
    }

    /// The model string it was built from.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The number of classes.
    pub fn num_classes(&self) -> usize {
        self.num_classes
    }

    /// Height and width of the images it was built for.
    pub fn image(&self) -> (usize, usize) {
        self.image
    }

    /// The batch norm that has the smallest map to take statistics from in training, by its name, and the pixels of that map. Frozen
    /// ones take none; `None` where there is no other.
    pub fn smallest_norm(&self) -> Option<(String, usize)> {
        let mut rows = Vec::new();
        self.net.describe("", &[self.image.0, self.image.1, 3], &mut rows);
        let frozen = |name: &str| {
            ["weight", "bias"].iter().all(|part| self.parameters.is_frozen(&join(name, part)))
        };
        let norms = rows.into_iter().filter_map(|row| {
            let pixels = row.output[..row.output.len() - 1].iter().product();
            row.batch_norm.filter(|name| !frozen(name)).map(|name| (name, pixels))
        });
        norms.min_by_key(|norm| norm.1)
    }

    /// Its parameters, for optimisers.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Everything it owns by torchvision's names, with the model string, image size and number of classes as metadata.
    ///
    /// # Errors
    /// [`Error::Device`] when the device is lost.
    pub fn state(&self) -> Result<StateDict> {
        let mut dict = self.parameters.state()?;
        let (h, w) = self.image;
        for (key, value) in [
            ("format", "pt".to_string()), // some PyTorch programs ask for it
            ("model", self.spec.to_string()),
            ("image_size", format!("{h}x{w}")),
            ("num_classes", self.num_classes.to_string()),
        ] {
            dict.metadata.insert(key.into(), value);
        }
        Ok(dict)
    }

    /// Takes over a state dict and tells how it differed; on an error the model is as it was.
    ///
    /// # Errors
    /// [`Error::File`] naming the state dict's file and what does not fit.
    pub fn load(&self, dict: &StateDict, how: Load) -> Result<Differences> {
        let is_head = |name: &str| name.starts_with(self.spec.backbone.family().head());
        let drop_head = how == Load::Pretrained { drop_head: true };
        let mut dict = match how {
            Load::Exact => dict.clone(),
            Load::Pretrained { .. } => {
                timm::with_torchvision_names(self.spec.backbone.family(), dict)
            }
        };
        if drop_head {
            dict.arrays.retain(|name, _| !is_head(name));
        }
        let differences = self.parameters.compare(&dict);
        let mut wrong = differences.clone();
        if how != Load::Exact {
            wrong.missing.retain(|name| {
                let may = name.contains(".attn.") || name.ends_with(".num_batches_tracked");
                !(may || drop_head && is_head(name))
            });
            wrong.unexpected.retain(|name| !self.is_replaced(name));
        }
        if wrong == Differences::default() {
            self.parameters.load(&dict)?;
            return Ok(differences);
        }
        Err(Error::file(&dict.source, self.explain(&wrong, &dict)))
    }

    /// Whether this is a convolution of the plain net that an attention stands for here.
    fn is_replaced(&self, name: &str) -> bool {
        let block = name.strip_suffix("conv2.weight").or(name.strip_suffix("0.weight"));
        block.is_some_and(|block| {
            let attention = format!("{block}attn.");
            self.parameters.parameter_names().any(|name| name.starts_with(&attention))
        })
    }

    /// One line on a state dict that does not fit.
    fn explain(&self, wrong: &Differences, dict: &StateDict) -> String {
        let mut parts = Vec::new();
        let mut list = |what: &str, names: Vec<String>| {
            if !names.is_empty() {
                let more = if names.len() > 10 { ", ..." } else { "" };
                let first = names[..names.len().min(10)].join(", ");
                parts.push(format!("{} {what} ({first}{more})", names.len()));
            }
        };
        list("missing", wrong.missing.clone());
        list("unexpected", wrong.unexpected.clone());
        let reshaped = wrong.reshaped.iter();
        let reshaped = reshaped
            .map(|r| format!("{} is {:?}, expected {:?}", r.name, r.found, r.expected))
            .collect();
        list("of another shape", reshaped);
        let mut message = format!("does not fit model '{}': {}", self.spec, parts.join("; "));
        let has = |part: &str| wrong.reshaped.iter().any(|r| r.name.contains(part));
        if let Some(theirs) = dict.metadata.get("model").filter(|m| **m != self.spec.to_string()) {
            message += &format!("; the file holds model '{theirs}'");
        } else if has(".rel_") || has("pos_embedding") {
            let size = dict.metadata.get("image_size").map_or("another size", String::as_str);
            let (h, w) = self.image;
            message +=
                &format!("; it was trained on images of {size}, the model is built for {h}x{w}");
        }
        if has(self.spec.backbone.family().head()) {
            message +=
                "; to start a new classifier, load it as pretrained weights with --drop-head";
        }
        message
    }
}

/// The most classes, and pixels along a side of an image, that a model can be built for.
const MOST: usize = 1 << 20;

/// A net with fresh parameters.
fn network(
    init: &mut Init,
    spec: &Spec,
    num_classes: usize,
    image: (usize, usize),
) -> Result<Box<dyn Module>> {
    let wanted = || {
        let (h, w) = image;
        format!("model '{spec}': {num_classes} classes and images of {h}x{w} pixels")
    };
    if num_classes == 0 || image.0 == 0 || image.1 == 0 {
        return Err(Error::usage(format!("{}; both must be above 0", wanted())));
    }
    if num_classes > MOST || image.0 > MOST || image.1 > MOST {
        return Err(Error::usage(format!("{}; both may be {MOST} at most", wanted())));
    }
    let net: Result<Box<dyn Module>> = match spec.backbone.family() {
        Family::ResNet => ResNet::new(init, spec, num_classes, image).map(|net| Box::new(net) as _),
        Family::EfficientNet => {
            EfficientNet::new(init, spec, num_classes, image).map(|net| Box::new(net) as _)
        }
        Family::ViT => ViT::new(init, spec, num_classes, image).map(|net| Box::new(net) as _),
    };
    net.map_err(|error| match error {
        Error::Shape { message, .. } => Error::usage(format!("{}: {message}", wanted())),
        other => other,
    })
}

/// The layers of a model in the order of the data, for one image of `image` (height, width).
///
/// # Errors
/// As [`Model::build`].
pub fn layers(spec: &Spec, num_classes: usize, image: (usize, usize)) -> Result<Vec<Layer>> {
    let net = network(&mut Init::blank(), spec, num_classes, image)?;
    let mut rows = Vec::new();
    net.describe("", &[image.0, image.1, 3], &mut rows);
    Ok(rows)
}

/// The number of parameters of a model.
///
/// # Errors
/// As [`Model::build`].
pub fn count(spec: &Spec, num_classes: usize, image: (usize, usize)) -> Result<usize> {
    let mut net = network(&mut Init::blank(), spec, num_classes, image)?;
    let mut count = 0;
    net.visit("", &mut |slot| {
        if let Value::Parameter { tensor, .. } = slot.value {
            count += tensor.numel();
        }
    });
    Ok(count)
}

/// A row of `attn2d models`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// A model string.
    pub name: String,
    /// Parameters with 1000 classes and images of 224 x 224.
    pub parameters: usize,
    /// What it is.
    pub about: &'static str,
}

/// The models to begin with: each backbone, and the two of the paper and ResNet50 with each kind of attention in the last two stages.
///
/// # Errors
/// As [`Model::build`].
pub fn list() -> Result<Vec<Listing>> {
    let mut rows = Vec::new();
    let mut add = |text: String, about| -> Result<()> {
        let spec: Spec = text.parse()?;
        let parameters = count(&spec, 1000, (224, 224))?;
        rows.push(Listing { name: spec.to_string(), parameters, about });
        Ok(())
    };
    for backbone in Backbone::ALL {
        let (name, family) = (backbone.name(), backbone.family());
        add(name.into(), family.about())?;
        if !["resnet18", "resnet50", "efficientnet_b0"].contains(&name) {
            continue;
        }
        let places = if family == Family::ResNet { "3,4" } else { "6,7" };
        for variant in Variant::ALL {
            let text = format!("{name}+{}@{places}", variant.name());
            add(text, variant.about())?;
        }
    }
    Ok(rows)
}
