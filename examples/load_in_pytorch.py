#!/usr/bin/env python3
"""A model of `attn2d export` in plain PyTorch.

    attn2d export --checkpoint runs/my-run --out model.safetensors
    python examples/load_in_pytorch.py model.safetensors picture.png

Needs PyTorch, torchvision and Pillow. Plain nets are torchvision's own; attention of every kind is written out below. To see that both programs
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
from collections import OrderedDict
from types import SimpleNamespace

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


def attend(q, k, v, heads, window=None, border="mask", scale=1.0, tables=None):
    """Self-attention over the pixels of a window round each query, of images [N, C, H, W] whose heads have d neighbouring channels:

        logit = scale * <q, k> + <q, rel_h[row offset] + rel_w[column offset]>        y = softmax(logit) v

    Offsets are key minus query; the tables rel_h and rel_w have a row of C channels for each, from the most negative. The window is
    the whole map, 2H-1 x 2W-1 places, where none is given. border "mask" leaves places outside the map out; "zero" keeps them with
    k = v = 0."""
    n, c, h, w = q.shape
    rows, columns = window or (2 * h - 1, 2 * w - 1)

    def windows(t):
        return F.unfold(t, (rows, columns), padding=(rows // 2, columns // 2))

    q = q.reshape(n, heads, c // heads, h * w)
    k, v = (windows(t).reshape(n, heads, c // heads, rows * columns, h * w) for t in (k, v))
    logits = scale * torch.einsum("ngdp,ngdkp->ngkp", q, k)
    if tables is not None:
        rel = tables[0][:, None] + tables[1][None]
        logits = logits + torch.einsum("ngdp,kgd->ngkp", q, rel.reshape(rows * columns, heads, c // heads))
    if border == "mask":
        logits = logits.masked_fill(windows(torch.ones(1, 1, h, w)) == 0, float("-inf"))
    return torch.einsum("ngkp,ngdkp->ngdp", logits.softmax(2), v).reshape(n, c, h, w)


def pointwise(inputs, outputs, bias=False):
    return nn.Conv2d(inputs, outputs, 1, bias=bias)


class Attention(nn.Module):
    """ga, la, ela, botnet: attention of three 1x1 convolutions. `a` is what the model string says, `arrays` the file's arrays of this
    layer. ela's tables have rows of all channels; with tables=concat those of rows are of the first half of the channels and those of
    columns of the second; botnet's are of one head, the same for all, and scaled as q.k is."""

    def __init__(self, channels, a, arrays):
        super().__init__()
        self.a, self.scale = a, (channels // a.heads) ** -0.5 if a.scaled else 1.0
        self.q, self.k, self.v = (pointwise(channels, channels) for _ in range(3))
        for name in {"rel_h", "rel_w"} & set(arrays):
            setattr(self, name, nn.Parameter(torch.zeros_like(arrays[name])))

    def tables(self):
        if not hasattr(self, "rel_h"):
            return None
        h, w = self.rel_h, self.rel_w
        if self.a.kind == "botnet":
            return [self.scale * table.repeat(1, self.a.heads) for table in (h, w)]
        return (F.pad(h, (0, h.shape[1])), F.pad(w, (w.shape[1], 0))) if self.a.concat else (h, w)

    def forward(self, x):
        a = self.a
        return attend(self.q(x), self.k(x), self.v(x), a.heads, a.window, a.border, self.scale, self.tables())


class Bottleneck(nn.Module):
    """ela-bottleneck: x + norm(expand(relu(norm(attention(relu(norm(reduce(x)))))))), without tables, at a quarter of the channels."""

    def __init__(self, channels, a, _):
        super().__init__()
        inner = channels // 4
        self.a, self.scale = a, (inner // a.heads) ** -0.5 if a.scaled else 1.0
        self.reduce, self.norm1 = pointwise(channels, inner), nn.BatchNorm2d(inner)
        self.q, self.k, self.v = (pointwise(inner, inner) for _ in range(3))
        self.norm2, self.expand, self.norm3 = nn.BatchNorm2d(inner), pointwise(inner, channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.norm1(self.reduce(x)))
        y = attend(self.q(y), self.k(y), self.v(y), self.a.heads, self.a.window, self.a.border, self.scale)
        return x + self.norm3(self.expand(F.relu(self.norm2(y))))


class NonLocal(nn.Module):
    """nonlocal, ela-gaussian: x + norm(proj(attention(theta(x), phi(x), g(x)))) at half the channels, without scale."""

    def __init__(self, channels, a, _):
        super().__init__()
        self.a = a
        self.theta, self.phi, self.g = (pointwise(channels, channels // 2, True) for _ in range(3))
        self.proj, self.norm = pointwise(channels // 2, channels, True), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = attend(self.theta(x), self.phi(x), self.g(x), self.a.heads, self.a.window, self.a.border)
        return x + self.norm(self.proj(y))


class Lesa(nn.Module):
    """lesa: unary + gate * context, where context is attention over the whole map with norms of its three kinds of logits and of its
    two sums. Positions are offsets of flattened pixels, query minus key (for keys' own term the other way round)."""

    def __init__(self, channels, a, arrays):
        super().__init__()
        c, self.heads = channels, a.heads
        self.qkv, self.bn_qkv = pointwise(c, 2 * c), nn.BatchNorm2d(2 * c)
        self.relative = nn.Parameter(torch.zeros_like(arrays["relative"]))
        self.bn_similarity, self.bn_output = nn.BatchNorm2d(3 * a.heads), nn.BatchNorm2d(2 * c)
        self.unary1 = nn.Conv2d(c, c, 3, padding=1, groups=a.heads, bias=False)
        self.unary2, self.bn_unary = pointwise(c, c), nn.BatchNorm2d(c)
        self.gate_unary, self.gate_context, self.bn_gate1 = pointwise(c, c), pointwise(c, c), nn.BatchNorm2d(c)
        self.gate, self.bn_gate2 = pointwise(c, c), nn.BatchNorm2d(c)

    def context(self, x):
        n, c, h, w = x.shape
        pixels, e = h * w, c // self.heads // 2
        q, k, v = self.bn_qkv(self.qkv(x)).reshape(n, self.heads, 4 * e, pixels).split([e, e, 2 * e], 2)
        offsets = torch.arange(pixels)[:, None] - torch.arange(pixels) + pixels - 1
        r_q, r_k, r_v = self.relative[offsets].split([e, e, 2 * e], 2)
        by_key = torch.einsum("ngdj,ijd->ngij", k, r_k.transpose(0, 1))
        kinds = [torch.einsum("ngdi,ngdj->ngij", q, k), torch.einsum("ngdi,ijd->ngij", q, r_q), by_key]
        logits = self.bn_similarity(torch.cat(kinds, 1)).reshape(n, 3, self.heads, pixels, pixels)
        weights = logits.sum(1).softmax(3)
        sums = [torch.einsum("ngij,ngcj->ngci", weights, v), torch.einsum("ngij,ijc->ngci", weights, r_v)]
        return sum(self.bn_output(torch.cat([y.reshape(n, c, h, w) for y in sums], 1)).chunk(2, 1))

    def forward(self, x):
        unary, context = self.bn_unary(self.unary2(self.unary1(x))), self.context(x)
        hidden = self.bn_gate1(self.gate_unary(F.relu(unary)) + self.gate_context(F.relu(context)))
        return unary + torch.sigmoid(self.bn_gate2(self.gate(F.relu(hidden)))) * context


def appended(layer):
    """The layer after a block, as a residual branch: x + norm(proj(layer(x)))."""

    class Appended(layer):
        def __init__(self, channels, *args):
            super().__init__(channels, *args)
            self.proj, self.norm = pointwise(channels, channels), nn.BatchNorm2d(channels)

        def forward(self, x):
            return x + self.norm(self.proj(super().forward(x)))

    return Appended


class Halve(nn.Module):
    """What follows an attention in the place of a convolution of stride 2; on an odd side the first window hangs over the edge."""

    def forward(self, x):
        return F.avg_pool2d(x, 2, 2, (x.shape[2] % 2, x.shape[3] % 2), count_include_pad=False)


# --------------------------------------------------------------------------------------------------------------- model

# Heads and width of the ViTs that torchvision has no name for.
VITS = {"vit_ti_16": (3, 192), "vit_s_16": (6, 384), "vit_b_16": (12, 768)}
# Kinds of attention: the layer, its heads where none are named, and whether it is a residual branch, which follows a block.
LAYERS = {
    **dict.fromkeys(("ga", "la", "ela", "ela-position"), (Attention, 8, False)),
    "botnet": (Attention, 4, False),
    "lesa": (Lesa, 8, False),
    "ela-bottleneck": (Bottleneck, 8, False),
    **dict.fromkeys(("nonlocal", "ela-gaussian"), (NonLocal, 1, True)),
}


def parse(options):
    """`append,heads=4` as a dictionary; a width, `w16`, is called w."""
    words = [re.sub(r"^w(\d+)$", r"w=\1", word) for word in (options or "").split(",") if word]
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def plain(text, classes, size):
    name, _, options = text.partition(":")
    # What is left out in training alone is no matter here.
    options = {key: value for key, value in parse(options).items() if key not in ("dropout", "stochastic_depth")}
    if name in VITS and not set(options) - {"w", "heads", "depth", "patch"}:
        (heads, width), get = VITS[name], lambda key, default: int(options.get(key, default))
        width = get("w", width)
        return torchvision.models.VisionTransformer(
            size, get("patch", 16), get("depth", 12), get("heads", heads), width, 4 * width, num_classes=classes
        )
    if options or not re.fullmatch(r"resnet(18|34|50)|efficientnet_b[0-2]", name):
        sys.exit(f"model '{text}': this script builds torchvision's ResNets and EfficientNets at their full width and depth, and ViTs")
    return getattr(torchvision.models, name)(weights=None, num_classes=classes)


def read_attention(text):
    """`la7@3,4.1:append,heads=4`: what it says, its places, and whether it follows a block."""
    match = re.fullmatch(r"([a-z-]+)(\d*)(?:@([\d.,]+))?(?::(.*))?", text)
    if not match or match[1] not in LAYERS:
        sys.exit(f"attention '{text}': this script knows {', '.join(LAYERS)}")
    kind, side, places, options = match.groups()
    options = parse(options)
    if unknown := set(options) - {"append", "replace", "heads", "border", "pos", "scale", "tables", "sasa"}:
        sys.exit(f"attention '{text}': this script does not know the option {', '.join(sorted(unknown))}")
    layer, heads, branch = LAYERS[kind]
    sasa = "sasa" in options
    local = kind.startswith(("la", "ela"))
    a = SimpleNamespace(
        kind=kind,
        heads=int(options.get("heads", heads)),
        window=(int(side or 7),) * 2 if local else None,
        border="zero" if sasa else options.get("border", "mask"),
        scaled=not sasa and options.get("scale") != "none",
        concat=sasa or options.get("tables") == "concat",
    )
    append = "append" in options or branch and "replace" not in options
    a.layer = appended(layer) if append and layer in (Attention, Lesa) else layer
    return a, places, append


def add_attention(net, text, state):
    """Puts attention into the blocks of a ResNet or an EfficientNet."""
    a, places, append = read_attention(text)
    if isinstance(net, torchvision.models.VisionTransformer):
        sys.exit(f"attention '{text}': a transformer has no place for it")
    resnet = isinstance(net, torchvision.models.ResNet)
    for place in (places or ("3,4" if resnet else "6,7")).split(","):
        stage, _, number = place.partition(".")
        prefix = f"layer{stage}" if resnet else f"features.{stage}"
        blocks = net.get_submodule(prefix)
        for i in [int(number)] if number else range(len(blocks)):
            (into_resnet if resnet else into_efficientnet)(blocks[i], f"{prefix}.{i}", a, append, state)


def make(a, name, channels, state):
    """The layer called so; its tables have the sizes that they have in the file."""
    name += ".attn."
    return a.layer(channels, a, {key[len(name) :]: array for key, array in state.items() if key.startswith(name)})


def follow(block, layer):
    block.attn = layer
    block.register_forward_hook(lambda block, inputs, y: block.attn(y))


def into_resnet(block, name, a, append, state):
    last = block.bn3 if hasattr(block, "bn3") else block.bn2
    if append:
        return follow(block, make(a, name, last.num_features, state))
    stride = block.conv2.stride[0]
    block.attn = make(a, name, block.bn2.num_features, state)
    # The block goes on calling conv2, but the attention's arrays are called attn.
    del block.conv2
    object.__setattr__(block, "conv2", nn.Sequential(block.attn, Halve()) if stride == 2 else block.attn)


def into_efficientnet(block, name, a, append, state):
    if append:
        return follow(block, make(a, name, block.block[-1][1].num_features, state))
    at = len(block.block) - 3  # the depthwise convolution; squeeze-excite and a projection follow it
    conv, norm, act = block.block[at]
    parts = {"attn": make(a, f"{name}.block.{at}", norm.num_features, state), "1": norm, "2": act}
    if conv.stride[0] == 2:
        parts = {"attn": parts.pop("attn"), "halve": Halve(), **parts}
    block.block[at] = nn.Sequential(OrderedDict(parts))


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
    for name in classes:
        if any(f"logit_{name}" not in row for row in expected.values()):
            sys.exit(f"{args.expect}: no column logit_{name}; make the file by `attn2d predict --logits` with this model")
    worst, compared = 0.0, 0
    for path in args.images or expected:
        with torch.no_grad():
            logits = net(prepare(path, metadata)[None])[0]
        p = logits.softmax(0)
        words = "  ".join(f"{name} {value:.4f}" for name, value in zip(classes, p.tolist()))
        print(f"{path}: {classes[p.argmax()]}  ({words})")
        if path in expected:
            theirs = torch.tensor([float(expected[path][f"logit_{name}"]) for name in classes])
            worst, compared = max(worst, float((logits - theirs).abs().max())), compared + 1
    if args.expect:
        print(f"largest difference of a logit: {worst:.2e} over {compared} images")
        if compared == 0:
            sys.exit(f"{args.expect}: none of its paths is among the images")
        sys.exit(0 if worst <= TOLERANCE else f"that is more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
