//! Recording, comparing and deciding what to update, on a device that only writes down what it is told.

use super::*;
use crate::kernel::{CudaPlan, CudaText};
use crate::tensor::DType;

/// What the device was told, in order. Its graphs are what they would run.
#[derive(Default)]
struct Log {
    told: Vec<String>,
    /// Calls that it refuses, by their first word.
    refuses: &'static str,
}

impl Log {
    fn tell(&mut self, word: &str, rest: String) -> Result<(), Refusal> {
        if self.refuses.split(' ').any(|r| r == word) {
            return Err(Refusal::Graph(format!("no {word}")));
        }
        self.told.push(format!("{word} {rest}"));
        Ok(())
    }
}

fn show(node: &Node<u32>) -> String {
    match node {
        Node::Kernel { launch, params, bindings } => {
            format!("{}{params:?}{bindings:?}", launch.entry)
        }
        Node::Copy { from, to, bytes } => format!("copy {from}>{to}:{bytes}"),
    }
}

fn list(nodes: &[Node<u32>]) -> String {
    nodes.iter().map(show).collect::<Vec<_>>().join(" ")
}

impl Graphs<u32> for Log {
    type Graph = Vec<Node<u32>>;

    fn build(&mut self, nodes: &[Node<u32>]) -> Result<Self::Graph, Refusal> {
        self.tell("build", list(nodes))?;
        Ok(nodes.to_vec())
    }

    fn update(
        &mut self,
        graph: &mut Self::Graph,
        index: usize,
        node: &Node<u32>,
    ) -> Result<(), Refusal> {
        self.tell("update", format!("{index} {}", show(node)))?;
        graph[index] = node.clone();
        Ok(())
    }

    fn replay(&mut self, graph: &Self::Graph) -> Result<(), Refusal> {
        self.tell("replay", list(graph))
    }

    fn run(&mut self, node: &Node<u32>) -> Result<()> {
        self.told.push(format!("run {}", show(node)));
        Ok(())
    }
}

fn kernel(entry: &'static str, param: u8, binding: u32) -> Node<u32> {
    let text = CudaText { name: "text", source: "" };
    let launch = Launch { text, stored: DType::F32, entry, plan: CudaPlan::items(1, 1, 32) };
    Node::Kernel { launch, params: vec![param], bindings: vec![binding] }
}

fn copy(from: u32, to: u32) -> Node<u32> {
    Node::Copy { from, to, bytes: 4 }
}

type Steps = Recorder<u32, Vec<Node<u32>>>;

/// Runs a step of these nodes; what the device was told.
fn step(steps: &mut Steps, log: &mut Log, nodes: Vec<Node<u32>>) -> Vec<String> {
    log.told.clear();
    steps.begin();
    for node in nodes {
        steps.ask(node, log).unwrap();
    }
    steps.flush(log).unwrap();
    steps.cancel();
    std::mem::take(&mut log.told)
}

#[test]
fn only_what_changed_is_updated() {
    let (mut steps, mut log) = (Steps::new(), Log::default());
    let nodes = |lr, at| vec![kernel("conv", 1, at), copy(1, 2), kernel("sgd", lr, 2)];
    assert_eq!(
        step(&mut steps, &mut log, nodes(7, 1)),
        ["build conv[1][1] copy 1>2:4 sgd[7][2]", "replay conv[1][1] copy 1>2:4 sgd[7][2]"]
    );
    assert_eq!(step(&mut steps, &mut log, nodes(7, 1)), ["replay conv[1][1] copy 1>2:4 sgd[7][2]"]);
    assert_eq!(
        step(&mut steps, &mut log, nodes(6, 1)),
        ["update 2 sgd[6][2]", "replay conv[1][1] copy 1>2:4 sgd[6][2]"]
    );
    assert_eq!(
        step(&mut steps, &mut log, nodes(6, 5)),
        ["update 0 conv[1][5]", "replay conv[1][5] copy 1>2:4 sgd[6][2]"]
    );
    let moved = vec![kernel("conv", 1, 5), copy(1, 9), kernel("sgd", 6, 2)];
    assert_eq!(step(&mut steps, &mut log, moved)[0], "update 1 copy 1>9:4");
    assert_eq!(steps.counts(), GraphCounts { built: 1, runs: 5, nodes: 15, updated: 3 });
}

