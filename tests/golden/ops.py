"""The op cases: shapes chosen to be small and awkward. Expectations come from PyTorch's own functions in float64, those
of attention from attention.py."""
import torch
import torch.nn.functional as F
import torchvision

from attention import global_attention, lesa_context, lesa_logits, local_attention

CASES = {}


def normal(shape, outliers=False):
    """N(0, 1) in float32; with `outliers`, about one value in fifty is twenty times larger."""
    x = torch.randn(tuple(shape))
    return torch.where(torch.rand(x.shape) < 0.02, 20 * x, x) if outliers else x


def add(name, op, attrs, inputs, run, fixed=(), **tolerance):
    """Registers a case. `inputs()` gives the input tensors (drawn when the case is made), `run(**inputs)` the outputs,
    and `fixed` names inputs that take no gradient."""
    CASES[name] = lambda: {"op": op, "attrs": attrs, "in": inputs(), "run": run, "fixed": fixed, **tolerance}


def present(**tensors):
    return {name: x for name, x in tensors.items() if x is not None}


# ---------------------------------------------------------------------------------------------------- convolution


def conv(name, x, weight, stride=(1, 1), padding=(0, 0), bias=False, outliers=False, groups=1):
    def inputs():
        return present(x=normal(x, outliers), weight=normal(weight), bias=normal(weight[:1]) if bias else None)

    def run(x, weight, bias=None):
        return {"y": F.conv2d(x, weight, bias, stride, padding, groups=groups)}

    attrs = {"stride": stride, "padding": padding, "dilation": [1, 1], "groups": groups}
    add(f"conv2d_{name}", "conv2d", attrs, inputs, run)


conv("1x1", (2, 5, 4, 3), (7, 5, 1, 1))
conv("1x1_s2", (2, 8, 7, 5), (16, 8, 1, 1), stride=[2, 2])
conv("3x3_bias", (2, 5, 9, 7), (6, 5, 3, 3), padding=[1, 1], bias=True)
conv("3x3_valid", (1, 3, 5, 3), (4, 3, 3, 3), bias=True)
conv("3x3_s2", (2, 4, 7, 9), (5, 4, 3, 3), stride=[2, 2], padding=[1, 1])
conv("3x3_s2_dropped_row", (1, 4, 8, 6), (8, 4, 3, 3), stride=[2, 2])
conv("3x3_c33", (1, 33, 7, 5), (17, 33, 3, 3), padding=[1, 1])
conv("3x3_c32_c64", (1, 32, 7, 7), (64, 32, 3, 3), padding=[1, 1])
conv("3x3_one_pixel", (2, 6, 1, 1), (6, 6, 3, 3), padding=[1, 1])
conv("3x3_outliers", (1, 8, 6, 6), (8, 8, 3, 3), padding=[1, 1], outliers=True)
conv("7x7_stem", (1, 3, 17, 15), (8, 3, 7, 7), stride=[2, 2], padding=[3, 3])
conv("3x5_s21", (2, 3, 8, 9), (4, 3, 3, 5), stride=[2, 1], padding=[0, 2], bias=True)
conv("1x7", (1, 2, 3, 11), (3, 2, 1, 7), stride=[1, 3], padding=[0, 3])
conv("5x1_wide_padding", (1, 1, 4, 5), (1, 1, 5, 1), padding=[4, 2])
conv("patch_4x4", (2, 3, 9, 13), (10, 3, 4, 4), stride=[4, 4], bias=True)
conv("depthwise_3x3", (2, 8, 7, 9), (8, 1, 3, 3), padding=[1, 1], groups=8)
conv("depthwise_3x3_s2_c7", (2, 7, 8, 5), (7, 1, 3, 3), stride=[2, 2], padding=[1, 1], bias=True, groups=7)
conv("depthwise_5x5_c33", (1, 33, 4, 6), (33, 1, 5, 5), padding=[2, 2], groups=33)
conv("depthwise_5x5_s2", (1, 12, 11, 10), (12, 1, 5, 5), stride=[2, 2], padding=[2, 2], bias=True, groups=12)
conv("grouped_3x3", (2, 6, 5, 7), (4, 3, 3, 3), padding=[1, 1], bias=True, groups=2)
conv("grouped_multiplier_s2", (1, 5, 7, 6), (15, 1, 3, 3), stride=[2, 2], padding=[1, 1], groups=5)


# ---------------------------------------------------------------------------------------------------- batch norm


