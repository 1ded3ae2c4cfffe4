//! What the threads of a CPU kernel keep (scratch memory) and what they share (an output each writes its own places
//! of).

use std::cell::RefCell;
use std::marker::PhantomData;

thread_local! {
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `len` floats of unspecified content that this thread keeps for next time: fresh memory from the
/// system costs a page fault every 4 KiB, which is often more than the arithmetic done on it. Calls may be nested.
pub(crate) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    let result = f(&mut buffer[..len]);
    FREE.with_borrow_mut(|free| free.push(buffer));
    result
}

/// A mutable slice that several threads write at places of their own, where those places are no contiguous chunks
/// (columns of a matrix).
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<'a> {
    start: *mut f32,
    len: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer comes from an exclusive borrow that lives as long as this value, and whoever writes through it
// promises (`ptr`, `slice`) that no two threads touch the same place.
unsafe impl Send for SharedMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedMut<'_> {}

impl<'a> SharedMut<'a> {
    pub(crate) fn new(slice: &'a mut [f32]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// The first element. To write through it is unsafe: stay inside the slice, and off the places of other threads.
    pub(crate) fn ptr(&self) -> *mut f32 {
        self.start
    }

    /// Elements `from..from + len`.
    ///
    /// # Safety
    /// No other thread touches them while the result lives.
    ///
    /// # Panics
    /// Where the range leaves the slice.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, from: usize, len: usize) -> &mut [f32] {
        assert!(
            from <= self.len && len <= self.len - from,
            "a thread's part lies outside the output"
        );
        // SAFETY: inside the borrowed slice; the caller keeps other threads away.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_kept_and_nests() {
        let first = with_scratch(1000, |a| {
            a.fill(1.0);
            with_scratch(10, |b| b.fill(2.0));
            assert!(a.iter().all(|&v| v == 1.0), "the inner scratch is another buffer");
            a.as_ptr()
        });
        // The outer buffer was given back last, so it is handed out first.
        assert_eq!(first, with_scratch(1000, |a| a.as_ptr()));
    }

    #[test]
    #[should_panic(expected = "outside the output")]
    fn parts_outside_are_refused() {
        let mut v = [0.0; 4];
        // SAFETY: nobody else has the slice.
        unsafe { SharedMut::new(&mut v).slice(3, 2) };
    }
}
