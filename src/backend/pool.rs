//! Freed blocks kept for the next request: returning memory to the system costs page faults on a CPU and driver calls
//! on a GPU, and a training step asks for the same sizes again and again.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Free blocks by size class. `B` is a backend's own block type.
pub(crate) struct Pool<B> {
    free: Mutex<HashMap<usize, Vec<B>>>,
}

/// The bytes to reserve for a request: multiples of 256 up to 4 KiB, then eight classes per power of two (at most 12.5 % waste).
pub(crate) fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(1);
    if bytes <= 4096 {
        return bytes.next_multiple_of(256);
    }
    bytes.next_multiple_of(bytes.next_power_of_two() / 16)
}

impl<B> Pool<B> {
    pub(crate) fn new() -> Self {
        Self { free: Mutex::new(HashMap::new()) }
    }

    /// A free block of exactly this class, if there is one.
    pub(crate) fn take(&self, class: usize) -> Option<B> {
        self.lock().get_mut(&class)?.pop()
    }

    /// Keeps a block for later.
    pub(crate) fn give(&self, class: usize, block: B) {
        self.lock().entry(class).or_default().push(block);
    }

    /// Lends blocks from now on in rising order of their keys: what takes and gives the same from the same free blocks, as a
    /// step does each time, then gets the same blocks.
    #[cfg(any(feature = "cuda", feature = "cuda-emu"))]
    pub(crate) fn settle<K: Ord>(&self, key: impl Fn(&B) -> K) {
        for blocks in self.lock().values_mut() {
            blocks.sort_by_key(|block| std::cmp::Reverse(key(block)));
        }
    }

    /// Drops every free block (before giving up on an allocation).
    pub(crate) fn trim(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<usize, Vec<B>>> {
        // A panic elsewhere cannot leave the map half-changed.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_the_request_and_waste_little() {
        for bytes in [0, 1, 255, 256, 257, 4096, 4097, 100_000, 1 << 20, (1 << 20) + 1, 123_456_789]
        {
            let class = size_class(bytes);
            assert!(class >= bytes && class.is_multiple_of(256));
            assert!(bytes <= 4096 || class as f64 <= bytes as f64 * 1.13);
            assert_eq!(size_class(class), class);
        }
    }
}
