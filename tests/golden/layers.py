"""Layers of attention, plainly: what `nn::Attention` and its relatives are held to. All are [N, C, H, W] -> the same."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import global_attention, lesa_context, lesa_logits, local_attention


def attend(q, k, v, heads, rel_h=None, rel_w=None, *, kernel=None, border="mask", scale):
    """Attention of images q, k, v; channels are heads * d, a head's d side by side. `kernel` is a local window, or None for
    the whole map. Tables have rows of all channels."""
    n, c, h, w = q.shape
    q, k, v = (x.permute(0, 2, 3, 1).reshape(n, h, w, heads, -1) for x in (q, k, v))
    if kernel is None:
        y = global_attention(q, k, v, rel_h, rel_w, scale=scale)
    else:
        y = local_attention(q, k, v, rel_h, rel_w, kernel=kernel, border=border, scale=scale)
    return y.reshape(n, h, w, c).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Three 1x1 projections without bias, then attention. `map_size` is the H, W that global tables are for, `kernel` the
    window of local attention. `position`: False; True, tables of all channels; "concat", the tables of the original
    stand-alone self-attention: row offsets for the first half of the channels, column offsets for the second, before the
    split into heads; "shared", BoTNet's: rows of one head's channels for every head, scaled as q.k is."""

    def __init__(self, channels, heads, position, map_size=None, kernel=None, border="mask", scaled=True):
        super().__init__()
        self.heads, self.position, self.kernel, self.border = heads, position, kernel, border
        self.scale = (channels // heads) ** -0.5 if scaled else 1.0
        for name in ("q", "k", "v"):
            setattr(self, name, nn.Conv2d(channels, channels, 1, bias=False))
        rows, cols = kernel or [2 * n - 1 for n in map_size]
        width = {"concat": channels // 2, "shared": channels // heads}.get(position, channels)
        self.rel_h = nn.Parameter(0.3 * torch.randn(rows, width)) if position else None
        self.rel_w = nn.Parameter(0.3 * torch.randn(cols, width)) if position else None

    def tables(self):
        if self.position == "concat":
            return F.pad(self.rel_h, (0, self.rel_h.shape[1])), F.pad(self.rel_w, (self.rel_w.shape[1], 0))
        if self.position == "shared":
            return [self.scale * rel.repeat(1, self.heads) for rel in (self.rel_h, self.rel_w)]
        return self.rel_h, self.rel_w

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return attend(q, k, v, self.heads, *self.tables(), kernel=self.kernel, border=self.border, scale=self.scale)


class Appended(Attention):
    """A residual branch after a block: x + norm(proj(attention(x)))."""

    def __init__(self, channels, *args, **kwargs):
        super().__init__(channels, *args, **kwargs)
        self.proj = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.norm(self.proj(super().forward(x)))


class NonLocal(nn.Module):
    """Wang et al. 2018, embedded Gaussian: x + norm(W attention(theta x, phi x, g x)) at half the channels, without scale, W
    called proj. `kernel` limits the softmax to a window."""

    appends = True

    def __init__(self, channels, heads=1, kernel=None, border="mask"):
        super().__init__()
        self.heads, self.kernel, self.border = heads, kernel, border
        for name in ("theta", "phi", "g"):
            setattr(self, name, nn.Conv2d(channels, channels // 2, 1))
        self.proj = nn.Conv2d(channels // 2, channels, 1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = attend(self.theta(x), self.phi(x), self.g(x), self.heads, kernel=self.kernel, border=self.border, scale=1.0)
        return x + self.norm(self.proj(y))


class AttentionBottleneck(nn.Module):
    """Local attention without positions between 1x1 embeddings at a quarter of the channels, with a residual."""

    def __init__(self, channels, heads, kernel, border="mask"):
        super().__init__()
        inner = channels // 4
        self.heads, self.kernel, self.border, self.scale = heads, kernel, border, (inner // heads) ** -0.5
        self.reduce = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.q, self.k, self.v = (nn.Conv2d(inner, inner, 1, bias=False) for _ in range(3))
        self.norm2 = nn.BatchNorm2d(inner)
        self.expand = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.norm1(self.reduce(x)))
        y = attend(self.q(y), self.k(y), self.v(y), self.heads, kernel=self.kernel, border=self.border, scale=self.scale)
        return x + self.norm3(self.expand(F.relu(self.norm2(y))))


class Lesa(nn.Module):
    """Locally enhanced self-attention (Yang et al. 2021), with as many groups as heads: unary + gate * context."""

    def __init__(self, channels, heads, map_size):
        super().__init__()
        c, pixels = channels, map_size[0] * map_size[1]
        self.heads = heads
        self.qkv, self.bn_qkv = nn.Conv2d(c, 2 * c, 1, bias=False), nn.BatchNorm2d(2 * c)
        self.relative = nn.Parameter(0.3 * torch.randn(2 * pixels - 1, 2 * c // heads))
        self.bn_similarity, self.bn_output = nn.BatchNorm2d(3 * heads), nn.BatchNorm2d(2 * c)
        self.unary1 = nn.Conv2d(c, c, 3, padding=1, groups=heads, bias=False)
        self.unary2, self.bn_unary = nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)
        self.gate_unary, self.gate_context = (nn.Conv2d(c, c, 1, bias=False) for _ in range(2))
        self.bn_gate1 = nn.BatchNorm2d(c)
        self.gate, self.bn_gate2 = nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x):
        n, c, h, w = x.shape
        qkv = self.bn_qkv(self.qkv(x)).permute(0, 2, 3, 1).reshape(n, h * w, self.heads, -1)
        logits = self.bn_similarity(lesa_logits(qkv, self.relative).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        both = lesa_context(logits, qkv, self.relative).reshape(n, h, w, 2 * c)
        context = sum(self.bn_output(both.permute(0, 3, 1, 2)).chunk(2, 1))
        unary = self.bn_unary(self.unary2(self.unary1(x)))
        hidden = self.bn_gate1(self.gate_unary(F.relu(unary)) + self.gate_context(F.relu(context)))
        return unary + torch.sigmoid(self.bn_gate2(self.gate(F.relu(hidden)))) * context


class Halve(nn.Module):
    """2x2 average pool in the place of stride 2; on an odd side the first window hangs over the edge."""

    def forward(self, x):
        return F.avg_pool2d(x, 2, 2, (x.shape[2] % 2, x.shape[3] % 2), count_include_pad=False)


class SqueezeExcite(nn.Module):
    def __init__(self, channels, squeeze):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeeze, 1), nn.Conv2d(squeeze, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))))


class TokenAttention(nn.Module):
    """torch.nn.MultiheadAttention's self-attention of [N, T, C], written out."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(0.1 * torch.randn(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        q, k, v = (y.reshape(n, t, self.heads, -1) for y in (q, k, v))
        weights = torch.softmax(torch.einsum("nqgd,nkgd->ngqk", q, k) * q.shape[-1] ** -0.5, -1)
        return self.out_proj(torch.einsum("ngqk,nkgd->nqgd", weights, v).reshape(n, t, c))
