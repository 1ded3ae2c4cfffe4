#!/usr/bin/env python3
"""What PyTorch takes on this machine for the rows of `benches/ops.rs` and `benches/step.rs`, in milliseconds.

    pip install torch torchvision
    python benches/peers/torch_bench.py torch.json [--only REGEX] [--samples 7] [--compile] [--keep-memory]

Writes {row: {"nchw_ms": .., "cl_ms": .., "best_ms": ..}}: plain layout, channels_last, the better of them. f32, two
threads (`--threads`). A row is one forward and the gradients of all inputs and weights for a fixed random upstream
gradient; `resnet18_step` is a training step. A number is the median over samples, each of as many calls as fill 0.2 s.
Run it on an idle machine, beside our own benchmark: times do not carry over from another day.
`--keep-memory` tells glibc to keep freed memory, which spares PyTorch page faults on large tensors.
"""
import argparse
import json
import os
import re
import statistics
import sys
import time

import torch
import torch.nn.functional as F

BATCH = 8
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "268435456"}


def median_ms(call, samples):
    """Median time of a call after two warm-up calls."""
    call()
    start = time.perf_counter()
    call()
    repeats = max(1, round(0.2 / (time.perf_counter() - start)))
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats * 1e3)
    return statistics.median(times)


def gradients(function, *inputs):
    """A call that runs `function` forward and backward to all of `inputs`."""
    inputs = [x.requires_grad_() for x in inputs]
    upstream = torch.randn_like(function(*inputs).detach())
    return lambda: torch.autograd.grad(function(*inputs), inputs, upstream)


def image(layout, *shape, scale=1.0):
    return (scale * torch.randn(shape)).to(memory_format=layout)


def conv3x3(layout, wrap, channels, size):
    function = wrap(lambda x, w: F.conv2d(x, w, padding=1))
    return gradients(function, image(layout, BATCH, channels, size, size), image(layout, channels, channels, 3, 3, scale=0.05))


def batch_norm_relu(layout, wrap, channels, size):
    mean, var = torch.zeros(channels), torch.ones(channels)
    function = wrap(lambda x, w, b: F.relu(F.batch_norm(x, mean, var, w, b, training=True)))
    return gradients(function, image(layout, BATCH, channels, size, size), torch.ones(channels), torch.zeros(channels))


def max_pool(layout, wrap, channels, size):
    return gradients(wrap(lambda x: F.max_pool2d(x, 3, 2, 1)), image(layout, BATCH, channels, size, size))


def sdpa(layout, wrap, tokens, d):
    """8 heads. Plain: [N, heads, tokens, d] in memory; channels_last: [N, tokens, heads, d], as a convolution leaves it."""
    if layout == torch.channels_last:
        qkv = [torch.randn(BATCH, tokens, 8, d).transpose(1, 2) for _ in range(3)]
    else:
        qkv = [torch.randn(BATCH, 8, tokens, d) for _ in range(3)]
    return gradients(wrap(F.scaled_dot_product_attention), *qkv)


def unfold_attention(q, k, v, rel_h, rel_w, heads, window):
    """Local attention the way it is usually written: every key and value copied window^2 times by unfold, zeros outside
    the map, a position table of [heads, d, window, window] added to the keys."""
    n, c, h, w = q.shape
    spread = (n, heads, c // heads, window * window, h * w)
    keys = F.unfold(k, window, padding=window // 2).view(spread)
    values = F.unfold(v, window, padding=window // 2).view(spread)
    table = torch.cat([rel_h.expand(-1, -1, window, window), rel_w.expand(-1, -1, window, window)], 1)
    keys = keys + table.reshape(1, heads, c // heads, window * window, 1)
    logits = (q.reshape(n, heads, c // heads, 1, h * w) * keys).sum(2) * (c // heads) ** -0.5
    return (logits.softmax(2).unsqueeze(2) * values).sum(3).reshape(n, c, h, w)


def local_attention(layout, wrap, channels, size):
    heads, window = 8, 7
    maps = [image(layout, BATCH, channels, size, size) for _ in range(3)]
    half = channels // heads // 2
    tables = [0.02 * torch.randn(heads, half, window, 1), 0.02 * torch.randn(heads, half, 1, window)]
    return gradients(wrap(lambda *x: unfold_attention(*x, heads, window)), *maps, *tables)


def resnet18_step(layout, wrap):
    """Zero the gradients, forward, cross entropy, backward, SGD with momentum: 64x64 pictures, batch 32, 1000 classes."""
    from torchvision.models import resnet18

    model = resnet18().to(memory_format=layout).train()
    forward = wrap(model)
    pictures, labels = image(layout, 32, 3, 64, 64), torch.randint(0, 1000, (32,))
    sgd = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step():
        sgd.zero_grad()
        F.cross_entropy(forward(pictures), labels).backward()
        sgd.step()

    return step


ROWS = {f"conv2d_3x3_{c}x{s}": (conv3x3, c, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))}
ROWS |= {f"batch_norm_relu_{c}x{s}": (batch_norm_relu, c, s) for c, s in ((64, 56), (256, 14))}
ROWS |= {f"max_pool2d_3x3_s2_{c}x{s}": (max_pool, c, s) for c, s in ((64, 112), (64, 56))}
ROWS |= {f"global_attention_t{t}_d{d}": (sdpa, t, d) for t in (196, 784) for d in (32, 64)}
ROWS |= {"local_attention_k7_128x28": (local_attention, 128, 28), "resnet18_step_64_b32": (resnet18_step,)}


def measure(row, args):
    make, *shape = ROWS[row]
    result = {}
    for name, layout in (("nchw_ms", torch.contiguous_format), ("cl_ms", torch.channels_last)):
        torch.manual_seed(0)
        result[name] = median_ms(make(layout, lambda f: f, *shape), args.samples)
    result["best_ms"] = min(result.values())
    if args.compile:
        torch.manual_seed(0)
        compiled = make(torch.contiguous_format, lambda f: torch.compile(f, dynamic=False), *shape)
        result["compiled_ms"] = median_ms(compiled, args.samples)
    return {name: round(ms, 4) for name, ms in result.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the JSON file to write")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the rows whose name matches")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="also torch.compile (minutes; not part of best_ms)")
    parser.add_argument("--keep-memory", action="store_true")
    args = parser.parse_args()
    if args.keep_memory and any(os.environ.get(k) != v for k, v in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})  # glibc reads these at start
    torch.set_num_threads(args.threads)
    print(f"PyTorch {torch.__version__}, {args.threads} threads, load {os.getloadavg()[0]:.2f}", file=sys.stderr)
    results = {}
    for row in ROWS:
        if re.search(args.only, row):
            results[row] = measure(row, args)
            print(row, json.dumps(results[row]), file=sys.stderr, flush=True)
            with open(args.out, "w") as file:
                json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
