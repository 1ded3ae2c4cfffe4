#!/usr/bin/env python3
"""A model of `attn2d export` in plain PyTorch.

    attn2d export --checkpoint runs/my-run --out model.safetensors
    python examples/load_in_pytorch.py model.safetensors picture.png

Needs PyTorch, torchvision and Pillow. Plain nets are torchvision's own; attention is the module below. To see that both programs
mean the same, let attn2d write its logits, and compare:

    attn2d predict --checkpoint model.safetensors picture.png --logits --out predictions.csv
    python examples/load_in_pytorch.py model.safetensors --expect predictions.csv

which fails where a logit is off by more than 1e-4 (PNG, TIFF and BMP: decoders of JPEG differ in the last bit of a pixel).
"""
import argparse
import csv
import json
import re
import struct
import sys

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

TOLERANCE = 1e-4


# ------------------------------------------------------------------------------------------------------------ the file


def read_safetensors(path):
    """Metadata and tensors: eight bytes of length, a JSON header, raw numbers. The package `safetensors` does the same."""
    data = bytearray(open(path, "rb").read())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    types = {"F32": torch.float32, "I64": torch.int64}
    state = {}
    for name, entry in header.items():
        start, end = (8 + length + at for at in entry["data_offsets"])
        state[name] = torch.frombuffer(data[start:end], dtype=types[entry["dtype"]]).reshape(entry["shape"])
    return metadata, state


# ----------------------------------------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Self-attention over the pixels of a window round each query:

        logit = <q, k> / sqrt(d) + <q, rel_h[row offset] + rel_w[column offset]>        y = softmax(logit) v

    with q, k, v three 1x1 convolutions and heads of d neighbouring channels. Offsets are key minus query, from the most negative.
    `ga` has the whole map for its window, 2H-1 x 2W-1 places, `la` and `ela` one of k x k; `la` has no tables. border "mask" leaves
    places outside the map out; "zero" keeps them with k = v = 0."""

    def __init__(self, channels, heads, window, border, tables):
        super().__init__()
        self.heads, self.window, self.border = heads, window, border
        for name in ("q", "k", "v"):
            setattr(self, name, nn.Conv2d(channels, channels, 1, bias=False))
        if tables:
            self.rel_h = nn.Parameter(torch.zeros(window[0], channels))
            self.rel_w = nn.Parameter(torch.zeros(window[1], channels))

    def forward(self, x):
        n, c, h, w = x.shape
        (rows, columns), heads, d = self.window, self.heads, c // self.heads

        def windows(t):
            return F.unfold(t, self.window, padding=(rows // 2, columns // 2))

        q = self.q(x).reshape(n, heads, d, h * w)
        k, v = (windows(p(x)).reshape(n, heads, d, rows * columns, h * w) for p in (self.k, self.v))
        logits = torch.einsum("ngdp,ngdkp->ngkp", q, k) / d**0.5
        if hasattr(self, "rel_h"):
            rel = self.rel_h[:, None] + self.rel_w[None]
            logits = logits + torch.einsum("ngdp,kgd->ngkp", q, rel.reshape(rows * columns, heads, d))
        if self.border == "mask":
            outside = windows(torch.ones(1, 1, h, w)) == 0
            logits = logits.masked_fill(outside, float("-inf"))
        return torch.einsum("ngkp,ngdkp->ngdp", logits.softmax(2), v).reshape(n, c, h, w)


class Appended(Attention):
    """After a block, as a residual branch: x + norm(proj(attention(x)))."""

    def __init__(self, channels, *args):
        super().__init__(channels, *args)
        self.proj = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.norm(self.proj(super().forward(x)))


# --------------------------------------------------------------------------------------------------------------- model

# Heads, width and MLP width of the ViTs that torchvision has no name for.
VITS = {"vit_ti_16": (3, 192, 768), "vit_s_16": (6, 384, 1536)}


def plain(name, classes, size):
    if name in VITS:
        heads, width, mlp = VITS[name]
        return torchvision.models.VisionTransformer(size, 16, 12, heads, width, mlp, num_classes=classes)
    if not re.fullmatch(r"resnet(18|34|50)|efficientnet_b[0-2]|vit_b_16", name):
        sys.exit(f"model '{name}': this script builds torchvision's nets at their full width")
    size = {"image_size": size} if name.startswith("vit") else {}
    return getattr(torchvision.models, name)(weights=None, num_classes=classes, **size)


def add_attention(net, text, state):
    """Puts attention such as `la7@3,4.1:append,heads=4` into a ResNet of basic blocks."""
    match = re.fullmatch(r"(ga|la|ela|ela-position)(\d*)@([\d.,]+)(?::(.*))?", text)
    basic = isinstance(net, torchvision.models.ResNet) and isinstance(net.layer1[0], torchvision.models.resnet.BasicBlock)
    if not match or not basic:
        sys.exit(f"attention '{text}': this script knows ga, la and ela in resnet18 and resnet34")
    kind, side, places, options = match.groups()
    options = dict(option.partition("=")[::2] for option in (options or "").split(",") if option)
    if unknown := set(options) - {"append", "heads", "border", "pos"}:
        sys.exit(f"attention '{text}': this script does not know the option {', '.join(sorted(unknown))}")
    for place in places.split(","):
        stage, _, block = place.partition(".")
        layer = getattr(net, f"layer{stage}")
        for i in [int(block)] if block else range(len(layer)):
            name, channels = f"layer{stage}.{i}.attn", layer[i].bn2.num_features
            tables = f"{name}.rel_h" in state
            if kind != "ga":
                window = (int(side),) * 2
            elif tables:
                window = tuple(len(state[f"{name}.{table}"]) for table in ("rel_h", "rel_w"))
            else:
                sys.exit(f"attention '{text}': without tables this script does not know the size of the map")
            rest = (int(options.get("heads", 8)), window, options.get("border", "mask"), tables)
            if "append" in options:
                layer[i].attn = Appended(channels, *rest)
                layer[i].register_forward_hook(lambda block, inputs, y: block.attn(y))
            else:
                layer[i].attn = Attention(channels, *rest)
                # The block goes on calling conv2, but the attention's arrays are called attn.
                del layer[i].conv2
                object.__setattr__(layer[i], "conv2", layer[i].attn)


def load(path):
    """The model in evaluation mode, and the file's metadata."""
    metadata, state = read_safetensors(path)
    name, *attention = metadata["model"].split("+")
    net = plain(name, int(metadata["num_classes"]), int(metadata["image_size"].split("x")[0]))
    for text in attention:
        add_attention(net, text, state)
    net.load_state_dict(state, strict=True)
    return net.eval(), metadata


