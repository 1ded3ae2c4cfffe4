//! The flat store of all that a model owns.

use super::state::{file_shape, from_file, to_file};
use super::{Counter, Module, Slot, StateArray, StateDict, Value};
use crate::error::{Error, Result};
use crate::ops::case::Layout;
use crate::tape::Gradients;
use crate::tensor::{ALIGN, Tensor};
use std::collections::BTreeSet;

/// Everything a model owns, in flat buffers and by name.
///
/// Parameters stand one after the other in one buffer, each at a multiple of [`ALIGN`] elements, with zeros between; the
/// gradient buffer is laid out alike. So an optimiser step, a norm over all gradients or an exchange between devices is
/// one operation. Running statistics have a buffer of their own: a kernel may not read and write one buffer at once.
pub struct Parameters {
    values: Flat,
    gradients: Tensor,
    decay: Tensor,
    /// `None` for a model without batch norms.
    statistics: Option<Flat>,
    counters: Vec<(String, Counter)>,
}

/// Tensors in one buffer.
struct Flat {
    data: Tensor,
    entries: Vec<Entry>,
}

struct Entry {
    name: String,
    start: usize,
    layout: Layout,
    decay: bool,
    frozen: bool,
    /// The tensor that the module computes with. A parameter's is a leaf, unless it is frozen.
    tensor: Tensor,
}

/// How a state dict and a model differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Names of the model that the state dict has not.
    pub missing: Vec<String>,
    /// Names of the state dict that the model has not.
    pub unexpected: Vec<String>,
    /// Names of both, with unlike shapes.
    pub reshaped: Vec<Reshaped>,
}

/// One array that has another shape in a state dict than in the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reshaped {
    /// Its name.
    pub name: String,
    /// Its shape in the state dict.
    pub found: Vec<usize>,
    /// Its shape in the model, in the layout of files.
    pub expected: Vec<usize>,
}

impl Parameters {
    /// Moves all that `module` owns into flat buffers on the device where it is. Its parameters become leaves that want
    /// a gradient.
    ///
    /// # Errors
    /// [`Error::Shape`] for a module that owns no parameter or two things of one name, else [`Error::Device`].
    pub fn flatten(module: &mut dyn Module) -> Result<Self> {
        let (mut parameters, mut statistics, mut counters) = (Vec::new(), Vec::new(), Vec::new());
        let entry = |name, tensor: &Tensor, layout, decay| Entry {
            name,
            start: 0,
            layout,
            decay,
            frozen: false,
            tensor: tensor.clone(),
        };
        module.visit("", &mut |Slot { name, value }| match value {
            Value::Parameter { tensor, layout, decay } => {
                parameters.push(entry(name, tensor, layout, decay));
            }
            Value::Buffer(tensor) => statistics.push(entry(name, tensor, Layout::Plain, false)),
            Value::Counter(counter) => counters.push((name, counter.clone())),
        });
        let values = Flat::new(parameters, true)?
            .ok_or_else(|| Error::shape("flatten", "the module owns no parameter"))?;
        let (device, shape) = (values.data.device(), values.data.shape());
        let gradients = Tensor::zeros(device, shape)?;
        let decay = Tensor::from_f32(device, shape, &values.decay_mask(false))?;
        let statistics = Flat::new(statistics, false)?;
        let this = Self { values, gradients, decay, statistics, counters };
        this.check_names()?;
        this.rehome(module);
        Ok(this)
    }

    fn check_names(&self) -> Result<()> {
        let mut seen = BTreeSet::new();
        match self.names().find(|name| !seen.insert(*name)) {
            Some(name) => Err(Error::shape("flatten", format!("two tensors are called '{name}'"))),
            None => Ok(()),
        }
    }

    /// Gives the module its tensors in the flat buffers, in the order in which it showed them.
    fn rehome(&self, module: &mut dyn Module) {
        let mut parameters = self.values.entries.iter();
        let mut statistics = self.statistics.iter().flat_map(|flat| &flat.entries);
        module.visit("", &mut |slot| {
            let (home, entry) = match slot.value {
                Value::Parameter { tensor, .. } => (tensor, parameters.next()),
                Value::Buffer(tensor) => (tensor, statistics.next()),
                Value::Counter(_) => return,
            };
            if let Some(entry) = entry {
                *home = entry.tensor.clone();
            }
        });
    }

