"""Whole models: a plain ResNet with a base width and, in chosen stages, attention in place of a block's second 3x3
convolution. Names are torchvision's, so at width 64 and without attention the state dict is torchvision's own."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import global_attention, local_attention

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


class Attention(nn.Module):
    """Three 1x1 projections without bias, then attention; channels are heads * d, a head's d side by side."""

    def __init__(self, channels, heads, tables, kernel=None):
        super().__init__()
        self.heads, self.kernel = heads, kernel
        for name in ("q", "k", "v"):
            setattr(self, name, nn.Conv2d(channels, channels, 1, bias=False))
        if tables is not None:
            self.rel_h = nn.Parameter(0.2 * torch.randn(tables[0], channels))
            self.rel_w = nn.Parameter(0.2 * torch.randn(tables[1], channels))
        else:
            self.rel_h = self.rel_w = None

    def forward(self, x):
        n, c, h, w = x.shape
        q, k, v = (p(x).permute(0, 2, 3, 1).reshape(n, h, w, self.heads, -1) for p in (self.q, self.k, self.v))
        scale = q.shape[-1] ** -0.5
        if self.kernel is None:
            y = global_attention(q, k, v, self.rel_h, self.rel_w, scale=scale)
        else:
            y = local_attention(q, k, v, self.rel_h, self.rel_w, kernel=self.kernel, border="mask", scale=scale)
        return y.reshape(n, h, w, c).permute(0, 3, 1, 2)


class BasicBlock(nn.Module):
    def __init__(self, inside, out, stride, attention=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        if attention is None:
            self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        else:
            self.attn = attention(out)
        self.bn2 = nn.BatchNorm2d(out)
        if stride != 1 or inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.attn(y) if hasattr(self, "attn") else self.conv2(y))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet(nn.Module):
    """`width` is the number of channels of the stem and of stage 1, doubled in each later stage. `attention(stage)`
    gives None for a convolution, or a function channels -> Attention."""

    def __init__(self, depth="resnet18", num_classes=1000, width=64, attention=lambda stage: None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, blocks in enumerate(DEPTHS[depth], 1):
            out, layer = width << (stage - 1), []
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                layer.append(BasicBlock(channels, out, stride, attention(stage)))
                channels = out
            setattr(self, f"layer{stage}", nn.Sequential(*layer))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in (1, 2, 3, 4):
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


def in_stages(stages, make):
    return lambda stage: make if stage in stages else None


THREE_STEPS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "steps": 3}
CASES = {
    "model_resnet18_w4_train": lambda: model_case(
        "resnet18:w4", lambda k: ResNet("resnet18", k, 4), training=True, batch=4, image=(48, 40), num_classes=3, steps=THREE_STEPS,
    ),
    "model_resnet18_w2_eval": lambda: model_case(
        "resnet18:w2", lambda k: ResNet("resnet18", k, 2), training=False, batch=2, image=(33, 47), num_classes=3,
    ),
}
# 90 MB each: not in the repository.
BIG_CASES = {
    f"model_{depth}_{'train' if training else 'eval'}": lambda depth=depth, training=training: model_case(
        depth, lambda k: ResNet(depth, k), training=training, batch=4, image=(64, 64), num_classes=3,
        steps=THREE_STEPS if training else None,
    )
    for depth in DEPTHS
    for training in (True, False)
}
