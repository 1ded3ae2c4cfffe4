//! Launches of a step, recorded and run as one graph: what needs no driver, shared by the hardware and the emulated device.
//!
//! Inside [`crate::Device::step`] nothing runs at once: launches and copies on the device become a list of nodes. Where the list
//! ends (at the step's end, or before the host writes or reads), it is compared with those that were run before. One that has
//! the same kernels in the same order has a graph already: only its nodes whose arguments changed are updated, and the graph
//! runs. Else a graph is built. So learning rates, seeds, grids and addresses may change from step to step, and no op knows.

use super::GraphCounts;
use super::cuda_launch::Launch;
use super::notice::{Notice, tell};
use crate::error::{Error, Result};

/// Graphs that a device keeps: those of a training step, of an evaluation, and of some shapes that alternate.
const KEPT: usize = 8;

/// One thing to do. `P` is where a binding lies, as the device says it.
#[derive(Clone, PartialEq)]
pub(crate) enum Node<P> {
    Kernel { launch: Launch, params: Vec<u8>, bindings: Vec<P> },
    Copy { from: P, to: P, bytes: usize },
}

impl<P: PartialEq> Node<P> {
    /// Whether a graph's node for `self` can be made to do `other` by giving it other arguments.
    fn does_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Kernel { launch: a, .. }, Self::Kernel { launch: b, .. }) => a.entry == b.entry,
            (Self::Copy { .. }, Self::Copy { .. }) => true,
            _ => false,
        }
    }
}

/// Why a graph did not run.
pub(crate) enum Refusal {
    /// The device cannot do it as a graph; launches one by one may do.
    Graph(String),
    /// The work itself is at fault.
    Work(Error),
}

/// What a device does with nodes.
pub(crate) trait Graphs<P> {
    type Graph;
    fn build(&mut self, nodes: &[Node<P>]) -> Result<Self::Graph, Refusal>;
    /// Gives node `index` of a graph other arguments.
    fn update(
        &mut self,
        graph: &mut Self::Graph,
        index: usize,
        node: &Node<P>,
    ) -> Result<(), Refusal>;
    fn replay(&mut self, graph: &Self::Graph) -> Result<(), Refusal>;
    /// Runs one node without a graph.
    fn run(&mut self, node: &Node<P>) -> Result<()>;
}

struct Kept<P, G> {
    nodes: Vec<Node<P>>,
    graph: G,
}

/// The steps of one device.
pub(crate) struct Recorder<P, G> {
    /// What is asked for and not yet run; `None` outside a step.
    open: Option<Vec<Node<P>>>,
    /// The last used stands last.
    kept: Vec<Kept<P, G>>,
    /// The device refused a graph: everything is launched one by one from then on.
    off: bool,
    counts: GraphCounts,
}

impl<P: PartialEq, G> Recorder<P, G> {
    pub(crate) fn new() -> Self {
        Self { open: None, kept: Vec::new(), off: false, counts: GraphCounts::default() }
    }

    /// Starts a step; `false` where one has begun already (this one is a part of it) or graphs do not work here.
    pub(crate) fn begin(&mut self) -> bool {
        let begins = self.open.is_none() && !self.off;
        if begins {
            self.open = Some(Vec::new());
        }
        begins
    }

    /// Ends the step without running what is left of it.
    pub(crate) fn cancel(&mut self) {
        self.open = None;
    }

    pub(crate) fn counts(&self) -> GraphCounts {
        self.counts
    }

    /// Inside a step, keeps the node for later; else runs it.
    pub(crate) fn ask<D: Graphs<P, Graph = G>>(
        &mut self,
        node: Node<P>,
        device: &mut D,
    ) -> Result<()> {
        match &mut self.open {
            Some(nodes) => nodes.push(node),
            None => device.run(&node)?,
        }
        Ok(())
    }

    /// Runs what was kept so far; the step goes on.
    pub(crate) fn flush<D: Graphs<P, Graph = G>>(&mut self, device: &mut D) -> Result<()> {
        let nodes = self.open.as_mut().map(std::mem::take).unwrap_or_default();
        if nodes.is_empty() {
            return Ok(());
        }
        let ran =
            self.graph_of(&nodes, device).and_then(|graph| device.replay(&graph).map(|()| graph));
        match ran {
            Ok(graph) => {
                self.counts.runs += 1;
                self.counts.nodes += nodes.len();
                self.kept.push(Kept { nodes, graph });
                if self.kept.len() > KEPT {
                    self.kept.remove(0);
                }
                Ok(())
            }
            Err(Refusal::Work(e)) => Err(e),
            Err(Refusal::Graph(why)) => {
                self.off = true;
                self.open = None;
                self.kept.clear();
                tell(&Notice::Warning(&format!(
                    "CUDA graphs do not work here ({why}): kernels are launched one by one"
                )));
                nodes.iter().try_for_each(|node| device.run(node))
            }
        }
    }

    /// The graph that does these nodes: a kept one, taken out and updated, or a new one.
    fn graph_of<D: Graphs<P, Graph = G>>(
        &mut self,
        nodes: &[Node<P>],
        device: &mut D,
    ) -> Result<G, Refusal> {
        let fits = |kept: &Kept<P, G>| {
            kept.nodes.len() == nodes.len()
                && kept.nodes.iter().zip(nodes).all(|(old, new)| old.does_as(new))
        };
        if let Some(i) = self.kept.iter().position(fits) {
            let mut kept = self.kept.remove(i);
            let pairs = kept.nodes.iter().zip(nodes).enumerate();
            let changed: Vec<usize> = pairs.filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect();
            let update = |i: &usize| device.update(&mut kept.graph, *i, &nodes[*i]);
            match changed.iter().try_for_each(update) {
                Ok(()) => {
                    self.counts.updated += changed.len();
                    return Ok(kept.graph);
                }
                // Some changes a driver takes only in a new graph.
                Err(Refusal::Graph(_)) => {}
                Err(refusal) => return Err(refusal),
            }
        }
        let graph = device.build(nodes)?;
        self.counts.built += 1;
        Ok(graph)
    }
}

#[cfg(test)]
#[path = "recorded_tests.rs"]
mod tests;
