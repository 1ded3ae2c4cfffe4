#!/usr/bin/env python3
"""What PyTorch takes on a GPU for the rows of `attn2d bench`, every way it has, in the same elements.

    attn2d bench --list --size large --json rows.json
    python benches/peers/torch_cuda_bench.py rows.json torch.json [--device cuda:0] [--precision bf16,f32,f16] [--budget 180]

Row by row: convolutions in both layouts (cuDNN), attention by every backend of scaled_dot_product_attention, each forced, and
by FlexAttention with the same bias or window, local attention by `unfold` too, batch norm and pooling eager and compiled,
optimisers, and whole training steps with autocast, channels_last and torch.compile. `scripts/gpu_check` runs it.

`ms` is the time between two events round forward and backward, with the caches overwritten before; `graph_ms` the same
captured into a CUDA graph and replayed, which leaves out what the host takes to launch (the fair thing beside the sum of our
kernels); `forward_ms` the forward alone. Medians. A way is compared with f64 arithmetic on the first image (all of it where
there are two at most, or where images mix) before it is timed: one that is wrong is reported and never the best. Ways with
TF32 are listed, not compared with f32. What cannot run has its `reason`. f32 means f32: TF32 is off elsewhere.
"""
import argparse
import functools
import json
import re
import statistics
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
ALLOWED = {"f32": 2e-3, "f16": 2e-2, "bf16": 1e-1}  # largest error, in units of the largest magnitude
BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
CLASSES = 1000


class Cannot(Exception):
    """A way that does not apply, and why."""


# Measuring.


def is_cuda(device):
    return device.type == "cuda"


def wait(device):
    if is_cuda(device):
        torch.cuda.synchronize(device)


def percentiles(times):
    times = sorted(times)
    at = lambda share: times[min(len(times) - 1, round(share * (len(times) - 1)))]
    return {"ms": statistics.median(times), "p20_ms": at(0.2), "p80_ms": at(0.8), "samples": len(times)}


@functools.cache
def flush_buffer(device):
    return torch.empty(256 << 20, dtype=torch.int8, device=device)