def batch_norm(name, shape, training, act="none", residual=False, eps=1e-5, momentum=0.1, spread=1.0, mean=0.0, **tolerance):
    channels = shape[1]

    def inputs():
        return present(
            x=mean + spread * normal(shape),
            weight=1 + 0.3 * normal([channels]),
            bias=0.5 * normal([channels]),
            running_mean=mean + normal([channels]),
            running_var=spread**2 * (0.5 + torch.rand(channels)),
            residual=normal(shape) if residual else None,
        )

    def run(x, weight, bias, running_mean, running_var, residual=None):
        running_mean, running_var = running_mean.clone(), running_var.clone()  # F.batch_norm updates them in place
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        y = y if residual is None else y + residual
        y = {"none": lambda t: t, "relu": F.relu, "silu": F.silu}[act](y)
        return {"y": y, "running_mean": running_mean, "running_var": running_var}

    attrs = {"training": training, "eps": eps, "momentum": momentum, "act": act}
    add(f"batch_norm_{name}", "batch_norm", attrs, inputs, run, ("running_mean", "running_var"), **tolerance)


batch_norm("train", (2, 5, 4, 3), True)
batch_norm("train_relu", (2, 7, 5, 3), True, act="relu")
batch_norm("train_relu_residual", (3, 8, 3, 3), True, act="relu", residual=True)
batch_norm("train_silu_residual", (2, 6, 5, 5), True, act="silu", residual=True, eps=1e-3, momentum=0.01)
batch_norm("train_residual", (1, 33, 7, 1), True, residual=True)
batch_norm("train_silu_one_channel", (4, 1, 3, 3), True, act="silu", momentum=0.9)
# Mean far from zero: a variance taken as E[x^2] - E[x]^2 in f32 would be lost here.
batch_norm("train_offset", (2, 4, 9, 7), True, mean=100.0, spread=0.5, rtol=1e-3, atol=1e-3)
batch_norm("train_long", (1, 2, 33, 43), True, act="relu")
batch_norm("train_one_pixel", (5, 16, 1, 1), True)
batch_norm("eval", (2, 5, 4, 3), False)
batch_norm("eval_relu_residual", (2, 8, 5, 3), False, act="relu", residual=True)
batch_norm("eval_silu", (1, 7, 3, 3), False, act="silu", eps=1e-3)
batch_norm("eval_one_value", (1, 4, 1, 1), False, act="relu")


# ------------------------------------------------------------------------------- convolution, norm, activation as one


