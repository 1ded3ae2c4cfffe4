//! Batches, made by threads, in an order that does not depend on them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Dataset, Draws, Image, Transform};
use crate::{Error, Result};

/// How to make batches.
#[derive(Debug, Clone)]
pub struct LoaderOptions {
    /// Pictures in a batch (the last one of an epoch may have fewer).
    pub batch_size: usize,
    /// A new order each epoch, drawn from (`seed`, epoch); otherwise the order of the indices.
    pub shuffle: bool,
    /// Leave out a last batch that is not full.
    pub drop_last: bool,
    /// Seed of order and augmentation.
    pub seed: u64,
    /// Threads that decode and augment; at least 1.
    pub threads: usize,
    /// Batches that each thread may be ahead; at least 1.
    pub queue: usize,
    /// Keep decoded pictures (at the size augmentation needs) in memory between epochs, up to this many bytes. The result is the same
    /// bits with any value.
    pub cache_bytes: usize,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        Self {
            batch_size: 32,
            shuffle: false,
            drop_last: false,
            seed: 0,
            threads: 2,
            queue: 2,
            cache_bytes: 1 << 30,
        }
    }
}

/// Pictures and labels for one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// `[n, size, size, 3]`, normalised.
    pub images: Vec<f32>,
    /// Class numbers, `n` of them.
    pub labels: Vec<u32>,
    /// Which items of the data set these are.
    pub indices: Vec<usize>,
    /// Side of the pictures in pixels.
    pub size: usize,
}

impl Batch {
    /// The shape of `images`.
    pub fn shape(&self) -> [usize; 4] {
        [self.indices.len(), self.size, self.size, 3]
    }
}

/// Makes the batches of some of a data set's items, epoch after epoch.
pub struct Loader {
    source: Arc<Source>,
    options: LoaderOptions,
}

/// What the threads share.
struct Source {
    dataset: Arc<Dataset>,
    indices: Vec<usize>,
    transform: Transform,
    seed: u64,
    cache: Cache,
}

impl Loader {
    /// A loader over the items `indices` of `dataset`. Errors: `Usage` for a batch size of 0, no items, an index the data set does not
    /// have, or a transform whose numbers make no sense.
    pub fn new(
        dataset: Arc<Dataset>,
        indices: Vec<usize>,
        transform: Transform,
        options: LoaderOptions,
    ) -> Result<Self> {
        transform.check()?;
        if options.batch_size == 0 {
            return Err(Error::usage("batch size 0: expected at least 1"));
        }
        if indices.is_empty() {
            return Err(Error::usage(format!(
                "{}: no items to load; this part of the split is empty",
                dataset.name
            )));
        }
        if options.drop_last && indices.len() < options.batch_size {
            let (have, want) = (indices.len(), options.batch_size);
            return Err(Error::usage(format!(
                "{}: {have} items are fewer than one batch of {want}; use a smaller batch size",
                dataset.name
            )));
        }
        if let Some(index) = indices.iter().find(|&&index| index >= dataset.len()) {
            return Err(Error::usage(format!(
                "{}: there is no item {index}, the data set has {}",
                dataset.name,
                dataset.len()
            )));
        }
        let cache = Cache::new(dataset.len(), options.cache_bytes);
        let source = Source { dataset, indices, transform, seed: options.seed, cache };
        Ok(Self { source: Arc::new(source), options })
    }

    /// The number of items.
    pub fn len(&self) -> usize {
        self.source.indices.len()
    }

    /// Never: a loader has at least one item.
    pub fn is_empty(&self) -> bool {
        self.source.indices.is_empty()
    }

    /// Batches in an epoch.
    pub fn batches(&self) -> usize {
        let (items, size) = (self.source.indices.len(), self.options.batch_size);
        if self.options.drop_last { items / size } else { items.div_ceil(size) }
    }