def timed(call, seconds, device):
    """Percentiles of a call in milliseconds, after warming up."""
    for _ in range(2):
        call()
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    one = time.perf_counter() - start
    count = max(5, min(200, round(seconds / max(one, 1e-6))))
    if not is_cuda(device):
        inner = max(1, round(2e-3 / max(one, 1e-6)))
        times = []
        for _ in range(max(3, count // inner)):
            start = time.perf_counter()
            for _ in range(inner):
                call()
            times.append((time.perf_counter() - start) / inner * 1e3)
        return percentiles(times)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in marks:
        flush_buffer(device).zero_()
        begin.record()
        call()
        end.record()
    wait(device)
    return percentiles([begin.elapsed_time(end) for begin, end in marks])


def captured(call, device):
    """The call as a CUDA graph to replay."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rounded(summary):
    return {key: round(value, 6) for key, value in summary.items()}


# Rows. A row is (a function that makes its inputs, which of them want a gradient, the truth for f64 inputs, its ways, which
# inputs are independent from image to image). A way is (function, what lays its inputs out, or None).


def normal(shape, dtype, device, seed):
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def conv2d(s, dtype, device):
    side, kernel, groups = s["size"], s["kernel"], s.get("groups", 1)
    options = {"stride": s["stride"], "padding": kernel // 2, "groups": groups}
    shapes = (s["n"], s["channels"], side, side), (s["out"], s["channels"] // groups, kernel, kernel)
    inputs = lambda: [normal(shape, dtype, device, i) for i, shape in enumerate(shapes)]
    function = lambda x, w: F.conv2d(x, w, **options)
    layout = lambda x, w: [t.contiguous(memory_format=torch.channels_last) for t in (x, w)]
    ways = {"channels_last": (function, layout), "nchw": (function, None)}
    if dtype == torch.float32 and is_cuda(device):
        ways["channels_last_tf32"] = (function, layout)
    return inputs, [s["channels"] != 3, True], function, ways, [0]


def depthwise(s, dtype, device):
    return conv2d(s | {"out": s["channels"], "groups": s["channels"]}, dtype, device)


def squeeze_excite(s, dtype, device):
    """Weights as 1x1 convolutions, as torchvision's module has them."""
    c, r = s["channels"], s["squeezed"]
    shapes = (s["n"], c, s["size"], s["size"]), (r, c, 1, 1), (r,), (c, r, 1, 1), (c,)
    inputs = lambda: [normal(shape, dtype, device, i) for i, shape in enumerate(shapes)]

    def function(x, w1, b1, w2, b2):
        return x * F.conv2d(F.silu(F.conv2d(F.adaptive_avg_pool2d(x, 1), w1, b1)), w2, b2).sigmoid()

    layout = lambda x, *rest: [x.contiguous(memory_format=torch.channels_last), *rest]
    ways = {"channels_last": (function, layout), "nchw": (function, None), "channels_last_compiled": (compiled(function), layout)}
    return inputs, [True] * 5, function, ways, [0]


def linear(s, dtype, device):
    shapes = (s["rows"], s["inputs"]), (s["outputs"], s["inputs"])
    inputs = lambda: [normal(shape, dtype, device, i) for i, shape in enumerate(shapes)]
    return inputs, [True, True], F.linear, {"cublas": (F.linear, None)}, None


def batch_norm(s, dtype, device):
    shape = (s["n"], s["channels"], s["size"], s["size"])
    maps = 1 + s["residual"]
    weight, bias = (torch.full((s["channels"],), v, device=device) for v in (1.0, 0.0))
    mean, var = (torch.full((s["channels"],), v, device=device) for v in (0.0, 1.0))

    def function(x, *rest):
        *r, w, b = rest
        y = F.batch_norm(x, mean, var, w, b, training=True)
        return F.relu(y + r[0] if r else y)

    def truth(x, *rest):
        *r, w, b = rest
        centred = x - x.mean((0, 2, 3), keepdim=True)
        y = centred * (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).rsqrt()
        y = y * w[:, None, None] + b[:, None, None]
        return F.relu(y + r[0] if r else y)

    layout = lambda *t: [u.contiguous(memory_format=torch.channels_last) if u.dim() == 4 else u for u in t]
    ways = {"channels_last": (function, layout), "nchw": (function, None), "channels_last_compiled": (compiled(function), layout)}
    inputs = lambda: [normal(shape, dtype, device, i) for i in range(maps)] + [weight, bias]
    return inputs, [True] * (maps + 2), truth, ways, None


def max_pool2d(s, dtype, device):
    inputs = lambda: [normal((s["n"], s["channels"], s["size"], s["size"]), dtype, device, 0)]
    function = lambda x: F.max_pool2d(x, 3, 2, 1)
    layout = lambda x: [x.contiguous(memory_format=torch.channels_last)]
    ways = {"channels_last": (function, layout), "nchw": (function, None), "channels_last_compiled": (compiled(function), layout)}
    return inputs, [True], function, ways, [0]


def compiled(function):
    """torch.compile of a function, when it is first called."""
    return lazy(lambda: torch.compile(function, dynamic=False))


def lazy(make):
    """A function that is made when it is first called."""
    made = []

    def call(*inputs):
        if not made:
            made.append(make())
        return made[0](*inputs)

    return call


# Attention: q, k, v [N, heads, tokens, d], as a transposed view of what a convolution leaves, [N, tokens, heads, d].


def explicit(q, k, v, bias=None):
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias).softmax(-1) @ v


def offsets(size, device):
    """Row and column offsets key - query of all pairs, [tokens, tokens]."""
    y, x = torch.meshgrid(*[torch.arange(size, device=device)] * 2, indexing="ij")
    y, x = y.flatten(), x.flatten()
    return y[None] - y[:, None], x[None] - x[:, None]


def by_offset(q, table, size, reach, axis):
    """q . table[key - query] for each query and each row (axis 0) or column (1) that a key can be in: [N, heads, tokens, size].
    Offsets outside the table count as its ends; such keys are masked."""
    n, heads, count, d = q.shape
    places = torch.arange(size, device=q.device)
    index = (places[None] - places[:, None] + reach).clamp(0, 2 * reach)
    rows = table.view(-1, heads, d)[index]
    q = q.reshape(n, heads, size, size, d)
    terms = torch.einsum("ngyxd,yugd->ngyxu" if axis == 0 else "ngyxd,xugd->ngyxu", q, rows)
    return terms.reshape(n, heads, count, size)


def dense_bias(s, q, tables):
    """The positions and the window as one number for each pair, or None."""
    size, reach, device = s["size"], s["reach"], q.device
    bias = None
    if s["position"] == "rel":
        rows, columns = (by_offset(q, t, size, reach, axis) for axis, t in enumerate(tables))
        bias = (rows[..., :, None] + columns[..., None, :]).flatten(-2)
    elif s["position"] == "bias":
        dy, dx = ((o + reach).clamp(0, 2 * reach) for o in offsets(size, device))
        bias = tables[0][:, dy, dx][None]
    if "window" in s:
        dy, dx = offsets(size, device)
        outside = (dy.abs() > reach) | (dx.abs() > reach)
        bias = torch.zeros((1, 1, size**2, size**2), dtype=q.dtype, device=device) if bias is None else bias
        bias = bias.masked_fill(outside, float("-inf"))
    return bias


def forced(s, backend):
    def function(q, k, v, *tables):
        if s.get("border") == "zero":
            raise Cannot("a zero border has keys that a mask cannot express")
        bias = dense_bias(s, q, tables)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return function


def flex(s, device):
    """FlexAttention: positions looked up for each score, the window as a block mask."""
    if s.get("border") == "zero":
        raise Cannot("a zero border has keys that a mask cannot express")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size, reach = s["size"], s["reach"]
    mask = None
    if "window" in s:

        def near(b, h, i, j):
            return ((j // size - i // size).abs() <= reach) & ((j % size - i % size).abs() <= reach)

        mask = create_block_mask(near, None, None, size**2, size**2, device=str(device))

    def function(q, k, v, *tables):
        if s["position"] == "rel":
            rows, columns = (by_offset(q, t, size, reach, axis) for axis, t in enumerate(tables))
            score = lambda score, b, h, i, j: score + rows[b, h, i, j // size] + columns[b, h, i, j % size]
        elif s["position"] == "bias":
            table = tables[0]
            place = lambda o: (o + reach).clamp(0, 2 * reach)
            score = lambda score, b, h, i, j: score + table[h, place(j // size - i // size), place(j % size - i % size)]
        else:
            score = None
        return flex_attention(q, k, v, score_mod=score, block_mask=mask)

    return compiled(function)


def unfolded(s):
    """Local attention the way it is usually written: keys and values copied window^2 times."""
    size, window, reach = s["size"], s["window"], s["reach"]

    def function(q, k, v, *tables):
        n, heads, count, d = q.shape
        image = lambda x: x.transpose(1, 2).reshape(n, size, size, heads * d).permute(0, 3, 1, 2)
        spread = lambda x: F.unfold(image(x), window, padding=reach).view(n, heads, d, window**2, count)
        logits = (q.transpose(-1, -2).unsqueeze(3) * spread(k)).sum(2) * d**-0.5
        if s["position"] == "rel":
            rows, columns = (torch.einsum("ngtd,agd->ngat", q, t.view(window, heads, d)) for t in tables)
            logits = logits + (rows[:, :, :, None] + columns[:, :, None]).flatten(2, 3)
        elif s["position"] == "bias":
            logits = logits + tables[0].reshape(1, heads, window**2, 1)
        if s["border"] == "mask":
            ones = torch.ones(1, 1, size, size, dtype=torch.float32, device=q.device)
            inside = F.unfold(ones, window, padding=reach).view(1, 1, window**2, count) > 0
            logits = logits.masked_fill(~inside, float("-inf"))
        y = (logits.softmax(2).unsqueeze(2) * spread(v)).sum(3)
        return y.transpose(-1, -2)

    return function


def attention(s, dtype, device):
    local = "window" in s
    s = {**s, "reach": s["window"] // 2 if local else s["size"] - 1}
    n, heads, d, entries = s["n"], s["heads"], s["d"], 2 * s["reach"] + 1
    shapes = {"none": [], "rel": [(entries, heads * d)] * 2, "bias": [(heads, entries, entries)]}[s["position"]]

    def inputs():
        qkv = [normal((n, s["size"] ** 2, heads, d), dtype, device, i).transpose(1, 2) for i in range(3)]
        return qkv + [normal(shape, dtype, device, 3 + i) for i, shape in enumerate(shapes)]

    ways = {name: (forced(s, backend), None) for name, backend in BACKENDS.items()}
    if local:
        ways |= {"unfold": (unfolded(s), None), "unfold_compiled": (compiled(unfolded(s)), None)}
    ways["flex_compiled"] = (lazy(lambda: flex(s, device)), None)
    truth = unfolded(s) if local else lambda q, k, v, *tables: explicit(q, k, v, dense_bias(s, q, tables))
    return inputs, [True] * (3 + len(shapes)), truth, ways, [0, 1, 2]


def attention_block(s, dtype, device):
    """Projections, attention with relative positions, output projection, residual, on tokens [N, tokens, channels]."""
    n, size, heads, d = s["n"], s["size"], s["heads"], s["d"]
    c, s = heads * d, {**s, "reach": s["size"] - 1, "position": "rel"}

    def inputs():
        weights = [normal((c, c), torch.float32, device, 1 + i).mul(c**-0.5).to(dtype) for i in range(4)]
        tables = [normal((2 * size - 1, c), dtype, device, 5 + i) for i in range(2)]
        return [normal((n, size**2, c), dtype, device, 0), *weights, *tables]

    def block(product):
        def function(x, wq, wk, wv, wo, *tables):
            q, k, v = (F.linear(x, w).view(x.shape[0], -1, heads, d).transpose(1, 2) for w in (wq, wk, wv))
            return F.linear(product(q, k, v, dense_bias(s, q, tables)).transpose(1, 2).flatten(2), wo) + x

        return function

    def fused(backend):
        def product(q, k, v, bias):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        return product

    ways = {name: (block(fused(backend)), None) for name, backend in BACKENDS.items()}
    ways |= {"explicit": (block(explicit), None), "explicit_compiled": (compiled(block(explicit)), None)}
    return inputs, [True] * 7, block(explicit), ways, [0]


OPS = {
    "attention_block": attention_block,
    "conv2d": conv2d,
    "depthwise": depthwise,
    "squeeze_excite": squeeze_excite,
    "linear": linear,
    "batch_norm": batch_norm,
    "max_pool2d": max_pool2d,
    "global_attention": attention,
    "local_attention": attention,
}


def adamw(s, device):
    """One step over one flat f32 tensor."""

    def way(**options):
        p = torch.randn(s["len"], device=device, requires_grad=True)
        p.grad = torch.randn(s["len"], device=device)
        return torch.optim.AdamW([p], **options).step

    return {"fused": lambda: way(fused=True), "foreach": lambda: way(foreach=True)}


# Whole training steps: the models of our strings, with torch's layers.


def parse_model(text):
    """`resnet18:w8,stages=2,stem=small+ga@2:heads=2` as width, stages, stem, and attention by stage."""
    plain, *attentions = text.split("+")
    backbone, _, options = plain.partition(":")
    if backbone != "resnet18":
        raise Cannot(f"no peer for the backbone {backbone}")
    width = re.search(r"\bw(\d+)", options)
    stages = re.search(r"stages=(\d)", options)
    net = {"width": int(width[1]) if width else 64, "stages": int(stages[1]) if stages else 4, "small": "stem=small" in options, "attention": {}}
    for text in attentions:
        match = re.fullmatch(r"(ga|e?la)(\d*)@([\d,]+)(?::(.*))?", text)
        if not match or "append" in (match[4] or ""):
            raise Cannot(f"no peer for the attention {text}")
        heads = re.search(r"heads=(\d+)", match[4] or "")
        kind = {
            "window": int(match[2]) if match[2] else None,
            "heads": int(heads[1]) if heads else 8,
            "border": "zero" if "border=zero" in (match[4] or "") else "mask",
            "position": "none" if match[1] == "la" or "pos=none" in (match[4] or "") else "rel",
        }
        net["attention"] |= {int(stage): kind for stage in match[3].split(",")}
    return net


class Attention(torch.nn.Module):
    """1x1 projections and an attention; compiled models take FlexAttention for windows, eager ones `unfold`."""

    def __init__(self, channels, size, kind, with_flex, device):
        super().__init__()
        self.heads, self.qkv = kind["heads"], torch.nn.Conv2d(channels, 3 * channels, 1, bias=False)
        s = {"size": size, "position": kind["position"], "reach": (kind["window"] or 2 * size - 1) // 2}
        if kind["window"]:
            s |= {"window": kind["window"], "border": kind["border"]}
        entries = 2 * s["reach"] + 1
        count = 2 if kind["position"] == "rel" else 0
        self.tables = torch.nn.ParameterList([0.02 * torch.randn(entries, channels) for _ in range(count)])
        if with_flex and kind["border"] == "mask" and kind["window"]:
            self.product = flex_uncompiled(s, device)
        elif kind["window"]:
            self.product = unfolded(s)
        else:
            self.product = lambda q, k, v, *t: F.scaled_dot_product_attention(q, k, v, attn_mask=dense_bias(s, q, t))

    def forward(self, x):
        n, c, h, w = x.shape
        tokens = self.qkv(x).permute(0, 2, 3, 1).reshape(n, h * w, 3, self.heads, c // self.heads)
        q, k, v = (t.transpose(1, 2) for t in tokens.unbind(2))
        tables = [t.to(q.dtype) for t in self.tables]
        return self.product(q, k, v, *tables).transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)


def flex_uncompiled(s, device):
    """FlexAttention for a model that is compiled as a whole."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size, reach = s["size"], s["reach"]

    def near(b, h, i, j):
        return ((j // size - i // size).abs() <= reach) & ((j % size - i % size).abs() <= reach)

    mask = create_block_mask(near, None, None, size**2, size**2, device=str(device))

    def product(q, k, v, *tables):
        if not tables:
            return flex_attention(q, k, v, block_mask=mask)
        rows, columns = (by_offset(q, t, size, reach, axis) for axis, t in enumerate(tables))
        score = lambda score, b, h, i, j: score + rows[b, h, i, j // size] + columns[b, h, i, j % size]
        return flex_attention(q, k, v, score_mod=score, block_mask=mask)

    return product


class Block(torch.nn.Module):
    def __init__(self, inputs, channels, stride, second):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = torch.nn.BatchNorm2d(channels), torch.nn.BatchNorm2d(channels)
        self.second, self.down = second, None
        if stride != 1 or inputs != channels:
            self.down = torch.nn.Sequential(torch.nn.Conv2d(inputs, channels, 1, stride, bias=False), torch.nn.BatchNorm2d(channels))

    def forward(self, x):
        y = self.bn2(self.second(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.down is None else self.down(x)))


def resnet18(net, size, with_flex, device):
    width, layers = net["width"], []
    if net["small"]:
        layers = [torch.nn.Conv2d(3, width, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(width), torch.nn.ReLU(True)]
    else:
        layers = [torch.nn.Conv2d(3, width, 7, 2, 3, bias=False), torch.nn.BatchNorm2d(width), torch.nn.ReLU(True), torch.nn.MaxPool2d(3, 2, 1)]
        size = (((size - 1) // 2 + 1) - 1) // 2 + 1
    inputs = width
    for stage in range(1, net["stages"] + 1):
        channels = width << (stage - 1)
        for block in range(2):
            stride = 2 if stage > 1 and block == 0 else 1
            size = (size - 1) // stride + 1
            kind = net["attention"].get(stage)
            second = Attention(channels, size, kind, with_flex, device) if kind else torch.nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
            layers.append(Block(inputs, channels, stride, second))
            inputs = channels
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(inputs, CLASSES))


def builder(name, size, device):
    """What makes the model of a string of ours: torchvision's own where there is one."""
    if name in ("efficientnet_b0", "vit_ti_16"):
        try:
            from torchvision.models import VisionTransformer, efficientnet_b0
        except ImportError as error:
            raise Cannot(f"no torchvision: {error}")
        return lambda with_flex: efficientnet_b0() if name == "efficientnet_b0" else VisionTransformer(size, 16, 12, 3, 192, 768)
    net = parse_model(name)
    return lambda with_flex: resnet18(net, size, with_flex, device)


def steps(s, dtype, device):
    build = builder(s["model"], s["size"], device)

    def way(wrap, layout=torch.channels_last, with_flex=False):
        torch.manual_seed(0)
        model = build(with_flex).to(device, memory_format=layout).train()
        forward = wrap(model)
        pictures = normal((s["n"], 3, s["size"], s["size"]), torch.float32, device, 0).contiguous(memory_format=layout)
        labels = torch.randint(0, CLASSES, (s["n"],), device=device)
        sgd = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
        # f16 without loss scaling: the time is the same, the numbers are not looked at.
        amp = lambda: nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

        def step():
            sgd.zero_grad()
            with amp():
                loss = F.cross_entropy(forward(pictures), labels)
            loss.backward()
            sgd.step()

        return step

    compile_ = lambda **options: lambda model: torch.compile(model, dynamic=False, **options)
    ways = {
        "channels_last": lambda: way(lambda m: m),
        "nchw": lambda: way(lambda m: m, torch.contiguous_format),
        "channels_last_compiled": lambda: way(compile_(), with_flex=True),
        "channels_last_compiled_graphs": lambda: way(compile_(mode="reduce-overhead"), with_flex=True),
    }
    if dtype == torch.float32 and is_cuda(device):
        ways["channels_last_tf32"] = ways["channels_last"]
    return ways


# One way of one row.


@contextmanager
def tf32(on):
    """Whether products of f32 may round their factors to 10 bits."""
    flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [f.allow_tf32 for f in flags]
    for f in flags:
        f.allow_tf32 = on
    try:
        yield
    finally:
        for f, old in zip(flags, before):
            f.allow_tf32 = old


def error_of(inputs, wants, truth, alone, result, upstream, op):
    """The largest error of output and gradients against f64, in units of the largest magnitude; NaN where anything is."""
    y, gradients = result
    whole = alone is None or inputs[0].shape[0] <= 2
    part = lambda t: t if whole else t[:1]
    exact = [(t if whole or i not in alone else t[:1]).detach().double() for i, t in enumerate(inputs)]
    exact = [t.requires_grad_(want) for t, want in zip(exact, wants)]
    expected = truth(*exact)
    wanted = [t for t, want in zip(exact, wants) if want]
    expected_gradients = torch.autograd.grad(expected, wanted, part(upstream).double())
    pairs = [(part(y), expected)]
    indices = [i for i, want in enumerate(wants) if want]
    # In 16 bits many maxima are equal, and who gets the gradient is open.
    for i, got, want in zip(indices, gradients, expected_gradients):
        if op != "max_pool2d" and (whole or i in alone):
            pairs.append((got if whole else got[:1], want))
    gap = lambda got, want: ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
    gaps = [gap(got, want.detach()) for got, want in pairs]
    return float("nan") if any(g != g for g in gaps) else max(gaps)


def run_op(row, way, precision, device, seconds):
    s = row["subject"]
    make_inputs, wants, truth, ways, alone = OPS[s["op"]](s, DTYPES[precision], device)
    function, layout = ways[way]
    inputs = make_inputs()
    inputs = layout(*inputs) if layout else inputs
    inputs = [t.detach().requires_grad_(want) for t, want in zip(inputs, wants)]
    wanted = [t for t, want in zip(inputs, wants) if want]
    with tf32(way.endswith("_tf32")):
        y = function(*inputs)
        upstream = torch.empty_like(y).copy_(normal(y.shape, y.dtype, device, 99))
        whole = lambda: torch.autograd.grad(function(*inputs), wanted, upstream)
        error = error_of(inputs, wants, truth, alone, (y.detach(), whole()), upstream, s["op"])
        result = {"error": error if error == error else None}
        if not error <= ALLOWED[precision] and not way.endswith("_tf32"):
            result["reason"] = f"wrong: differs from f64 arithmetic by {error:.1e} of the largest magnitude"
        del y
        if is_cuda(device):
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            whole()
            result["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        result |= rounded(timed(whole, seconds, device))
        result["forward_ms"] = rounded(timed(lambda: function(*inputs), seconds / 2, device))["ms"]
        if is_cuda(device):
            try:
                result["graph_ms"] = rounded(timed(captured(whole, device), seconds, device))["ms"]
            except Exception as e:  # whatever a kernel or allocator dislikes about capture
                result["graph_reason"] = first_line(e)
    return result


def run_call(make, way, seconds, device):
    with tf32(way.endswith("_tf32")):
        return rounded(timed(make(), seconds, device))


def first_line(e):
    text = str(e).strip() or type(e).__name__
    return text.splitlines()[0][:300]


def jobs_of(row, precision, device):
    """Name, whether it is compiled, and what runs it, for each way of a row."""
    s, dtype = row["subject"], DTYPES[precision]
    if s["op"] in OPS:
        ways = OPS[s["op"]](s, dtype, device)[3]
        return [(w, "compiled" in w, functools.partial(run_op, row, w, precision, device)) for w in ways]
    ways = adamw(s, device) if s["op"] == "adamw" else steps(s, dtype, device)
    return [(w, "compiled" in w, lambda seconds, w=w: run_call(ways[w], w, seconds, device)) for w in ways]


# The run.


def copy_rate(device):
    """Bytes read and written a second by a large copy: the best of many."""
    size = (1 << 30) if is_cuda(device) else (128 << 20)
    to, source = (torch.ones(size // 4, device=device) for _ in range(2))
    times = [timed(lambda: to.copy_(source), 0.1, device)["p20_ms"] for _ in range(2)]
    return 2e3 * size / min(times)


def matmul_rate(precision, device):
    """Floating-point operations a second of a large product of random numbers; f32 without TF32."""
    size = 8192 if is_cuda(device) else 512
    a, b = (normal((size, size), DTYPES[precision], device, i) for i in (0, 1))
    return 2e3 * size**3 / timed(lambda: a @ b, 0.3, device)["p20_ms"]


def machine(device, precisions):
    about = {"torch": torch.__version__, "device": str(device), "copy_bytes_per_s": copy_rate(device)}
    about["matmul_flop_per_s"] = {precision: matmul_rate(precision, device) for precision in precisions}
    about["matmul_size"] = 8192 if is_cuda(device) else 512
    if is_cuda(device):
        p = torch.cuda.get_device_properties(device)
        about |= {"name": p.name, "sms": p.multi_processor_count, "cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda}
    return about


def job_list(rows, precisions, device, want_compiled):
    """Everything to do, most telling first, since time may run out: uncompiled ways of the first precision, its compiled ways,
    the other precisions' in the same order."""
    jobs = []
    for rank, precision in enumerate(precisions):
        for row in rows:
            try:
                found = jobs_of(row, precision, device)
            except Cannot as e:
                found = [("all", False, functools.partial(refuse, str(e)))]
            for way, slow, run in found:
                if slow and not want_compiled:
                    run = functools.partial(refuse, "compiled ways were not asked for (--no-compile)")
                turn = int(slow) if rank == 0 else 2 + int(slow)
                jobs.append((turn, precision, row["name"], way, run))
    return sorted(jobs, key=lambda job: job[0])


def refuse(why, seconds):
    raise Cannot(why)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="the JSON of `attn2d bench --list --json`")
    parser.add_argument("out", help="the JSON to write, after every way")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--precision", default="bf16,f32,f16", metavar="LIST", help="f32, f16, bf16; the first is done first")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each timing")
    parser.add_argument("--budget", type=float, default=1e9, metavar="SECONDS", help="begin no way after that")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, and with it FlexAttention")
    args = parser.parse_args()
    start = time.perf_counter()
    warnings.filterwarnings("ignore")  # what backends have against an input comes back as the reason of its failure
    precisions = args.precision.split(",")
    if wrong := [p for p in precisions if p not in DTYPES]:
        sys.exit(f"--precision {wrong[0]}: expected some of {', '.join(DTYPES)}")
    device = torch.device(args.device)
    if is_cuda(device):
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    with open(args.rows) as file:
        rows = json.load(file)["rows"]
    with tf32(False):
        results = {"machine": machine(device, precisions), "rows": {}, "cut": False}
        jobs = job_list(rows, precisions, device, not args.no_compile)
        for _, precision, name, way, run in jobs:
            places = results["rows"].setdefault(precision, {}).setdefault(name, {})
            places[way] = {"reason": "cut: not reached in the time given"}
        for _, precision, name, way, run in jobs:
            if time.perf_counter() - start > args.budget:
                results["cut"] = True
                break
            try:
                result = run(seconds=args.seconds)
            except Exception as e:  # out of memory, no such kernel, a compiler that fails: the reason is the result
                result = {"reason": first_line(e)}
            results["rows"][precision][name][way] = result
            print(precision, name, way, json.dumps(result), flush=True)
            if is_cuda(device):
                torch.cuda.empty_cache()
            if "compiled" in way:
                torch._dynamo.reset()
            write(args.out, results)
    results["seconds"] = round(time.perf_counter() - start, 1)
    write(args.out, results)


def write(path, results):
    with open(path, "w") as file:
        json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