#[test]
fn grid_block_and_shared_memory_are_arguments() {
    let (mut steps, mut log) = (Steps::new(), Log::default());
    let with = |plan| {
        let text = CudaText { name: "text", source: "" };
        let launch = Launch { text, stored: DType::F32, entry: "conv", plan };
        vec![Node::Kernel { launch, params: vec![1], bindings: vec![1] }]
    };
    let plan = CudaPlan::grid([2, 1, 1], 64);
    step(&mut steps, &mut log, with(plan));
    for (i, other) in [CudaPlan::grid([3, 1, 1], 64), CudaPlan::grid([3, 1, 1], 32), plan.shared(8)]
        .into_iter()
        .enumerate()
    {
        step(&mut steps, &mut log, with(other));
        assert_eq!((steps.counts().built, steps.counts().updated), (1, i + 1));
    }
}

#[test]
fn other_kernels_another_order_or_another_length_make_another_graph() {
    let (mut steps, mut log) = (Steps::new(), Log::default());
    let (a, b) = (|| kernel("a", 1, 1), || kernel("b", 1, 1));
    let lists = || [vec![a(), b()], vec![b(), a()], vec![a()], vec![a(), b(), copy(1, 2)]];
    for nodes in lists() {
        assert!(step(&mut steps, &mut log, nodes)[0].starts_with("build"));
    }
    // They alternate from here on, and each has its graph.
    for nodes in lists() {
        let told = step(&mut steps, &mut log, nodes);
        assert!(told.len() == 1 && told[0].starts_with("replay"), "{told:?}");
    }
    assert_eq!(steps.counts().built, 4);
}

#[test]
fn the_least_recently_used_graph_goes() {
    let (mut steps, mut log) = (Steps::new(), Log::default());
    let nodes = |n: usize| (0..n).map(|_| kernel("a", 1, 1)).collect::<Vec<_>>();
    for n in 1..=KEPT {
        step(&mut steps, &mut log, nodes(n));
    }
    step(&mut steps, &mut log, nodes(1));
    step(&mut steps, &mut log, nodes(KEPT + 1));
    assert!(step(&mut steps, &mut log, nodes(1))[0].starts_with("replay"));
    assert!(step(&mut steps, &mut log, nodes(2))[0].starts_with("build"));
}

#[test]
fn outside_a_step_and_after_a_cancelled_one_nodes_run_at_once() {
    let (mut steps, mut log) = (Steps::new(), Log::default());
    steps.ask(kernel("a", 1, 1), &mut log).unwrap();
    assert!(steps.begin());
    assert!(!steps.begin(), "a step within a step is a part of it");
    steps.ask(kernel("b", 1, 1), &mut log).unwrap();
    steps.cancel();
    steps.flush(&mut log).unwrap();
    steps.ask(copy(1, 2), &mut log).unwrap();
    assert_eq!(log.told, ["run a[1][1]", "run copy 1>2:4"]);
    assert_eq!(steps.counts(), GraphCounts::default());
}

#[test]
fn a_device_without_graphs_launches_one_by_one() {
    for refuses in ["build", "replay", "update build", "update replay"] {
        let (mut steps, mut log) = (Steps::new(), Log::default());
        let nodes = |param| vec![kernel("a", param, 1), copy(1, 2)];
        if refuses.starts_with("update") {
            step(&mut steps, &mut log, nodes(1));
        }
        log.refuses = refuses;
        let told = step(&mut steps, &mut log, nodes(2));
        assert_eq!(told[told.len() - 2..], ["run a[2][1]", "run copy 1>2:4"], "{refuses}");
        assert!(!steps.begin(), "{refuses}: and never tries again");
        steps.ask(copy(3, 4), &mut log).unwrap();
        assert_eq!(log.told, ["run copy 3>4:4"]);
    }
}

#[test]
fn an_update_that_is_refused_makes_a_new_graph() {
    let (mut steps, mut log) = (Steps::new(), Log::default());
    step(&mut steps, &mut log, vec![kernel("a", 1, 1)]);
    log.refuses = "update";
    assert_eq!(
        step(&mut steps, &mut log, vec![kernel("a", 2, 1)]),
        ["build a[2][1]", "replay a[2][1]"]
    );
    assert_eq!(steps.counts(), GraphCounts { built: 2, runs: 2, nodes: 2, updated: 0 });
}