    /// Freezes the parameters whose names `which` picks: they want no gradient any more, so no backward works for them, and an
    /// optimiser step by [`Parameters::decay_mask`] leaves them as they are to the bit (gradient and decay are 0). A batch norm whose
    /// weight and bias are both frozen stays in evaluation mode. `module` is what was flattened; state of an optimiser must begin
    /// after this.
    ///
    /// # Errors
    /// [`Error::Usage`] where nothing would be left to train, else [`Error::Device`].
    pub fn freeze(&mut self, module: &mut dyn Module, which: impl Fn(&str) -> bool) -> Result<()> {
        for entry in self.values.entries.iter_mut().filter(|e| which(&e.name)) {
            entry.frozen = true;
            entry.tensor = entry.tensor.detach();
        }
        if self.values.entries.iter().all(|e| e.frozen) {
            return Err(Error::usage("every parameter is frozen: nothing is left to train"));
        }
        for (name, counter) in &self.counters {
            let norm = name.strip_suffix("num_batches_tracked").unwrap_or(name);
            if self.is_frozen(&format!("{norm}weight")) && self.is_frozen(&format!("{norm}bias")) {
                counter.freeze();
            }
        }
        self.decay.write_f32(&self.values.decay_mask(false))?;
        self.rehome(module);
        Ok(())
    }

    /// Whether a parameter of this name is frozen.
    pub fn is_frozen(&self, name: &str) -> bool {
        self.values.entries.iter().any(|e| e.name == name && e.frozen)
    }

    /// 1 where a parameter is not frozen and 0 where it is, laid out as [`Parameters::values`]: the mask of an optimiser whose weight
    /// decay spares nothing. `None` where nothing is frozen.
    ///
    /// # Errors
    /// [`Error::Device`] when memory runs out.
    pub fn trained_mask(&self) -> Result<Option<Tensor>> {
        if self.values.entries.iter().all(|e| !e.frozen) {
            return Ok(None);
        }
        let values = &self.values.data;
        Tensor::from_f32(values.device(), values.shape(), &self.values.decay_mask(true)).map(Some)
    }

    /// All parameters, flat: what an optimiser step changes.
    pub fn values(&self) -> &Tensor {
        &self.values.data
    }

    /// All running statistics, flat; `None` for a model without batch norms.
    pub fn statistics(&self) -> Option<&Tensor> {
        self.statistics.as_ref().map(|flat| &flat.data)
    }

    /// Their gradients as of the last [`Parameters::gather`], laid out as [`Parameters::values`].
    pub fn gradients(&self) -> &Tensor {
        &self.gradients
    }

    /// 1 where weight decay applies and 0 where not or where a parameter is frozen, laid out as [`Parameters::values`].
    pub fn decay_mask(&self) -> &Tensor {
        &self.decay
    }

    /// The number of learned numbers, as papers count them.
    pub fn count(&self) -> usize {
        self.values.entries.iter().map(|e| e.tensor.numel()).sum()
    }

    /// How many of them are not frozen.
    pub fn count_trained(&self) -> usize {
        self.values.entries.iter().filter(|e| !e.frozen).map(|e| e.tensor.numel()).sum()
    }

    /// Names of the parameters, in the order of the flat buffer.
    pub fn parameter_names(&self) -> impl Iterator<Item = &str> {
        self.values.entries.iter().map(|e| &*e.name)
    }

