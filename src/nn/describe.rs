//! What a net consists of, layer by layer, without computing it.

/// A layer of a net, as [`super::Module::describe`] tells it.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Its name in the state dict.
    pub name: String,
    /// What it is, in words.
    pub kind: String,
    /// Shape of its output for one image: H, W, C of a map, T, C of tokens, or C.
    pub output: Vec<usize>,
    /// Learned numbers.
    pub parameters: usize,
    /// Floating-point operations of its products for one image, a multiply-add counted as two. Norms, activations, softmax, position
    /// terms and pooling are not counted; keys outside the map are.
    pub flop: f64,
    /// (Query, key) pairs of all heads where it is an attention, else 0.
    pub pairs: f64,
    /// The name of the batch norm that its output goes through, where there is one.
    pub batch_norm: Option<String>,
}

impl Layer {
    /// A layer without products, such as pooling.
    pub fn new(name: &str, kind: impl Into<String>, output: &[usize], parameters: usize) -> Self {
        let (name, kind, output) = (name.into(), kind.into(), output.to_vec());
        Self { name, kind, output, parameters, flop: 0.0, pairs: 0.0, batch_norm: None }
    }

    /// The same layer with products of `flop` operations.
    pub fn with_flop(self, flop: f64) -> Self {
        Self { flop, ..self }
    }
}

/// The product of sizes.
pub(crate) fn product(sizes: &[usize]) -> f64 {
    sizes.iter().map(|&n| n as f64).product()
}
