"""Whole models: a plain ResNet with a base width and, in chosen blocks, attention in place of the second 3x3 convolution
or after the block. Names are torchvision's, so at width 64 and without attention the state dict is torchvision's own."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import global_attention, local_attention

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


class Attention(nn.Module):
    """Three 1x1 projections without bias, then attention; channels are heads * d, a head's d side by side. `map_size`
    is the H, W that global tables are for, `kernel` the window of local attention."""

    def __init__(self, channels, heads, position, map_size=None, kernel=None, border="mask"):
        super().__init__()
        self.heads, self.kernel, self.border = heads, kernel, border
        for name in ("q", "k", "v"):
            setattr(self, name, nn.Conv2d(channels, channels, 1, bias=False))
        rows, cols = kernel or [2 * n - 1 for n in map_size]
        self.rel_h = nn.Parameter(0.3 * torch.randn(rows, channels)) if position else None
        self.rel_w = nn.Parameter(0.3 * torch.randn(cols, channels)) if position else None

    def forward(self, x):
        n, c, h, w = x.shape
        q, k, v = (p(x).permute(0, 2, 3, 1).reshape(n, h, w, self.heads, -1) for p in (self.q, self.k, self.v))
        scale = q.shape[-1] ** -0.5
        if self.kernel is None:
            y = global_attention(q, k, v, self.rel_h, self.rel_w, scale=scale)
        else:
            y = local_attention(q, k, v, self.rel_h, self.rel_w, kernel=self.kernel, border=self.border, scale=scale)
        return y.reshape(n, h, w, c).permute(0, 3, 1, 2)


class Appended(Attention):
    """A residual branch after a block: x + norm(proj(attention(x)))."""

    def __init__(self, channels, *args, **kwargs):
        super().__init__(channels, *args, **kwargs)
        self.proj = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.norm(self.proj(super().forward(x)))


class BasicBlock(nn.Module):
    def __init__(self, inside, out, stride, attention=None):
        super().__init__()
        attention = attention and attention(out)
        append = isinstance(attention, Appended)
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


class ResNet(nn.Module):
    """`width` is the number of channels of stage 1, doubled in each later stage. `attention` has a function
    channels -> Attention for some (stage, block), stages from 1 and blocks from 0. `small_stem` is one 3x3 convolution
    without pooling."""

    def __init__(self, depth="resnet18", num_classes=1000, width=64, stages=4, small_stem=False, attention={}):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False) if small_stem else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.small_stem, self.stages = small_stem, stages
        channels = width
        for stage in range(1, stages + 1):
            out, layer = width << (stage - 1), []
            for block in range(DEPTHS[depth][stage - 1]):
                stride = 2 if stage > 1 and block == 0 else 1
                layer.append(BasicBlock(channels, out, stride, attention.get((stage, block))))
                channels = out
            setattr(self, f"layer{stage}", nn.Sequential(*layer))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.small_stem else F.max_pool2d(x, 3, 2, 1)
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def check_against_torchvision():
    """The ResNet above is torchvision's: same names, shapes and logits."""
    import torchvision

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        theirs, ours = torchvision.models.resnet18(num_classes=10).eval(), ResNet(num_classes=10).eval()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        image = torch.randn(2, 3, 48, 64)
        torch.testing.assert_close(ours(image), theirs(image))