    /// Names of parameters, running statistics and counters: the names of a state dict.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let statistics = self.statistics.iter().flat_map(|flat| &flat.entries).map(|e| &*e.name);
        let counters = self.counters.iter().map(|(name, _)| &**name);
        self.parameter_names().chain(statistics).chain(counters)
    }

    /// The parameter of this name, in the crate's layout.
    pub fn parameter(&self, name: &str) -> Option<&Tensor> {
        self.values.entries.iter().find(|e| e.name == name).map(|e| &e.tensor)
    }

    /// Copies the gradients of a backward into the flat gradient buffer; those of frozen parameters stay 0.
    ///
    /// # Errors
    /// [`Error::Autograd`] naming a parameter that the loss does not depend on.
    pub fn gather(&self, gradients: &Gradients) -> Result<()> {
        for entry in self.values.entries.iter().filter(|e| !e.frozen) {
            let gradient = gradients.get(&entry.tensor).ok_or_else(|| {
                Error::Autograd(format!("no gradient reached parameter '{}'", entry.name))
            })?;
            self.gradients.copy_range_from(entry.start, gradient)?;
        }
        Ok(())
    }

    /// Everything by name, in the layout of files.
    ///
    /// # Errors
    /// [`Error::Device`] when the device is lost.
    pub fn state(&self) -> Result<StateDict> {
        let mut dict = StateDict::default();
        for flat in self.flats() {
            flat.export(&flat.data, &mut dict)?;
        }
        for (name, counter) in &self.counters {
            dict.arrays.insert(name.clone(), StateArray::count(counter.get()));
        }
        Ok(dict)
    }

    /// A tensor that is laid out as [`Parameters::values`] (gradients, an optimiser's momentum) by the parameters' names, in
    /// the layout of files.
    ///
    /// # Errors
    /// [`Error::Shape`] for a tensor of another length.
    pub fn export(&self, flat: &Tensor) -> Result<StateDict> {
        let mut dict = StateDict::default();
        self.values.export(flat, &mut dict)?;
        Ok(dict)
    }

    /// Writes what [`Parameters::export`] gave back into a tensor that is laid out as [`Parameters::values`].
    ///
    /// # Errors
    /// [`Error::Shape`] for a tensor of another length, [`Error::File`] naming a parameter that is missing or has another
    /// shape.
    pub fn import(&self, flat: &Tensor, dict: &StateDict) -> Result<()> {
        self.values.check_length("import", flat)?;
        for entry in &self.values.entries {
            let expected = file_shape(entry.layout, entry.tensor.shape());
            let found = dict.arrays.get(&entry.name).map(|array| &array.shape);
            if found != Some(&expected) {
                let found = found.map_or("is missing".into(), |shape| format!("is {shape:?}"));
                let message = format!("'{}' {found}, expected {expected:?}", entry.name);
                return Err(Error::file(&dict.source, message));
            }
        }
        self.values.import(flat, dict)
    }

    /// How a state dict differs from what the model owns.
    pub fn compare(&self, dict: &StateDict) -> Differences {
        let known: BTreeSet<&str> = self.names().collect();
        let mut differences = Differences::default();
        let absent = |name: &&str| !dict.arrays.contains_key(*name);
        differences.missing = self.names().filter(absent).map(str::to_string).collect();
        let strangers = dict.arrays.keys().filter(|name| !known.contains(name.as_str()));
        differences.unexpected = strangers.cloned().collect();
        let mut compare = |name: &str, expected: Vec<usize>| match dict.arrays.get(name) {
            Some(array) if array.shape != expected => {
                let found = array.shape.clone();
                differences.reshaped.push(Reshaped { name: name.into(), found, expected });
            }
            _ => {}
        };
        for entry in self.flats().flat_map(|flat| &flat.entries) {
            compare(&entry.name, file_shape(entry.layout, entry.tensor.shape()));
        }
        for (name, _) in &self.counters {
            compare(name, Vec::new());
        }
        differences
    }

    /// Takes over every array whose name and shape fit; the rest of the model stays as it is. Ask [`Parameters::compare`]
    /// first what that leaves out.
    ///
    /// # Errors
    /// [`Error::Device`] when the device is lost.
    pub fn load(&self, dict: &StateDict) -> Result<()> {
        for flat in self.flats() {
            flat.import(&flat.data, dict)?;
        }
        for (name, counter) in &self.counters {
            if let Some(count) = dict.arrays.get(name).and_then(StateArray::to_count) {
                counter.set(count);
            }
        }
        Ok(())
    }

    fn flats(&self) -> impl Iterator<Item = &Flat> {
        [&self.values].into_iter().chain(&self.statistics)
    }
}

impl Flat {
    /// Copies the entries' tensors into one buffer and makes them views of it; `None` if there is nothing to hold.
    fn new(mut entries: Vec<Entry>, leaves: bool) -> Result<Option<Self>> {
        let Some(first) = entries.first() else { return Ok(None) };
        let device = first.tensor.device().clone();
        let mut len = 0;
        for entry in &mut entries {
            entry.start = len;
            len += entry.tensor.numel().next_multiple_of(ALIGN);
        }
        let data = Tensor::zeros(&device, &[len])?;
        for entry in &mut entries {
            data.copy_range_from(entry.start, &entry.tensor)?;
            let view = data.view(entry.start, entry.tensor.shape())?;
            entry.tensor = if leaves { view.requires_grad() } else { view };
        }
        Ok(Some(Self { data, entries }))
    }

    /// 1 where weight decay applies, or everywhere for `all`, but 0 for what is frozen.
    fn decay_mask(&self, all: bool) -> Vec<f32> {
        let mut mask = vec![0.0; self.data.numel()];
        for entry in self.entries.iter().filter(|e| (all || e.decay) && !e.frozen) {
            mask[entry.range()].fill(1.0);
        }
        mask
    }

    /// Adds the entries' parts of `flat` to a state dict. One read: a GPU answers each with a wait.
    fn export(&self, flat: &Tensor, dict: &mut StateDict) -> Result<()> {
        self.check_length("export", flat)?;
        let data = flat.to_f32()?;
        for entry in &self.entries {
            let shape = entry.tensor.shape();
            let part = to_file(entry.layout, shape, &data[entry.range()]);
            let array = StateArray::f32(&file_shape(entry.layout, shape), part);
            dict.arrays.insert(entry.name.clone(), array);
        }
        Ok(())
    }

