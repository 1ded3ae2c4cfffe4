#!/usr/bin/env python3
"""What PyTorch takes on this machine for the rows of `attn2d bench` (small; `src/bench/rows.rs`), in milliseconds.

    pip install torch torchvision
    python benches/peers/torch_bench.py torch.json [--only REGEX] [--samples 7] [--compile] [--keep-memory]

Writes {row: {way: ms, .., "best_ms": ms}} and keeps what the file had before. A row has several ways: plain layout
(nchw), channels_last (cl), for attention also matmul-softmax-matmul (explicit) beside scaled_dot_product_attention; the
best is the least of all. `--keep-memory` tells glibc to keep freed memory, which spares PyTorch page faults on large
tensors: such ways are called `.._kept`, so run it with and without. f32, two threads (`--threads`).

A row is one forward and the gradients of all inputs and weights for a fixed random upstream gradient; a `.._step_..` is a
training step. A number is the median over samples, each of as many calls as fill 0.2 s. Run it on an idle machine, beside
our own benchmark: times do not carry over from another day. `compare.py` does both.
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
HEADS = 8
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "268435456"}
PLAIN, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


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


# Operations. Each takes the layout, what to wrap its function in (torch.compile) and its sizes, and returns a call.


def conv(layout, wrap, channels, out, size, kernel=3, stride=1):
    function = wrap(lambda x, w: F.conv2d(x, w, stride=stride, padding=kernel // 2))
    x, w = image(layout, BATCH, channels, size, size), image(layout, out, channels, kernel, kernel, scale=0.05)
    if channels == 3:  # the stem: pictures want no gradient
        return gradients(lambda w: function(x, w), w)
    return gradients(function, x, w)


def depthwise(layout, wrap, channels, size, kernel, stride):
    function = wrap(lambda x, w: F.conv2d(x, w, stride=stride, padding=kernel // 2, groups=channels))
    return gradients(function, image(layout, BATCH, channels, size, size), image(layout, channels, 1, kernel, kernel))


def squeeze_excite(layout, wrap, channels, size):
    squeezed = channels // 24
    weights = torch.randn(squeezed, channels, 1, 1), torch.zeros(squeezed), torch.randn(channels, squeezed, 1, 1), torch.zeros(channels)

    def function(x, w1, b1, w2, b2):
        return x * F.conv2d(F.silu(F.conv2d(F.adaptive_avg_pool2d(x, 1), w1, b1)), w2, b2).sigmoid()

    return gradients(wrap(function), image(layout, BATCH, channels, size, size), *weights)


def linear(layout, wrap, rows, inputs, outputs):
    return gradients(wrap(F.linear), torch.randn(rows, inputs), torch.randn(outputs, inputs))


def batch_norm_relu(layout, wrap, channels, size, residual=False):
    mean, var = torch.zeros(channels), torch.ones(channels)

    def function(x, w, b, *r):
        y = F.batch_norm(x, mean, var, w, b, training=True)
        return F.relu(y + r[0] if residual else y)

    x = [image(layout, BATCH, channels, size, size) for _ in range(1 + residual)]
    return gradients(wrap(function), x[0], torch.ones(channels), torch.zeros(channels), *x[1:])


def max_pool(layout, wrap, channels, size):
    return gradients(wrap(lambda x: F.max_pool2d(x, 3, 2, 1)), image(layout, BATCH, channels, size, size))


def explicit(q, k, v, attn_mask=None):
    """scaled_dot_product_attention written out."""
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v


def tokens(layout, count, d):
    """Plain: [N, heads, tokens, d] in memory; channels_last: [N, tokens, heads, d], as a convolution leaves it."""
    if layout == CHANNELS_LAST:
        return torch.randn(BATCH, count, HEADS, d).transpose(1, 2)
    return torch.randn(BATCH, HEADS, count, d)


def attention(layout, wrap, count, d, product=F.scaled_dot_product_attention):
    return gradients(wrap(product), *[tokens(layout, count, d) for _ in range(3)])


def relative_bias(q, rel_h, rel_w, height, width):
    """q . (rel_h[row offset] + rel_w[column offset]) for all pairs: [N, heads, tokens, tokens]. One product for each table,
    then a broadcast sum, the way it is done where speed matters (Segment Anything's decomposed positions)."""
    n, heads, count, d = q.shape
    q = q.reshape(n, heads, height, width, d)

    def rows(table, size):
        places = torch.arange(size)
        return table.view(2 * size - 1, heads, d)[places[None, :] - places[:, None] + size - 1]

    by_row = torch.einsum("ngyxd,yugd->ngyxu", q, rows(rel_h, height))
    by_column = torch.einsum("ngyxd,xvgd->ngyxv", q, rows(rel_w, width))
    return (by_row[..., :, None] + by_column[..., None, :]).reshape(n, heads, count, count)


def relative_attention(layout, wrap, count, d, product=F.scaled_dot_product_attention):
    size = round(count**0.5)
    tables = [torch.randn(2 * size - 1, HEADS * d) for _ in range(2)]
    function = wrap(lambda q, k, v, h, w: product(q, k, v, attn_mask=relative_bias(q, h, w, size, size)))
    return gradients(function, *[tokens(layout, count, d) for _ in range(3)], *tables)


def attention_block(layout, wrap, channels, size, product=F.scaled_dot_product_attention):
    """Projections, attention with relative positions, output projection, residual: on tokens ("cl") or by 1x1 convolutions."""
    d = channels // HEADS
    weights = [channels**-0.5 * torch.randn(channels, channels) for _ in range(4)]
    tables = [torch.randn(2 * size - 1, channels) for _ in range(2)]
    if layout == CHANNELS_LAST:
        x = torch.randn(BATCH, size * size, channels)
        project = F.linear
        split = lambda y: y.view(BATCH, -1, HEADS, d).transpose(1, 2)
        join = lambda y: y.transpose(1, 2).reshape(BATCH, -1, channels)
    else:
        x = torch.randn(BATCH, channels, size, size)
        project = lambda x, w: F.conv2d(x, w[:, :, None, None])
        split = lambda y: y.view(BATCH, HEADS, d, -1).transpose(2, 3)
        join = lambda y: y.transpose(2, 3).reshape(BATCH, channels, size, size)

    def function(x, wq, wk, wv, wo, h, w):
        q, k, v = (split(project(x, weight)) for weight in (wq, wk, wv))
        return project(join(product(q, k, v, attn_mask=relative_bias(q, h, w, size, size))), wo) + x

    return gradients(wrap(function), x, *weights, *tables)


def unfold_attention(q, k, v, heads, window, rel_h=None, rel_w=None):
    """Local attention the way it is usually written: every key and value copied window^2 times by unfold, zeros outside
    the map, a position table of [heads, d, window, window] added to the keys."""
    n, c, h, w = q.shape
    spread = (n, heads, c // heads, window * window, h * w)
    keys = F.unfold(k, window, padding=window // 2).view(spread)
    values = F.unfold(v, window, padding=window // 2).view(spread)
    if rel_h is not None:
        table = torch.cat([rel_h.expand(-1, -1, window, window), rel_w.expand(-1, -1, window, window)], 1)
        keys = keys + table.reshape(1, heads, c // heads, window * window, 1)
    logits = (q.reshape(n, heads, c // heads, 1, h * w) * keys).sum(2) * (c // heads) ** -0.5
    return (logits.softmax(2).unsqueeze(2) * values).sum(3).reshape(n, c, h, w)


def local_attention(layout, wrap, channels, size):
    window = 7
    maps = [image(layout, BATCH, channels, size, size) for _ in range(3)]
    half = channels // HEADS // 2
    tables = [0.02 * torch.randn(HEADS, half, window, 1), 0.02 * torch.randn(HEADS, half, 1, window)]
    return gradients(wrap(lambda q, k, v, h, w: unfold_attention(q, k, v, HEADS, window, h, w)), *maps, *tables)


# Models: torchvision's ResNet18, plain or with attention for the second 3x3 of each block of stages 3 and 4.


class GlobalAttention(torch.nn.Module):
    """1x1 projections, 8 heads, relative positions; `product` is one of the two ways above."""

    def __init__(self, channels, size, product):
        super().__init__()
        self.qkv = torch.nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.rel_h = torch.nn.Parameter(0.02 * torch.randn(2 * size - 1, channels))
        self.rel_w = torch.nn.Parameter(0.02 * torch.randn(2 * size - 1, channels))
        self.product = product

    def forward(self, x):
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).view(n, 3, HEADS, c // HEADS, h * w).transpose(3, 4).unbind(1)
        y = self.product(q, k, v, attn_mask=relative_bias(q, self.rel_h, self.rel_w, h, w))
        return y.transpose(2, 3).reshape(n, c, h, w)


class LocalAttention(torch.nn.Module):
    """1x1 projections, 8 heads, a 7x7 window by unfold, no positions."""

    def __init__(self, channels, size, product):
        super().__init__()
        self.qkv = torch.nn.Conv2d(channels, 3 * channels, 1, bias=False)

    def forward(self, x):
        return unfold_attention(*self.qkv(x).chunk(3, 1), HEADS, 7)


def model_step(layout, wrap, model, size, batch):
    """Zero the gradients, forward, cross entropy, backward, SGD with momentum; 1000 classes."""
    model = model.to(memory_format=layout).train()
    forward = wrap(model)
    pictures, labels = image(layout, batch, 3, size, size), torch.randint(0, 1000, (batch,))
    sgd = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)

    def step():
        sgd.zero_grad()
        F.cross_entropy(forward(pictures), labels).backward()
        sgd.step()

    return step


def resnet18_step(layout, wrap, size, batch, attention=None, product=F.scaled_dot_product_attention):
    from torchvision.models import resnet18

    model = resnet18()
    if attention is not None:
        for stage, shrunk in ((model.layer3, 16), (model.layer4, 32)):
            for block in stage:
                block.conv2 = attention(block.conv2.out_channels, size // shrunk, product)
    return model_step(layout, wrap, model, size, batch)


def efficientnet_b0_step(layout, wrap, size, batch):
    from torchvision.models import efficientnet_b0

    return model_step(layout, wrap, efficientnet_b0(), size, batch)


def vit_ti_16_step(layout, wrap, size, batch):
    from torchvision.models import VisionTransformer

    return model_step(layout, wrap, VisionTransformer(size, 16, 12, 3, 192, 768), size, batch)


def layouts(make, *sizes, **options):
    """A row in both layouts."""
    return {name: lambda wrap, layout=layout: make(layout, wrap, *sizes, **options) for name, layout in (("nchw", PLAIN), ("cl", CHANNELS_LAST))}


def products(make, *sizes, **options):
    """A row in both layouts and both ways of attention."""
    written_out = layouts(make, *sizes, product=explicit, **options)
    return layouts(make, *sizes, **options) | {f"explicit_{name}": way for name, way in written_out.items()}


ROWS = {f"conv2d_3x3_{c}x{s}": layouts(conv, c, c, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))}
ROWS |= {"conv2d_3x3_s2_64_128x56": layouts(conv, 64, 128, 56, 3, 2), "conv2d_1x1_s2_64_128x56": layouts(conv, 64, 128, 56, 1, 2)}
ROWS |= {"conv2d_stem_7x7_s2": layouts(conv, 3, 64, 224, 7, 2)}
for c, s, k, step in (
    (32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 5, 2), (240, 28, 5, 1), (240, 28, 3, 2), (480, 14, 3, 1), (480, 14, 5, 1),
    (672, 14, 5, 1), (672, 14, 5, 2), (1152, 7, 5, 1), (1152, 7, 3, 1),
):
    ROWS[f"depthwise_{k}x{k}{'' if step == 1 else f'_s{step}'}_{c}x{s}"] = layouts(depthwise, c, s, k, step)
ROWS |= {f"squeeze_excite_{c}x{s}": layouts(squeeze_excite, c, s) for c, s in ((144, 56), (672, 14))}
ROWS |= {"linear_32x512_1000": {"plain": lambda wrap: linear(PLAIN, wrap, 32, 512, 1000)}}
ROWS |= {f"batch_norm_relu_{c}x{s}": layouts(batch_norm_relu, c, s) for c, s in ((64, 56), (256, 14))}
ROWS |= {"batch_norm_add_relu_64x56": layouts(batch_norm_relu, 64, 56, residual=True)}
ROWS |= {f"max_pool2d_3x3_s2_{c}x{s}": layouts(max_pool, c, s) for c, s in ((64, 112), (64, 56))}
ROWS |= {f"global_attention_t{t}_d{d}": products(attention, t, d) for t, d in ((49, 64), (196, 32), (196, 64), (784, 32), (784, 64))}
ROWS |= {f"global_attention_rel_t{t}_d32": products(relative_attention, t, 32) for t in (196, 784)}
ROWS |= {"local_attention_k7_128x28": layouts(local_attention, 128, 28)}
ROWS |= {f"attention_block_{c}x{s}": products(attention_block, c, s) for c, s in ((512, 7), (256, 14))}
for pixels, pictures in ((64, 32), (224, 8)):
    end = f"step_{pixels}_b{pictures}"
    ROWS[f"resnet18_{end}"] = layouts(resnet18_step, pixels, pictures)
    ROWS[f"resnet18_ga_{end}"] = products(resnet18_step, pixels, pictures, attention=GlobalAttention)
    ROWS[f"resnet18_la7_{end}"] = layouts(resnet18_step, pixels, pictures, attention=LocalAttention)
ROWS |= {"efficientnet_b0_step_224_b8": layouts(efficientnet_b0_step, 224, 8), "vit_ti_16_step_224_b8": layouts(vit_ti_16_step, 224, 8)}


def measure(row, args):
    result = {}
    suffix = "_kept" if args.keep_memory else ""
    for name, make in ROWS[row].items():
        torch.manual_seed(0)
        result[f"{name}{suffix}_ms"] = median_ms(make(lambda f: f), args.samples)
    if args.compile:
        torch.manual_seed(0)
        name, make = next(iter(ROWS[row].items()))
        result[f"{name}_compiled{suffix}_ms"] = median_ms(make(lambda f: torch.compile(f, dynamic=False)), args.samples)
    return {name: round(ms, 4) for name, ms in result.items()}


def read(path):
    try:
        with open(path) as file:
            return json.load(file)
    except FileNotFoundError:
        return {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the JSON file to write, or to add to")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the rows whose name matches")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="also torch.compile (up to minutes a row)")
    parser.add_argument("--keep-memory", action="store_true")
    args = parser.parse_args()
    if args.keep_memory and any(os.environ.get(k) != v for k, v in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})  # glibc reads these at start
    torch.set_num_threads(args.threads)
    print(f"PyTorch {torch.__version__}, {args.threads} threads, load {os.getloadavg()[0]:.2f}", file=sys.stderr)
    results = read(args.out)
    for row in ROWS:
        if re.search(args.only, row):
            ways = results.get(row, {}) | measure(row, args)
            ways.pop("best_ms", None)
            results[row] = ways | {"best_ms": min(ways.values())}
            print(row, json.dumps(results[row]), file=sys.stderr, flush=True)
            with open(args.out, "w") as file:
                json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
