"""The nets of model cases, plainly: ResNet, EfficientNet and ViT with a free width, and in chosen blocks attention in place of
the spatial convolution or after the block. Names are torchvision's, so at full width and without attention a state dict is
torchvision's own. `attention` has a function channels -> layer for some (stage, block), stages from 1 and blocks from 0."""
import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from layers import Appended, Halve, NonLocal, SqueezeExcite, TokenAttention

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
# expand, kernel, stride, outputs, layers; and each net's factors of width and depth.
MBCONV = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1))
FACTORS = {"efficientnet_b0": (1.0, 1.0), "efficientnet_b1": (1.0, 1.1), "efficientnet_b2": (1.1, 1.2)}
VIT = {"vit_ti_16": (192, 3), "vit_s_16": (384, 6), "vit_b_16": (768, 12)}


def appends(layer):
    return isinstance(layer, (Appended, NonLocal))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inside, out, stride, attention=None):
        super().__init__()
        attention = attention and attention(out)
        append = appends(attention)
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        if attention is None or append:
            self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        if stride != 1 or inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        if attention is not None:
            self.attn = attention

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y) if hasattr(self, "conv2") else self.attn(y))
        y = F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))
        return self.attn(y) if hasattr(self, "conv2") and hasattr(self, "attn") else y


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1. Attention that replaces the 3x3 has an average pool in the stride's place."""

    expansion = 4

    def __init__(self, inside, channels, stride, attention=None):
        super().__init__()
        out = 4 * channels
        attention = attention and attention(channels)
        self.conv1, self.bn1 = nn.Conv2d(inside, channels, 1, bias=False), nn.BatchNorm2d(channels)
        if attention is None:
            self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        else:
            self.attn, self.pool = attention, Halve() if stride == 2 else nn.Identity()
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out)
        if stride != 1 or inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.conv2(y) if hasattr(self, "conv2") else self.pool(self.attn(y))
        y = self.bn3(self.conv3(F.relu(self.bn2(y))))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet(nn.Module):
    """`width` is the number of channels of stage 1, doubled in each later stage. `small_stem` is one 3x3 convolution
    without pooling."""

    def __init__(self, depth="resnet18", num_classes=1000, width=64, stages=4, small_stem=False, attention={}):
        super().__init__()
        block_type = Bottleneck if depth == "resnet50" else BasicBlock
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False) if small_stem else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.small_stem, self.stages = small_stem, stages
        channels = width
        for stage in range(1, stages + 1):
            out, layer = width << (stage - 1), []
            for block in range(DEPTHS[depth][stage - 1]):
                stride = 2 if stage > 1 and block == 0 else 1
                layer.append(block_type(channels, out, stride, attention.get((stage, block))))
                channels = out * block_type.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*layer))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.small_stem else F.max_pool2d(x, 3, 2, 1)
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def conv_norm(inside, out, kernel, stride=1, groups=1, act=True):
    conv = nn.Conv2d(inside, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), *[nn.SiLU()] * act)


class MBConv(nn.Module):
    def __init__(self, inside, out, expand, kernel, stride, attention=None):
        super().__init__()
        inner = inside * expand
        layers = [] if expand == 1 else [conv_norm(inside, inner, 1)]
        if attention is None:
            layers.append(conv_norm(inner, inner, kernel, stride, groups=inner))
        else:
            parts = [("attn", attention(inner)), ("pool", Halve() if stride == 2 else nn.Identity())]
            layers.append(nn.Sequential(OrderedDict(parts + [("1", nn.BatchNorm2d(inner)), ("2", nn.SiLU())])))
        layers += [SqueezeExcite(inner, max(1, inside // 4)), conv_norm(inner, out, 1, act=False)]
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and inside == out

    def forward(self, x):
        return self.block(x) + x if self.residual else self.block(x)


def divisible(channels):
    new = max(8, int(channels + 4) // 8 * 8)
    return new + 8 if new < 0.9 * channels else new


class EfficientNet(nn.Module):
    """`width` is the number of channels of the stem, of which all others are multiples. Dropout and stochastic depth are left
    out: cases have none."""

    def __init__(self, name="efficientnet_b0", num_classes=1000, width=32, stages=7, attention={}):
        super().__init__()
        wider, deeper = FACTORS[name]
        channels = divisible(32 * wider * width / 32)
        features = [conv_norm(3, channels, 3, 2)]
        for stage, (expand, kernel, stride, out, layers) in enumerate(MBCONV[:stages], 1):
            blocks, out = [], divisible(out * wider * width / 32)
            for block in range(math.ceil(layers * deeper)):
                layer = attention.get((stage, block))
                blocks.append(MBConv(channels, out, expand, kernel, stride if block == 0 else 1, layer))
                channels = out
            features.append(nn.Sequential(*blocks))
        features.append(conv_norm(channels, 4 * channels, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(4 * channels, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class EncoderLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = TokenAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        mlp = [nn.Linear(width, 4 * width), nn.GELU(), nn.Identity(), nn.Linear(4 * width, width)]
        self.mlp = nn.Sequential(*mlp)

    def forward(self, x):
        x = x + self.self_attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ViT(nn.Module):
    def __init__(self, num_classes, image, width=768, depth=12, heads=12, patch=16):
        super().__init__()
        tokens = (image[0] // patch) * (image[1] // patch)
        self.class_token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.conv_proj = nn.Conv2d(3, width, patch, patch)
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(0.1 * torch.randn(1, tokens + 1, width))
        layers = [(f"encoder_layer_{i}", EncoderLayer(width, heads)) for i in range(depth)]
        self.encoder.layers = nn.Sequential(OrderedDict(layers))
        self.encoder.ln = nn.LayerNorm(width, eps=1e-6)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(width, num_classes)))

    def forward(self, x):
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.encoder.pos_embedding
        return self.heads(self.encoder.ln(self.encoder.layers(x))[:, 0])


def check_against_torchvision():
    """The nets above are torchvision's: same names, shapes and logits."""
    from torchvision import models

    image = (48, 64)
    small = {"patch_size": 16, "num_layers": 12, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768, "num_classes": 10}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        pairs = [(getattr(models, name)(num_classes=10), ResNet(name, 10)) for name in DEPTHS]
        pairs += [(getattr(models, name)(num_classes=10), EfficientNet(name, 10)) for name in FACTORS]
        pairs.append((models.VisionTransformer(image_size=48, **small), ViT(10, (48, 48), 192, heads=3)))
        for theirs, ours in pairs:
            theirs, ours = theirs.eval(), ours.eval()
            stir(theirs)
            ours.load_state_dict(theirs.state_dict(), strict=True)
            assert list(ours.state_dict()) == list(theirs.state_dict())
            x = torch.randn(2, 3, *((48, 48) if isinstance(ours, ViT) else image))
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def stir(model):
    """Random numbers in every parameter and buffer of a norm and wherever else all are zero: what starts at 0 and 1 would hide
    mistakes."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.weight.data = 1 + 0.2 * torch.randn(module.weight.shape)
            module.bias.data = 0.2 * torch.randn(module.bias.shape)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.data = 0.2 * torch.randn(module.running_mean.shape)
            module.running_var.data = 0.5 + torch.rand(module.running_var.shape)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data = 0.1 * torch.randn(parameter.shape)
