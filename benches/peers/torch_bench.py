#!/usr/bin/env python3
"""What PyTorch takes on this machine for the rows of `attn2d bench`, in milliseconds, on the CPU.

    pip install torch torchvision
    attn2d bench ops --list --json rows.json                        # or attention-vs-conv, step, scaling, all
    python benches/peers/torch_bench.py rows.json torch.json [--only REGEX] [--samples 7] [--forward] [--compile] [--keep-memory]
    attn2d bench ops --device cpu --merge torch.json                # both side by side

Writes the file that `attn2d bench --merge` reads: for each row every way that PyTorch has, and keeps what the file had before.
Ways: plain layout (nchw), channels_last (cl), for attention also matmul-softmax-matmul (explicit) beside
scaled_dot_product_attention; local attention by `unfold`, the usual formulation. The best is the least of all. `--keep-memory`
tells glibc to keep freed memory, which spares PyTorch page faults on large tensors: such ways are called `.._kept`, so run it with
and without. `--compile` adds torch.compile of the first way (up to minutes a row). f32, two threads (`--threads`).

A row is one forward and the gradients of all inputs and weights for a fixed random upstream gradient (with `--forward` the forward
alone too); a `.._step_..` is a training step. A number is the median over samples, each of as many calls as fill 0.2 s, with their
p20 and p80. What PyTorch cannot do here has its reason. Run it on an idle machine, beside our own benchmark: times do not carry over
from another day. `compare.py` does both.
"""
import argparse
import json
import os
import re
import sys
import time

import torch
import torch.nn.functional as F

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "268435456"}
PLAIN, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
LAYOUTS = {"nchw": PLAIN, "cl": CHANNELS_LAST}
LARGEST = 3 << 30  # bytes of one tensor that a way may make (scores, unfolded keys): several of them are alive at once


class Cannot(Exception):
    """PyTorch has no way for a row, and why."""


def timed(call, samples, seconds=0.2):
    """Median, p20 and p80 of a call in milliseconds after two warm-up calls."""
    call()
    start = time.perf_counter()
    call()
    repeats = max(1, round(seconds / (time.perf_counter() - start)))
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats * 1e3)
    times.sort()

    def at(share):
        place = share * (len(times) - 1)
        low, part = int(place), place % 1
        return round(times[low] + part * (times[min(low + 1, len(times) - 1)] - times[low]), 4)

    return at(0.5), at(0.2), at(0.8)


def limit(what, *sizes):
    """Refuses a tensor of f32 that is too large."""
    count = 4
    for size in sizes:
        count *= size
    if count > LARGEST:
        raise Cannot(f"{what} would be {count / 2**30:.1f} GiB")


def gradients(function, *inputs):
    """The forward as in training, and with the backward to all of `inputs`."""
    inputs = [x.requires_grad_() for x in inputs]
    upstream = torch.randn_like(function(*inputs).detach())
    return lambda: function(*inputs), lambda: torch.autograd.grad(function(*inputs), inputs, upstream)


def image(layout, *shape, scale=1.0):
    return (scale * torch.randn(shape)).to(memory_format=layout)


# Operations. Each takes the layout, what to wrap its function in (torch.compile) and the row's subject, and returns two calls:
# the forward (or None) and the whole.