def conv_block(name, x, o, kernel, training, stride=1, act="none", residual=False, groups=1, gradients=True, mean=0.0, fixed=(), **tolerance):
    side = [(size + 2 * (kernel // 2) - kernel) // stride + 1 for size in x[2:]]
    spread = 0.005 * mean if mean else 1.0

    def inputs():
        weight = normal((o, x[1] // groups, kernel, kernel))
        return present(
            x=mean + spread * normal(x),
            weight=weight,
            gamma=1 + 0.3 * normal([o]),
            beta=0.5 * normal([o]),
            running_mean=normal([o]),
            running_var=0.5 + torch.rand(o),
            residual=normal((x[0], o, *side)) if residual else None,
        )

    def run(x, weight, gamma, beta, running_mean, running_var, residual=None):
        running_mean, running_var = running_mean.clone(), running_var.clone()  # F.batch_norm updates them in place
        y = F.conv2d(x, weight, None, stride, kernel // 2, 1, groups)
        y = F.batch_norm(y, running_mean, running_var, gamma, beta, training, 0.1, 1e-5)
        y = y if residual is None else y + residual
        y = {"none": lambda t: t, "relu": F.relu, "silu": F.silu}[act](y)
        return {"y": y, "running_mean": running_mean, "running_var": running_var}

    attrs = {"stride": [stride] * 2, "padding": [kernel // 2] * 2, "groups": groups, "training": training, "act": act}
    fixed = ("running_mean", "running_var", *fixed)
    # Without gradients the norm is folded into the convolution.
    fixed = fixed if gradients else ("x", "weight", "gamma", "beta", "residual", *fixed)
    add(f"conv_block_{name}", "conv_block", attrs, inputs, run, fixed, **tolerance)


conv_block("train_relu_residual", (2, 5, 6, 7), 8, 3, True, act="relu", residual=True)
conv_block("train_1x1_silu", (2, 6, 5, 3), 13, 1, True, act="silu")
conv_block("train_s2", (2, 8, 7, 9), 6, 3, True, stride=2)
conv_block("train_c33", (1, 33, 7, 5), 17, 1, True, act="relu")
# Mean 200 times the spread: as in batch_norm_train_offset. The gradient of the weight is a sum of x times numbers whose sum is zero:
# rounding the mean to float32, as every implementation does, shifts each of them alike, and x makes 200 times as much of it.
conv_block("train_offset", (2, 2, 9, 7), 4, 1, True, mean=100.0, fixed=("weight",), rtol=1e-3, atol=1e-3)
conv_block("eval_relu", (2, 4, 5, 3), 6, 3, False, act="relu")
conv_block("folded_relu_residual", (2, 5, 6, 7), 8, 3, False, act="relu", residual=True, gradients=False)
conv_block("folded_s2_silu", (1, 9, 7, 5), 33, 3, False, stride=2, act="silu", gradients=False)


# ------------------------------------------------------------------------------------- linear, pooling, elementwise


def linear(name, rows, columns, features, bias=True):
    def inputs():
        weight = normal([features, columns])
        return present(x=normal([rows, columns]), weight=weight, bias=normal([features]) if bias else None)

    add(f"linear_{name}", "linear", {}, inputs, lambda x, weight, bias=None: {"y": F.linear(x, weight, bias)})


linear("small", 3, 5, 2)
linear("no_bias", 7, 33, 9, bias=False)
linear("one", 1, 1, 1)
linear("head", 2, 129, 3)
linear("square", 16, 64, 32)


def max_pool(name, shape, kernel, stride, padding, prepare=lambda x: x):
    def run(x):
        return {"y": F.max_pool2d(x, kernel, stride, padding)}

    attrs = {"kernel": kernel, "stride": stride, "padding": padding}
    add(f"max_pool2d_{name}", "max_pool2d", attrs, lambda: {"x": prepare(normal(shape))}, run)


max_pool("3x3_s2", (2, 5, 9, 7), [3, 3], [2, 2], [1, 1])
max_pool("3x3_s2_even", (1, 8, 8, 6), [3, 3], [2, 2], [1, 1])
max_pool("2x2", (2, 3, 5, 4), [2, 2], [2, 2], [0, 0])
max_pool("overlap", (1, 4, 6, 5), [3, 3], [1, 1], [1, 1])
max_pool("2x3_s12", (1, 2, 5, 7), [2, 3], [1, 2], [0, 1])
max_pool("one_pixel", (2, 3, 1, 1), [3, 3], [2, 2], [1, 1])
# Many equal values: the gradient goes to the first of them in reading order.
max_pool("ties", (2, 4, 7, 7), [3, 3], [2, 2], [1, 1], prepare=lambda x: F.relu(x).round())
# Everything negative: padding must not win.
max_pool("negative", (1, 3, 5, 5), [3, 3], [2, 2], [1, 1], prepare=lambda x: -1 - x.abs())


def avg_pool(name, shape, kernel, stride, padding, include=True):
    def run(x):
        return {"y": F.avg_pool2d(x, kernel, stride, padding, count_include_pad=include)}

    attrs = {"kernel": kernel, "stride": stride, "padding": padding, "count_include_pad": include}
    add(f"avg_pool2d_{name}", "avg_pool2d", attrs, lambda: {"x": normal(shape)}, run)


avg_pool("2x2", (2, 3, 5, 4), [2, 2], [2, 2], [0, 0])
avg_pool("3x3_s2_pad", (2, 5, 9, 7), [3, 3], [2, 2], [1, 1])
avg_pool("3x3_s2_inside", (2, 5, 9, 7), [3, 3], [2, 2], [1, 1], include=False)
avg_pool("2x3_s12_inside", (1, 8, 5, 7), [2, 3], [1, 2], [1, 1], include=False)

for label, shape in {"odd": (2, 5, 7, 3), "one_pixel": (3, 4, 1, 1), "c33": (1, 33, 9, 4)}.items():
    add(f"global_avg_pool_{label}", "global_avg_pool", {}, lambda shape=shape: {"x": normal(shape)},
        lambda x: {"y": x.mean((2, 3))})

for op, function in {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "sigmoid": torch.sigmoid}.items():
    for label, shape in {"image": (2, 3, 5, 7), "long": (1, 1, 3, 129)}.items():
        add(f"{op}_{label}", op, {}, lambda shape=shape: {"x": normal(shape, outliers=True)},
            lambda x, function=function: {"y": function(x)})


def squeeze_excite(name, shape, squeezed):
    """torchvision.ops.SqueezeExcitation with SiLU, by its own module; its 1x1 convolutions' weights are matrices here."""
    channels = shape[1]

    def inputs():
        weights = [0.5 * normal(s) for s in ([squeezed, channels], [squeezed], [channels, squeezed], [channels])]
        return {"x": normal(shape)} | dict(zip(("w1", "b1", "w2", "b2"), weights))

    def run(x, w1, b1, w2, b2):
        unit = torchvision.ops.SqueezeExcitation(channels, squeezed, activation=torch.nn.SiLU).double()
        state = {"fc1.weight": w1[:, :, None, None], "fc1.bias": b1, "fc2.weight": w2[:, :, None, None], "fc2.bias": b2}
        return {"y": torch.func.functional_call(unit, state, x)}

    add(f"squeeze_excite_{name}", "squeeze_excite", {}, inputs, run)


squeeze_excite("odd", (2, 7, 5, 3), 3)
squeeze_excite("c24_s6", (2, 24, 4, 4), 6)
squeeze_excite("one_pixel", (3, 33, 1, 1), 8)


def embed_tokens(name, images, tokens, channels):
    """As torchvision's VisionTransformer does it: the class token before the patches, then the positions."""
    def inputs():
        return {"patches": normal([images, tokens, channels]), "cls": normal([channels]), "pos": normal([tokens + 1, channels])}

    def run(patches, cls, pos):
        return {"y": torch.cat([cls.expand(images, 1, -1), patches], 1) + pos[None]}

    add(f"embed_tokens_{name}", "embed_tokens", {}, inputs, run)


embed_tokens("odd", 3, 5, 7)
embed_tokens("c16", 2, 9, 16)
add("first_token", "first_token", {}, lambda: {"x": normal((3, 4, 9))}, lambda x: {"y": x[:, 0]})
add("stochastic_depth_none", "stochastic_depth", {"p": 0.0},
    lambda: {"branch": normal((2, 5, 3, 4)), "shortcut": normal((2, 5, 3, 4))},
    lambda branch, shortcut: {"y": torchvision.ops.stochastic_depth(branch, 0.0, "row") + shortcut})


# ------------------------------------------------------------------------------------- loss and layer norm


def cross_entropy(name, rows, classes, class_weight=False, label_smoothing=0.0, scale=1.0):
    def inputs():
        return present(
            logits=scale * normal([rows, classes]),
            labels=torch.randint(0, classes, (rows,)),
            class_weight=0.2 + 2 * torch.rand(classes) if class_weight else None,
        )

    def run(logits, labels, class_weight=None):
        return {"loss": F.cross_entropy(logits, labels, class_weight, label_smoothing=label_smoothing)}

    add(f"cross_entropy_{name}", "cross_entropy", {"label_smoothing": label_smoothing}, inputs, run, ("class_weight",))


cross_entropy("plain", 5, 3)
cross_entropy("weighted", 7, 3, class_weight=True)
cross_entropy("smooth", 4, 7, label_smoothing=0.1)
cross_entropy("weighted_smooth", 9, 5, class_weight=True, label_smoothing=0.2)
cross_entropy("one_row", 1, 2, class_weight=True)
cross_entropy("large_logits", 6, 4, scale=200.0)
cross_entropy("many_classes", 3, 129, label_smoothing=0.05)


def layer_norm(name, shape, eps=1e-5, mean=0.0):
    def inputs():
        return {"x": mean + normal(shape), "weight": 1 + 0.3 * normal(shape[-1:]), "bias": normal(shape[-1:])}

    def run(x, weight, bias):
        return {"y": F.layer_norm(x, x.shape[-1:], weight, bias, eps)}

    add(f"layer_norm_{name}", "layer_norm", {"eps": eps}, inputs, run)


layer_norm("tokens", (2, 5, 16))
layer_norm("odd", (7, 33), eps=1e-6)
layer_norm("long", (2, 3, 129))
layer_norm("two", (4, 2), eps=1e-3)
layer_norm("offset", (3, 48), mean=10.0)


# ---------------------------------------------------------------------------------------------------- training steps


def clip_grad_norm(name, lengths, max_norm=None, loss_scale=1.0):
    """Gradients of parameters of several lengths, side by side in one flat buffer."""

    def run(grad):
        parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in grad.split(lengths)]
        for parameter, g in zip(parameters, grad.split(lengths)):
            parameter.grad = g / loss_scale
        norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)
        return {"norm": norm.reshape(1), "clipped": torch.cat([p.grad for p in parameters])}

    attrs = {"max_norm": max_norm, "loss_scale": loss_scale}
    add(f"clip_grad_norm_{name}", "clip_grad_norm", attrs, lambda: {"grad": loss_scale * normal([sum(lengths)])}, run, ("grad",))


clip_grad_norm("one", [1], max_norm=0.25)
clip_grad_norm("short_enough", [7, 26], max_norm=100.0)
clip_grad_norm("clipped", [33, 1, 129], max_norm=1.0)
clip_grad_norm("scaled", [5, 1100], max_norm=2.5, loss_scale=65536.0)
clip_grad_norm("norm_alone", [129], loss_scale=0.5)

for label, length, decay in (("one", 1, 0.5), ("slow", 129, 0.9999), ("fast", 33, 0.25)):
    # timm's ModelEmaV2: decay * average + (1 - decay) * value.
    add(f"ema_step_{label}", "ema_step", {"decay": decay}, lambda length=length: {"average": normal([length]), "value": normal([length])},
        lambda average, value, decay=decay: {"average": decay * average + (1 - decay) * value}, ("average", "value"))


# ---------------------------------------------------------------------------------------------------- attention


def attention(op, name, shape, tables="", sharpness=1.0, scale=None, kernel=None, border=None):
    """`tables` names the position terms: h, w, b (bias). `sharpness` scales q, and with it the contrast of the softmax."""
    n, h, w, heads, d = shape
    rows, cols = kernel or (2 * h - 1, 2 * w - 1)
    scale = d**-0.5 if scale is None else scale
    attrs = {"scale": scale} if kernel is None else {"scale": scale, "kernel": kernel, "border": border}
    function = global_attention if kernel is None else local_attention

    def inputs():
        return present(
            q=sharpness * normal(shape),
            k=normal(shape),
            v=normal(shape),
            rel_h=0.5 * normal([rows, heads * d]) if "h" in tables else None,
            rel_w=0.5 * normal([cols, heads * d]) if "w" in tables else None,
            bias=normal([heads, rows, cols]) if "b" in tables else None,
        )

    add(f"{op}_{name}", op, attrs, inputs, lambda **x: {"y": function(**x, **attrs)})


def attend_globally(name, shape, tables="", **options):
    attention("global_attention", name, shape, tables, **options)


def attend_locally(name, shape, kernel, border, tables="", **options):
    attention("local_attention", name, shape, tables, kernel=kernel, border=border, **options)


attend_globally("one_pixel", (1, 1, 1, 1, 1), "hwb")
attend_globally("5x7", (2, 5, 7, 3, 4))
attend_globally("5x7_rel", (2, 5, 7, 2, 8), "hw")
attend_globally("5x7_bias", (1, 5, 7, 2, 8), "b")
attend_globally("9x4_all", (1, 9, 4, 2, 16), "hwb")
attend_globally("9x4_rel_h", (1, 9, 4, 2, 3), "h")
attend_globally("4x9_rel_w", (1, 4, 9, 2, 3), "w")
attend_globally("3x3_d32", (1, 3, 3, 2, 32), "hw")
attend_globally("7x7_d1", (1, 7, 7, 5, 1), "hwb")
attend_globally("1x33", (1, 1, 33, 1, 16), "hw")
attend_globally("43x3", (1, 43, 3, 1, 8), "hwb")
attend_globally("sharp", (1, 5, 6, 2, 8), "hw", sharpness=20.0)
attend_globally("unscaled", (1, 4, 5, 2, 16), scale=1.0)

attend_locally("one_pixel_mask", (1, 1, 1, 1, 1), [3, 3], "mask", "hwb")
attend_locally("one_pixel_zero", (1, 1, 1, 1, 1), [3, 3], "zero", "hwb")
for border in ("mask", "zero"):
    attend_locally(f"3x3_{border}", (2, 5, 7, 3, 4), [3, 3], border)
    attend_locally(f"3x3_{border}_rel", (2, 5, 7, 2, 8), [3, 3], border, "hw")
    attend_locally(f"5x5_{border}_all", (1, 9, 4, 1, 16), [5, 5], border, "hwb")
    attend_locally(f"7x7_{border}_rel", (1, 8, 9, 1, 8), [7, 7], border, "hw")
    attend_locally(f"3x5_{border}_all", (1, 6, 5, 2, 3), [3, 5], border, "hwb")
    attend_locally(f"1x7_{border}_rel_w", (1, 3, 10, 2, 8), [1, 7], border, "w")
    attend_locally(f"13x13_{border}_beyond_map", (1, 5, 7, 1, 8), [13, 13], border, "hwb")
attend_locally("1x1", (1, 3, 5, 2, 3), [1, 1], "mask", "hwb")
attend_locally("9x1_rel_h", (1, 11, 2, 2, 3), [9, 1], "mask", "h")
attend_locally("11x3_bias", (1, 7, 5, 1, 8), [11, 3], "zero", "b")
attend_locally("13x13", (1, 14, 13, 1, 3), [13, 13], "mask", "hw")
attend_locally("7x7_d32", (1, 7, 7, 1, 32), [7, 7], "mask", "hw")
attend_locally("7x7_d1", (2, 9, 5, 5, 1), [7, 7], "zero", "hwb")
attend_locally("1x33_map", (1, 1, 33, 1, 8), [3, 3], "mask", "hw")
attend_locally("sharp", (1, 6, 7, 2, 8), [5, 5], "mask", "hw", sharpness=20.0)
attend_locally("unscaled", (1, 5, 4, 2, 8), [3, 3], "zero", scale=1.0)


# ---------------------------------------------------------------------------------------------------- attention block


def attention_block(name, x, heads, d, proj=None, tables="", residual=False, scale=None):
    """1x1 convolutions to q, k and v, global attention, a 1x1 convolution to `proj` channels, and x added where `residual`."""
    n, c, h, w = x
    depth = heads * d
    attrs = {"heads": heads, "scale": d**-0.5 if scale is None else scale, "residual": residual}

    def inputs():
        return present(
            x=normal(x),
            q_weight=c**-0.5 * normal((depth, c, 1, 1)),
            k_weight=c**-0.5 * normal((depth, c, 1, 1)),
            v_weight=c**-0.5 * normal((depth, c, 1, 1)),
            proj_weight=depth**-0.5 * normal((proj, depth, 1, 1)) if proj else None,
            rel_h=0.5 * normal([2 * h - 1, depth]) if "h" in tables else None,
            rel_w=0.5 * normal([2 * w - 1, depth]) if "w" in tables else None,
        )

    def run(x, q_weight, k_weight, v_weight, proj_weight=None, rel_h=None, rel_w=None):
        tokens = [F.conv2d(x, weight).permute(0, 2, 3, 1).reshape(n, h, w, heads, d) for weight in (q_weight, k_weight, v_weight)]
        y = global_attention(*tokens, rel_h, rel_w, scale=attrs["scale"]).reshape(n, h, w, depth).permute(0, 3, 1, 2)
        y = F.conv2d(y, proj_weight) if proj_weight is not None else y
        return {"y": y + x if residual else y}

    add(f"attention_block_{name}", "attention_block", attrs, inputs, run)


attention_block("7x7_rel", (1, 9, 7, 7), 3, 5, proj=9, tables="hw", residual=True)
attention_block("3x5", (2, 7, 3, 5), 1, 16, proj=5)
attention_block("4x4_rel_h", (5, 8, 4, 4), 2, 4, proj=8, tables="h", residual=True, scale=0.2)
attention_block("one_pixel", (2, 3, 1, 1), 3, 1, tables="hw", residual=True)
attention_block("13x6_rel_w", (1, 4, 13, 6), 1, 4, proj=4, tables="w", residual=True)
def lesa(name, shape):
    """Both halves; shape is N, L, G and e of attention.py."""
    n, length, heads, e = shape

    def inputs():
        return {"qkv": normal([n, length, heads, 4 * e]), "table": normal([2 * length - 1, 4 * e])}

    def with_logits():
        return {"logits": normal([n, length, length, 3 * heads])} | inputs()

    add(f"lesa_logits_{name}", "lesa_logits", {}, inputs, lambda **x: {"y": lesa_logits(**x)})
    add(f"lesa_context_{name}", "lesa_context", {}, with_logits, lambda **x: {"y": lesa_context(**x)})


lesa("9_e3", (2, 9, 2, 3))
lesa("6_e4", (1, 6, 3, 4))