def stir(model):
    """Random numbers in every parameter and buffer of a norm, which start at 0 and 1 and would hide mistakes there."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = 1 + 0.2 * torch.randn(module.weight.shape)
            module.bias.data = 0.2 * torch.randn(module.bias.shape)
            module.running_mean.data = 0.2 * torch.randn(module.running_mean.shape)
            module.running_var.data = 0.5 + torch.rand(module.running_var.shape)


def model_case(name, network, *, training, batch, image, num_classes, steps=None, **tolerance):
    """A model's logits, loss, every gradient and the norms' buffers afterwards; with `steps`, also the losses of that
    many steps of SGD from there on the same batch (`out.step_losses`, the loss before each step)."""
    model = network(num_classes)
    stir(model)
    tensors = {f"state.{key}": value.clone() for key, value in model.state_dict().items()}
    tensors["in.image"] = torch.randn(batch, 3, *image)
    tensors["in.labels"] = torch.arange(batch) % num_classes
    model = model.double().train(training)
    images, labels = tensors["in.image"].double(), tensors["in.labels"]

    def forward():
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        model.zero_grad()
        loss.backward()
        return logits, loss

    logits, loss = forward()
    tensors |= {"out.logits": logits.detach().float(), "out.loss": loss.detach().float()}
    tensors |= {f"gin.{key}": p.grad.float() for key, p in model.named_parameters()}
    if training:
        for key, value in model.named_buffers():
            tensors[f"after.{key}"] = value.float() if value.is_floating_point() else value.clone()
    attrs = {"model": name, "training": training, "num_classes": num_classes, "dropout": 0.0, "stochastic_depth": 0.0}
    if steps:
        attrs["sgd"] = steps
        sgd = torch.optim.SGD(model.parameters(), steps["lr"], steps["momentum"], weight_decay=steps["weight_decay"])
        losses = [loss]  # the gradients of the first step are still there
        for _ in range(steps["steps"] - 1):
            sgd.step()
            losses.append(forward()[1])
        sgd.step()
        with torch.no_grad():
            losses.append(F.cross_entropy(model(images), labels))
        tensors["out.step_losses"] = torch.stack([x.detach() for x in losses]).float()
    return {"op": "model", "attrs": attrs, "tensors": tensors, **tolerance}


THREE_STEPS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "steps": 3}
CASES = {
    "model_resnet18_w4_train": lambda: model_case(
        "resnet18:w4", lambda k: ResNet("resnet18", k, 4), training=True, batch=4, image=(48, 40), num_classes=3, steps=THREE_STEPS,
    ),
    "model_resnet18_w2_eval": lambda: model_case(
        "resnet18:w2", lambda k: ResNet("resnet18", k, 2), training=False, batch=2, image=(33, 47), num_classes=3,
    ),
}


def small(name, string, blocks, make, training=True):
    """A two-stage net with attention in some blocks, on pictures of 14 x 11: stage 2 has 8 channels and a map of 7 x 6."""
    CASES[f"model_{name}"] = lambda: model_case(
        f"resnet18:w4,stages=2,stem=small+{string}",
        lambda k: ResNet("resnet18", k, 4, stages=2, small_stem=True, attention={block: make for block in blocks}),
        training=training, batch=3, image=(14, 11), num_classes=4, steps=THREE_STEPS if training else None,
    )


small("ga", "ga@2:heads=2", [(2, 0), (2, 1)], lambda c: Attention(c, 2, True, map_size=(7, 6)))
small("ga_append", "ga@2.1:append,heads=4", [(2, 1)], lambda c: Appended(c, 4, True, map_size=(7, 6)))
small("la7", "la7@1,2:heads=2", [(s, b) for s in (1, 2) for b in (0, 1)], lambda c: Attention(c, 2, False, kernel=(7, 7)))
small("la3_append_eval", "la3@2:append,heads=2", [(2, 0), (2, 1)], lambda c: Appended(c, 2, False, kernel=(3, 3)), training=False)
small("ela5", "ela5@2:heads=2", [(2, 0), (2, 1)], lambda c: Attention(c, 2, True, kernel=(5, 5)))
small("ela3_zero", "ela3@2.0:heads=1,border=zero", [(2, 0)], lambda c: Attention(c, 1, True, kernel=(3, 3), border="zero"))

# 90 MB each: not in the repository. A smaller learning rate: at 0.05 these nets leave the region where rounding stays small (the
# loss rises to 7, and PyTorch's own float32 ends 4e-3 away from its float64).
GENTLE_STEPS = THREE_STEPS | {"lr": 0.002}
BIG_CASES = {
    f"model_{depth}_{'train' if training else 'eval'}": lambda depth=depth, training=training: model_case(
        depth, lambda k: ResNet(depth, k), training=training, batch=4, image=(64, 64), num_classes=3,
        steps=GENTLE_STEPS if training else None,
    )
    for depth in DEPTHS
    for training in (True, False)
}