    /// The order of items in `epoch`.
    fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order = self.source.indices.clone();
        if self.options.shuffle {
            Draws::new(&[self.options.seed, epoch]).shuffle(&mut order);
        }
        order
    }

    /// The batches of `epoch` from number `first` on (0 for all), which is how a run that was stopped goes on in the middle. Threads start
    /// at once and stop when the iterator is dropped. Errors: `Usage` where threads cannot be started.
    pub fn epoch(&self, epoch: u64, first: usize) -> Result<Batches> {
        let order: Arc<[usize]> = self.order(epoch).into();
        let (size, total) = (self.options.batch_size, self.batches());
        let threads = self.options.threads.clamp(1, total.saturating_sub(first).max(1));
        let (mut queues, mut workers) = (Vec::new(), Vec::new());
        // Thread t makes every threads-th batch and has a queue of its own, so that the queues in turn give the batches in order.
        for thread in 0..threads {
            let (sender, receiver) = sync_channel(self.options.queue.max(1));
            let (source, order) = (Arc::clone(&self.source), Arc::clone(&order));
            let work = move || {
                for batch in (first + thread..total).step_by(threads) {
                    let items = &order[batch * size..((batch + 1) * size).min(order.len())];
                    if !send(&sender, source.batch(epoch, items)) {
                        break;
                    }
                }
            };
            let started = std::thread::Builder::new().name(format!("data-{thread}")).spawn(work);
            workers.push(started.map_err(|error| {
                Error::usage(format!("cannot start a data thread ({error}); use fewer"))
            })?);
            queues.push(receiver);
        }
        Ok(Batches {
            queues,
            workers,
            next: first,
            first,
            total,
            waited: Duration::ZERO,
            last_wait: Duration::ZERO,
        })
    }
}

/// Hands a batch over; false where there will be no use for another one.
fn send(sender: &SyncSender<Result<Batch>>, batch: Result<Batch>) -> bool {
    let failed = batch.is_err();
    sender.send(batch).is_ok() && !failed
}

impl Source {
    fn batch(&self, epoch: u64, items: &[usize]) -> Result<Batch> {
        let size = self.transform.size;
        let mut images = vec![0.0; items.len() * size * size * 3];
        for (&index, out) in items.iter().zip(images.chunks_exact_mut(size * size * 3)) {
            let decode = || self.dataset.image(index).map(|image| self.transform.prepare(&image));
            // The third word keeps the draws of pictures apart from those of the order, whose key has two.
            let draws = Draws::new(&[self.seed, epoch, index as u64]);
            self.cache.with(index, decode, |image| self.transform.finish(image, draws, out))?;
        }
        let labels = items.iter().map(|&index| self.dataset.items[index].label).collect();
        Ok(Batch { images, labels, indices: items.to_vec(), size })
    }
}

/// Pictures that were prepared before, until memory for them is used up.
struct Cache {
    slots: Vec<OnceLock<Image>>,
    free: AtomicUsize,
}

impl Cache {
    fn new(items: usize, bytes: usize) -> Self {
        let slots =
            if bytes == 0 { Vec::new() } else { (0..items).map(|_| OnceLock::new()).collect() };
        Self { slots, free: AtomicUsize::new(bytes) }
    }

    /// Calls `work` with the picture of `index`, decoding it only if it is not held.
    fn with(
        &self,
        index: usize,
        decode: impl FnOnce() -> Result<Image>,
        work: impl FnOnce(&Image),
    ) -> Result<()> {
        let slot = self.slots.get(index);
        if let Some(image) = slot.and_then(OnceLock::get) {
            work(image);
            return Ok(());
        }
        let image = decode()?;
        work(&image);
        if let Some(slot) = slot {
            let bytes = image.pixels.len();
            let reserved = self
                .free
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(bytes))
                .is_ok();
            // Another thread may have been first; then there is nothing to keep.
            if reserved && slot.set(image).is_err() {
                self.free.fetch_add(bytes, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

/// The batches of one epoch, in order. Ends after the first error.
pub struct Batches {
    queues: Vec<Receiver<Result<Batch>>>,
    workers: Vec<JoinHandle<()>>,
    next: usize,
    first: usize,
    total: usize,
    waited: Duration,
    last_wait: Duration,
}

impl Batches {
    /// Time spent waiting for data so far: what training would save if data cost nothing.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Time spent waiting for the latest batch.
    pub fn last_wait(&self) -> Duration {
        self.last_wait
    }
}

impl Iterator for Batches {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.total {
            return None;
        }
        let queue = &self.queues[(self.next - self.first) % self.queues.len()];
        let start = Instant::now();
        let batch = queue.recv().unwrap_or_else(|_| {
            // A thread that ends without a word has panicked; its message is on the terminal.
            Err(Error::usage("a data thread stopped unexpectedly while making a batch; this is a bug, please report it"))
        });
        self.last_wait = start.elapsed();
        self.waited += self.last_wait;
        self.next = if batch.is_err() { self.total } else { self.next + 1 };
        Some(batch)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.total.saturating_sub(self.next);
        (0, Some(left))
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        // Closing the queues makes the threads' next send fail.
        self.queues.clear();
        for worker in self.workers.drain(..) {
            // A panic was reported by `next`, or nobody waited for that batch.
            let _ = worker.join();
        }
    }
}
