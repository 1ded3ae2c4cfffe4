//! A state dict: named arrays on the host in PyTorch's layouts, as files hold them.

use crate::ops::case::Layout;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Named arrays with PyTorch's names and layouts (convolution weights OIHW).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StateDict {
    /// Where it was read from, for messages; empty if it was not.
    pub source: PathBuf,
    /// Text beside the arrays: the model string, class names.
    pub metadata: BTreeMap<String, String>,
    /// The arrays.
    pub arrays: BTreeMap<String, StateArray>,
}

/// One array of a state dict, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct StateArray {
    /// Sizes along each axis; empty for a single number.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Data,
}

/// Elements of a [`StateArray`]. Files with other float types are converted when they are read.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// Floating point.
    F32(Vec<f32>),
    /// Counts and labels.
    I64(Vec<i64>),
}

impl StateArray {
    /// An array of floats.
    pub fn f32(shape: &[usize], data: Vec<f32>) -> Self {
        debug_assert_eq!(shape.iter().product::<usize>(), data.len());
        Self { shape: shape.to_vec(), data: Data::F32(data) }
    }

    /// A single whole number.
    pub fn count(n: u64) -> Self {
        Self { shape: Vec::new(), data: Data::I64(vec![n as i64]) }
    }

    /// The elements as floats, whatever their type in the file.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            Data::F32(v) => v.clone(),
            Data::I64(v) => v.iter().map(|n| *n as f32).collect(),
        }
    }

    /// The number of a one-element array; `None` if it has more, or is negative.
    pub fn to_count(&self) -> Option<u64> {
        match &self.data {
            Data::I64(v) if v.len() == 1 => u64::try_from(v[0]).ok(),
            Data::F32(v) if v.len() == 1 && v[0] >= 0.0 => Some(v[0] as u64),
            _ => None,
        }
    }
}

/// The shape that a tensor of the crate has in files.
pub(crate) fn file_shape(layout: Layout, shape: &[usize]) -> Vec<usize> {
    match (layout, shape) {
        (Layout::Weight | Layout::Image, &[n, h, w, c]) => vec![n, c, h, w],
        _ => shape.to_vec(),
    }
}

/// Elements of a tensor of the crate, of the crate's `shape`, in the order of files.
pub(crate) fn to_file(layout: Layout, shape: &[usize], data: &[f32]) -> Vec<f32> {
    match (layout, shape) {
        (Layout::Weight | Layout::Image, &[_, h, w, c]) => transpose(data, h * w, c),
        _ => data.to_vec(),
    }
}

/// Elements in the order of files, in the order of the crate for a tensor of the crate's `shape`.
pub(crate) fn from_file(layout: Layout, shape: &[usize], data: &[f32]) -> Vec<f32> {
    match (layout, shape) {
        (Layout::Weight | Layout::Image, &[_, h, w, c]) => transpose(data, c, h * w),
        _ => data.to_vec(),
    }
}

/// Transposes each `rows` x `cols` matrix of a stack of them.
fn transpose(data: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(data.len());
    for matrix in data.chunks_exact(rows * cols) {
        for col in 0..cols {
            out.extend((0..rows).map(|row| matrix[row * cols + col]));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_oihw_in_files() {
        let shape = [2, 3, 1, 4]; // O kh kw I
        let data: Vec<f32> = (0..24).map(|i| i as f32).collect();
        assert_eq!(file_shape(Layout::Weight, &shape), [2, 4, 3, 1]);
        let file = to_file(Layout::Weight, &shape, &data);
        // o = 1, i = 2, y = 1: at ((1 * 4) + 2) * 3 + 1 in the file, at ((1 * 3) + 1) * 4 + 2 here.
        assert_eq!(file[19], data[18]);
        assert_eq!(from_file(Layout::Weight, &shape, &file), data);
        assert_eq!(to_file(Layout::Plain, &[24], &data), data);
    }
}
