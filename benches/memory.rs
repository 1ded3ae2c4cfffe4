//! What attention takes beside its inputs and their gradients, forward and backward: `cargo bench --bench memory`.
//!
//! Prints a Markdown table, and with `-- --json FILE` writes the same as JSON. "Peak" is the device's own account
//! ([`Device::memory`]): everything live at the worst moment, less q, k, v and the upstream gradient. Output, saved
//! log-sum-exp, gradients and workspaces are in it, so it cannot be below 4 maps (the output and three gradients). "Resident" is
//! how far the process grew, as Linux counts it, and so includes what the CPU's threads keep for scratch (absent elsewhere).
//! Were scores stored, the peak in maps would grow with the number of keys that a query sees; it stays.

use attn2d::ops::{GlobalAttention, LocalAttention, global_attention, local_attention};
use attn2d::tensor::philox::Philox;
use attn2d::{Device, Result, Tensor};

/// Images of a batch, and heads.
const BATCH: usize = 1;
const HEADS: usize = 8;
const MIB: f64 = (1 << 20) as f64;

type Attention = fn([&Tensor; 3]) -> Result<Tensor>;

/// What is measured: its name, the keys that a query sees on a map of `size` x `size`, the op.
struct Subject {
    name: &'static str,
    keys: fn(size: usize) -> usize,
    attention: Attention,
}

const SUBJECTS: [Subject; 3] = [
    Subject {
        name: "global",
        keys: |size| size * size,
        attention: |[q, k, v]| global_attention(q, k, v, GlobalAttention::default()),
    },
    Subject {
        name: "local, 7x7",
        keys: |_| 49,
        attention: |[q, k, v]| local_attention(q, k, v, LocalAttention::default()),
    },
    Subject {
        name: "local, 13x13",
        keys: |_| 169,
        attention: |[q, k, v]| {
            let options = LocalAttention { window: (13, 13), ..LocalAttention::default() };
            local_attention(q, k, v, options)
        },
    },
];

/// Map size and channels.
const MAPS: [(usize, usize); 5] = [(14, 64), (28, 64), (56, 64), (56, 128), (112, 64)];

struct Row {
    name: String,
    size: usize,
    channels: usize,
    map: f64,
    scores: f64,
    forward: f64,
    both: f64,
    resident: Option<f64>,
}

fn measure(subject: &Subject, size: usize, channels: usize) -> Result<Row> {
    // A fresh device, so that nothing stands in its pool.
    let device = Device::cpu();
    let shape = [BATCH, size, size, HEADS, channels / HEADS];
    let random = |op| Tensor::randn(&device, &shape, Philox { seed: 1, step: 0, op });
    let (q, k, v) =
        (random(0)?.requires_grad(), random(1)?.requires_grad(), random(2)?.requires_grad());
    let dy = random(3)?;
    let before = device.memory().live;
    let resident = resident::start();
    device.reset_peak();
    let y = (subject.attention)([&q, &k, &v])?;
    let forward = device.memory().peak - before;
    let gradients = y.backward_with(&dy)?;
    let both = device.memory().peak - before;
    drop((y, gradients));
    let pairs = BATCH * HEADS * size * size * (subject.keys)(size);
    Ok(Row {
        name: subject.name.into(),
        size,
        channels,
        map: 4.0 * q.numel() as f64,
        scores: 4.0 * pairs as f64,
        forward: forward as f64,
        both: both as f64,
        resident: resident.and_then(resident::grown),
    })
}

/// The process's own memory, as Linux tells it.
mod resident {
    use std::fs;

    fn status(name: &str) -> Option<f64> {
        let text = fs::read_to_string("/proc/self/status").ok()?;
        let line = text.lines().find(|l| l.starts_with(name))?;
        Some(1024.0 * line.split_whitespace().nth(1)?.parse::<f64>().ok()?)
    }

    /// Resets the peak and tells what is resident now.
    pub(super) fn start() -> Option<f64> {
        fs::write("/proc/self/clear_refs", "5").ok()?;
        status("VmRSS:")
    }

    /// How far the peak has been above `start` since.
    pub(super) fn grown(start: f64) -> Option<f64> {
        Some(status("VmHWM:")? - start)
    }
}

impl Row {
    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "attention": self.name, "batch": BATCH, "size": self.size, "channels": self.channels, "heads": HEADS,
            "map_bytes": self.map, "score_bytes": self.scores, "forward_peak_bytes": self.forward,
            "both_peak_bytes": self.both, "both_resident_bytes": self.resident,
        })
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let mut rows = Vec::new();
    println!(
        "| attention | map | C | one map MiB | all scores MiB | forward peak MiB | + backward peak MiB | in maps | resident MiB |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for subject in &SUBJECTS {
        for (size, channels) in MAPS {
            let row = measure(subject, size, channels).expect(subject.name);
            println!(
                "| {} | {size}x{size} | {channels} | {:.2} | {:.1} | {:.2} | {:.2} | {:.2} | {} |",
                row.name,
                row.map / MIB,
                row.scores / MIB,
                row.forward / MIB,
                row.both / MIB,
                row.both / row.map,
                row.resident.map_or("-".into(), |r| format!("{:.2}", r / MIB)),
            );
            rows.push(row);
        }
    }
    if let Some(at) = args.iter().position(|a| a == "--json") {
        let file = args.get(at + 1).expect("--json needs a file name");
        let rows: Vec<_> = rows.iter().map(Row::json).collect();
        let text = serde_json::to_string_pretty(&rows).expect("rows are plain numbers");
        std::fs::write(file, text + "\n").expect(file);
    }
}