def conv(layout, wrap, s):
    kernel, size = s["kernel"], s["size"]
    function = wrap(lambda x, w: F.conv2d(x, w, stride=s["stride"], padding=kernel // 2))
    x = image(layout, s["n"], s["channels"], size, size)
    w = image(layout, s["out"], s["channels"], kernel, kernel, scale=0.05)
    if s["channels"] == 3:  # the stem: pictures want no gradient
        return gradients(lambda w: function(x, w), w)
    return gradients(function, x, w)


def depthwise(layout, wrap, s):
    channels, size, kernel = s["channels"], s["size"], s["kernel"]
    function = wrap(lambda x, w: F.conv2d(x, w, stride=s["stride"], padding=kernel // 2, groups=channels))
    return gradients(function, image(layout, s["n"], channels, size, size), image(layout, channels, 1, kernel, kernel))


def squeeze_excite(layout, wrap, s):
    channels, squeezed, size = s["channels"], s["squeezed"], s["size"]
    weights = torch.randn(squeezed, channels, 1, 1), torch.zeros(squeezed), torch.randn(channels, squeezed, 1, 1), torch.zeros(channels)

    def function(x, w1, b1, w2, b2):
        return x * F.conv2d(F.silu(F.conv2d(F.adaptive_avg_pool2d(x, 1), w1, b1)), w2, b2).sigmoid()

    return gradients(wrap(function), image(layout, s["n"], channels, size, size), *weights)


def linear(layout, wrap, s):
    return gradients(wrap(F.linear), torch.randn(s["rows"], s["inputs"]), torch.randn(s["outputs"], s["inputs"]))


def batch_norm(layout, wrap, s):
    channels, size, residual = s["channels"], s["size"], s["residual"]
    mean, var = torch.zeros(channels), torch.ones(channels)

    def function(x, w, b, *r):
        y = F.batch_norm(x, mean, var, w, b, training=True)
        return F.relu(y + r[0] if residual else y)

    x = [image(layout, s["n"], channels, size, size) for _ in range(1 + residual)]
    return gradients(wrap(function), x[0], torch.ones(channels), torch.zeros(channels), *x[1:])


def max_pool(layout, wrap, s):
    return gradients(wrap(lambda x: F.max_pool2d(x, 3, 2, 1)), image(layout, s["n"], s["channels"], s["size"], s["size"]))


def adamw(layout, wrap, s):
    parameter = torch.randn(s["len"], requires_grad=True)
    parameter.grad = torch.randn(s["len"])
    return None, torch.optim.AdamW([parameter], fused=True).step


def explicit(q, k, v, attn_mask=None):
    """scaled_dot_product_attention written out."""
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v


def tokens(layout, s):
    """Plain: [N, heads, tokens, d] in memory; channels_last: [N, tokens, heads, d], as a convolution leaves it."""
    n, count, heads, d = s["n"], s["size"] ** 2, s["heads"], s["d"]
    if layout == CHANNELS_LAST:
        return torch.randn(n, count, heads, d).transpose(1, 2)
    return torch.randn(n, heads, count, d)


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


def swin_bias(table, size):
    """A number for each head and offset, for all pairs: [heads, tokens, tokens]."""
    places = torch.arange(size)
    offset = places[None, :] - places[:, None] + size - 1
    return table[:, offset[:, None, :, None], offset[None, :, None, :]].reshape(-1, size**2, size**2)


def global_attention(layout, wrap, s, product=F.scaled_dot_product_attention):
    size, heads, d, count = s["size"], s["heads"], s["d"], s["size"] ** 2
    if product is explicit or s["position"] == "rel":
        limit("scores or bias of all pairs", s["n"], heads, count, count)
    qkv, scale = [tokens(layout, s) for _ in range(3)], d**-0.5
    if s["position"] == "rel":
        tables = [torch.randn(2 * size - 1, heads * d) for _ in range(2)]
        function = lambda q, k, v, h, w: product(q, k, v, attn_mask=relative_bias(q, h, w, size, size))
        return gradients(wrap(function), *qkv, *tables)
    if s["position"] == "bias":
        table = torch.randn(heads, 2 * size - 1, 2 * size - 1)
        return gradients(wrap(lambda q, k, v, b: product(q, k, v, attn_mask=swin_bias(b, size))), *qkv, table)
    return gradients(wrap(product), *qkv)


def attention_block(layout, wrap, s, product=F.scaled_dot_product_attention):
    """Projections, attention with relative positions, output projection, residual: on tokens ("cl") or by 1x1 convolutions."""
    n, size, heads, d = s["n"], s["size"], s["heads"], s["d"]
    channels = heads * d
    weights = [channels**-0.5 * torch.randn(channels, channels) for _ in range(4)]
    tables = [torch.randn(2 * size - 1, channels) for _ in range(2)]
    if layout == CHANNELS_LAST:
        x = torch.randn(n, size * size, channels)
        project = F.linear
        split = lambda y: y.view(n, -1, heads, d).transpose(1, 2)
        join = lambda y: y.transpose(1, 2).reshape(n, -1, channels)
    else:
        x = torch.randn(n, channels, size, size)
        project = lambda x, w: F.conv2d(x, w[:, :, None, None])
        split = lambda y: y.view(n, heads, d, -1).transpose(2, 3)
        join = lambda y: y.transpose(2, 3).reshape(n, channels, size, size)

    def function(x, wq, wk, wv, wo, h, w):
        q, k, v = (split(project(x, weight)) for weight in (wq, wk, wv))
        return project(join(product(q, k, v, attn_mask=relative_bias(q, h, w, size, size))), wo) + x

    return gradients(wrap(function), x, *weights, *tables)


def outside(size, window):
    """0 where a window's place lies on the map, -inf where it does not: [window^2, size^2]."""
    inside = F.unfold(torch.ones(1, 1, size, size), window, padding=window // 2)[0]
    return torch.zeros_like(inside).masked_fill(inside == 0, float("-inf"))


def unfold_attention(q, k, v, heads, window, tables=(), bias=None, mask=None):
    """Local attention the way it is usually written: every key and value copied window^2 times by unfold, zeros outside
    the map (which `mask` takes out), q.(rel_h[a] + rel_w[b]) and a bias for each head and place of the window."""
    n, c, h, w = q.shape
    d, count = c // heads, window * window
    spread = (n, heads, d, count, h * w)
    keys = F.unfold(k, window, padding=window // 2).view(spread)
    values = F.unfold(v, window, padding=window // 2).view(spread)
    q = q.reshape(n, heads, d, 1, h * w)
    if tables:
        rel_h, rel_w = (t.view(window, heads, d).permute(1, 2, 0) for t in tables)
        keys = keys + (rel_h[..., :, None] + rel_w[..., None, :]).reshape(1, heads, d, count, 1)
    logits = (q * keys).sum(2) * d**-0.5
    if bias is not None:
        logits = logits + bias.view(1, heads, count, 1)
    if mask is not None:
        logits = logits + mask
    return (logits.softmax(2).unsqueeze(2) * values).sum(3).reshape(n, c, h, w)


def local_attention(layout, wrap, s):
    n, size, heads, d, window = s["n"], s["size"], s["heads"], s["d"], s["window"]
    limit("unfolded keys", n, heads * d, window**2, size**2)
    maps = [image(layout, n, heads * d, size, size) for _ in range(3)]
    mask = outside(size, window) if s["border"] == "mask" else None
    if s["position"] == "rel":
        tables = [0.02 * torch.randn(window, heads * d) for _ in range(2)]
        function = lambda q, k, v, h, w: unfold_attention(q, k, v, heads, window, (h, w), mask=mask)
        return gradients(wrap(function), *maps, *tables)
    if s["position"] == "bias":
        function = lambda q, k, v, b: unfold_attention(q, k, v, heads, window, bias=b, mask=mask)
        return gradients(wrap(function), *maps, 0.02 * torch.randn(heads, window, window))
    return gradients(wrap(lambda q, k, v: unfold_attention(q, k, v, heads, window, mask=mask)), *maps)


# Models: torchvision's, plain or with attention for the second 3x3 of each block of some stages of a ResNet18.


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
        q, k, v = self.qkv(x).view(n, 3, 8, c // 8, h * w).transpose(3, 4).unbind(1)
        y = self.product(q, k, v, attn_mask=relative_bias(q, self.rel_h, self.rel_w, h, w))
        return y.transpose(2, 3).reshape(n, c, h, w)


class LocalAttention(torch.nn.Module):
    """1x1 projections, 8 heads, a 7x7 window by unfold: relative positions and zeros outside the map, or neither."""

    def __init__(self, channels, size, embedded):
        super().__init__()
        self.qkv = torch.nn.Conv2d(channels, 3 * channels, 1, bias=False)
        tables = [torch.nn.Parameter(0.02 * torch.randn(7, channels)) for _ in range(2 * embedded)]
        self.tables = torch.nn.ParameterList(tables)
        self.register_buffer("mask", None if embedded else outside(size, 7))

    def forward(self, x):
        return unfold_attention(*self.qkv(x).chunk(3, 1), 8, 7, tuple(self.tables), mask=self.mask)


def attention_of(kind, product):
    """What makes an attention of so many channels on a map of such a size."""
    if kind == "ga":
        return lambda channels, size: GlobalAttention(channels, size, product)
    return lambda channels, size: LocalAttention(channels, size, kind == "ela7")


def network(model, size, product):
    """The net that a model string of our rows names."""
    import torchvision.models as nets

    if model == "efficientnet_b0":
        return nets.efficientnet_b0()
    if model == "vit_ti_16":
        return nets.VisionTransformer(size, 16, 12, 3, 192, 768)
    known = re.fullmatch(r"resnet18(?:\+(ga|la7|ela7)@([\d,]+)(:border=zero)?)?", model)
    if known is None or (known[1] == "ela7") != (known[3] is not None):
        raise Cannot(f"no peer was written for the model {model}")
    net = nets.resnet18()
    for stage in (known[2] or "").split(",") if known[1] else ():
        make = attention_of(known[1], product)
        for block in getattr(net, f"layer{stage}"):
            block.conv2 = make(block.conv2.out_channels, size // 2 ** (int(stage) + 1))
    return net


def step(layout, wrap, s, product=F.scaled_dot_product_attention):
    """Zero the gradients, forward, cross entropy, backward, SGD with momentum; 1000 classes."""
    model = network(s["model"], s["size"], product).to(memory_format=layout).train()
    forward = wrap(model)
    pictures, labels = image(layout, s["n"], 3, s["size"], s["size"]), torch.randint(0, 1000, (s["n"],))
    sgd = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)

    def whole():
        sgd.zero_grad()
        F.cross_entropy(forward(pictures), labels).backward()
        sgd.step()

    return None, whole


OPS = {
    "conv2d": conv,
    "depthwise": depthwise,
    "squeeze_excite": squeeze_excite,
    "linear": linear,
    "batch_norm": batch_norm,
    "max_pool2d": max_pool,
    "global_attention": global_attention,
    "local_attention": local_attention,
    "attention_block": attention_block,
    "adamw": adamw,
    "step": step,
}


def ways(subject):
    """Every way of a row: a name, and a function that takes what to wrap in and returns the two calls."""
    make = OPS[subject["op"]]
    if subject["op"] in ("linear", "adamw"):
        return {"plain": lambda wrap: make(PLAIN, wrap, subject)}
    result = {name: lambda wrap, layout=layout: make(layout, wrap, subject) for name, layout in LAYOUTS.items()}
    if subject["op"] in ("global_attention", "attention_block") or "+ga@" in subject.get("model", ""):
        for name, layout in LAYOUTS.items():
            result[f"explicit_{name}"] = lambda wrap, layout=layout: make(layout, wrap, subject, product=explicit)
    return result


def measure(subject, args):
    """The times of each way; what cannot be made has its reason instead."""
    suffix = "_kept" if args.keep_memory else ""
    result, reasons = {}, []
    jobs = [(name, make, lambda f: f) for name, make in ways(subject).items()]
    if args.compile:
        name, make, _ = jobs[0]
        jobs.append((f"{name}_compiled", make, lambda f: torch.compile(f, dynamic=False)))
    for name, make, wrap in jobs:
        torch.manual_seed(0)
        try:
            forward, whole = make(wrap)
            ms, p20, p80 = timed(whole, args.samples)
        except (Cannot, RuntimeError) as e:  # out of memory is a RuntimeError
            reasons.append(f"{name}: {e}".splitlines()[0])
            continue
        result[name + suffix] = {"ms": ms, "p20_ms": p20, "p80_ms": p80}
        if args.forward and forward is not None:
            result[name + suffix]["forward_ms"] = timed(forward, args.samples)[0]
    return result, reasons


def read(path, about):
    """What the file has already, if it is of the same peer."""
    try:
        with open(path) as file:
            results = json.load(file)
    except FileNotFoundError:
        return {**about, "rows": []}
    known = {key: results.get(key) for key in about}
    if known != about:
        sys.exit(f"{path} has times of {known}, this is {about}: name another file")
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="the JSON of `attn2d bench --list --json`")
    parser.add_argument("out", help="the JSON file to write, or to add to")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the rows whose name matches")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--forward", action="store_true", help="also the forward alone")
    parser.add_argument("--compile", action="store_true", help="also torch.compile (up to minutes a row)")
    parser.add_argument("--keep-memory", action="store_true")
    args = parser.parse_args()
    if args.keep_memory and any(os.environ.get(k) != v for k, v in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})  # glibc reads these at start
    torch.set_num_threads(args.threads)
    about = {"peer": f"PyTorch {torch.__version__}", "device": f"cpu, {args.threads} threads", "precision": "f32"}
    print(f"{about['peer']}, {about['device']}, load {os.getloadavg()[0]:.2f}", file=sys.stderr)
    with open(args.rows) as file:
        listed = [row for row in json.load(file)["rows"] if re.search(args.only, row["name"])]
    results = read(args.out, about)
    for row in listed:
        subject = row["subject"]
        before = [r for r in results["rows"] if r["name"] == row["name"] and r["subject"] == subject]
        new, reasons = measure(subject, args)
        entry = {"name": row["name"], "subject": subject}
        entry["ways"] = (before[0].get("ways", {}) if before else {}) | new
        if reasons:
            entry["failed"] = "; ".join(reasons)
        results["rows"] = [r for r in results["rows"] if r["name"] != row["name"]] + [entry]
        print(row["name"], json.dumps(new or reasons), file=sys.stderr, flush=True)
        with open(args.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