# ------------------------------------------------------------------------------------------------------------ pictures


def resize(x, start, extent, size):
    """The last axis of x from `start` on, `extent` pixels long, at another size: triangle weights, as wide as a result pixel where
    the axis shrinks. Every number is rounded where attn2d rounds it, so that the results are the same to the bit."""
    source = x.shape[-1]
    scale = torch.tensor(extent, dtype=torch.float32) / size
    radius = scale.clamp(min=1.0)
    centre = start + (torch.arange(size, dtype=torch.float32) + 0.5) * scale
    first = (centre - radius).floor().clamp(min=0).long().clamp(max=source - 1)
    end = torch.maximum((centre + radius).ceil().long().clamp(max=source), first + 1)
    taps = [(first + tap, first + tap < end) for tap in range(int((end - first).max()))]
    weights = [
        torch.where(inside, (1 - ((pixel + 0.5 - centre) / radius).abs()).clamp(min=0), torch.zeros(()))
        for pixel, inside in taps
    ]
    total = sum(weights)
    y = torch.zeros(*x.shape[:-1], size)
    for (pixel, _), weight in zip(taps, weights):
        y = y + (weight / total) * x[..., pixel.clamp(max=source - 1)]
    return y


def prepare(path, metadata):
    """A picture as the model's validation saw it: the middle square, resized with antialias, normalised."""
    image = torchvision.transforms.functional.pil_to_tensor(Image.open(path).convert("RGB")).float()
    _, height, width = image.shape
    side, size = min(height, width), int(metadata["image_size"].split("x")[0])
    image = resize(image, (width - side) / 2, side, size)
    image = resize(image.mT, (height - side) / 2, side, size).mT
    mean, std = (torch.tensor(json.loads(metadata[key]))[:, None, None] for key in ("mean", "std"))
    return ((image + 0.5).floor() / 255 - mean) / std


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a file of `attn2d export`")
    parser.add_argument("images", nargs="*")
    parser.add_argument("--expect", metavar="FILE.csv", help="a table of `attn2d predict --logits`; its pictures are taken if none are given")
    args = parser.parse_args()
    net, metadata = load(args.model)
    classes = json.loads(metadata["classes"])
    expected = {row["path"]: row for row in csv.DictReader(open(args.expect, newline=""))} if args.expect else {}
    worst = 0.0
    for path in args.images or expected:
        with torch.no_grad():
            logits = net(prepare(path, metadata)[None])[0]
        p = logits.softmax(0)
        words = "  ".join(f"{name} {value:.4f}" for name, value in zip(classes, p.tolist()))
        print(f"{path}: {classes[p.argmax()]}  ({words})")
        if path in expected:
            theirs = torch.tensor([float(expected[path][f"logit_{name}"]) for name in classes])
            worst = max(worst, float((logits - theirs).abs().max()))
    if args.expect:
        print(f"largest difference of a logit: {worst:.2e}")
        sys.exit(0 if worst <= TOLERANCE else f"that is more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