    fn check_length(&self, op: &'static str, flat: &Tensor) -> Result<()> {
        if flat.shape() == self.data.shape() {
            return Ok(());
        }
        let message = format!("expected {:?}, got {:?}", self.data.shape(), flat.shape());
        Err(Error::shape(op, message))
    }

    /// Overwrites the entries' parts of `flat` with the arrays that fit.
    fn import(&self, flat: &Tensor, dict: &StateDict) -> Result<()> {
        let mut data = flat.to_f32()?;
        for entry in &self.entries {
            let shape = entry.tensor.shape();
            let Some(array) = dict.arrays.get(&entry.name) else { continue };
            if array.shape == file_shape(entry.layout, shape) {
                let part = from_file(entry.layout, shape, &array.to_f32());
                data[entry.range()].copy_from_slice(&part);
            }
        }
        flat.write_f32(&data)
    }
}

impl Entry {
    fn range(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.tensor.numel()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::nn::{Mode, parameter};
    use crate::ops::add;

    /// y = x + a; b is not used.
    struct Tiny {
        names: [&'static str; 2],
        a: Tensor,
        b: Tensor,
    }

    impl Tiny {
        fn new(names: [&'static str; 2]) -> Self {
            let device = &Device::cpu();
            let a = Tensor::from_f32(device, &[2], &[1.0, 2.0]).unwrap();
            Self { names, a, b: Tensor::full(device, &[1, 1, 2, 3], 5.0).unwrap() }
        }
    }

    impl Module for Tiny {
        fn forward(&self, x: &Tensor, _: &Mode) -> Result<Tensor> {
            add(x, &self.a)
        }

        fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
            parameter(f, prefix, self.names[0], &mut self.a, Layout::Plain, true);
            parameter(f, prefix, self.names[1], &mut self.b, Layout::Weight, false);
        }
    }

    #[test]
    fn a_module_computes_with_the_flat_values() {
        let mut tiny = Tiny::new(["a", "b"]);
        let parameters = Parameters::flatten(&mut tiny).unwrap();
        assert_eq!(parameters.count(), 8);
        assert_eq!(parameters.values().shape(), [2 * ALIGN]);
        let mut flat = parameters.values().to_f32().unwrap();
        assert_eq!((flat[..3].to_vec(), flat[ALIGN]), (vec![1.0, 2.0, 0.0], 5.0));
        flat[1] = 7.0;
        parameters.values().write_f32(&flat).unwrap();
        let x = Tensor::zeros(parameters.values().device(), &[2]).unwrap();
        assert_eq!(tiny.forward(&x, &Mode::EVAL).unwrap().to_f32().unwrap(), [1.0, 7.0]);
        assert_eq!(parameters.state().unwrap().arrays["b"].shape, [1, 3, 1, 2]);
    }

    #[test]
    fn a_parameter_without_a_gradient_is_an_error() {
        let mut tiny = Tiny::new(["a", "b"]);
        let parameters = Parameters::flatten(&mut tiny).unwrap();
        let x = Tensor::zeros(parameters.values().device(), &[2]).unwrap();
        let y = tiny.forward(&x, &Mode::EVAL).unwrap();
        let error = parameters.gather(&y.backward_with(&x).unwrap()).unwrap_err().to_string();
        assert!(error.contains("no gradient reached parameter 'b'"), "{error}");
    }

    #[test]
    fn what_is_frozen_wants_no_gradient_and_stays() {
        let mut tiny = Tiny::new(["a", "b"]);
        let mut parameters = Parameters::flatten(&mut tiny).unwrap();
        assert!(parameters.trained_mask().unwrap().is_none());
        parameters.freeze(&mut tiny, |name| name == "b").unwrap();
        assert_eq!((parameters.count(), parameters.count_trained()), (8, 2));
        let mask = parameters.trained_mask().unwrap().unwrap().to_f32().unwrap();
        assert_eq!((mask[0], mask[ALIGN]), (1.0, 0.0));
        let x = Tensor::zeros(parameters.values().device(), &[2]).unwrap();
        let y = tiny.forward(&x, &Mode::EVAL).unwrap();
        // No gradient reaches b, and none is missed.
        parameters.gather(&y.backward_with(&y.full_like(3.0).unwrap()).unwrap()).unwrap();
        let gradients = parameters.gradients().to_f32().unwrap();
        assert_eq!((gradients[0], gradients[ALIGN]), (3.0, 0.0));
        let error = parameters.freeze(&mut tiny, |_| true).unwrap_err().to_string();
        assert!(error.contains("nothing is left to train"), "{error}");
    }

    #[test]
    fn two_things_of_one_name_are_refused() {
        let error = Parameters::flatten(&mut Tiny::new(["a", "a"])).err().unwrap().to_string();
        assert!(error.contains("two tensors are called 'a'"), "{error}");
    }
}
