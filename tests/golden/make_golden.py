#!/usr/bin/env python3
"""Makes the golden cases that `attn2d verify --cases` reads. Needs PyTorch (the CPU build will do):

    pip install torch torchvision numpy
    python tests/golden/make_golden.py tests/golden               # the small set that is in the repository
    python tests/golden/make_golden.py /some/folder --all         # and the big model cases
    python tests/golden/make_golden.py /some/folder --only '^local_attention'

One safetensors file is one case. Its metadata is all strings: `op`, `attrs` (JSON), optionally `rtol` and `atol`. Its
tensors are `in.<name>`, `out.<name>`, `gout.<name>` (the upstream gradient) and `gin.<name>` (the expected gradient).
Images are NCHW and weights OIHW, as PyTorch has them; attention takes q, k, v as [N, H, W, heads, d].

Inputs and upstream gradients are float32; everything is computed from them in float64 and rounded to float32 at the
very end. Random numbers depend on the name of a case alone, so adding one leaves the others as they are.
"""
import argparse
import json
import pathlib
import re
import struct
import zlib

import numpy as np
import torch

import attention
import models
import ops

DTYPES = {torch.float32: ("F32", "<f4"), torch.int64: ("I64", "<i8")}


def write(path, case, tensors):
    """Writes one safetensors file. By hand because the library's order of metadata differs from run to run, and the
    same case should give the same bytes."""
    header = {"__metadata__": {"op": case["op"], "attrs": json.dumps(case["attrs"])}}
    for tolerance in ("rtol", "atol"):
        if tolerance in case:
            header["__metadata__"][tolerance] = str(case[tolerance])
    blobs, at = [], 0
    for name, tensor in tensors.items():
        dtype, code = DTYPES[tensor.dtype]
        blob = np.ascontiguousarray(tensor.detach().numpy()).astype(code).tobytes()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def single(tensor):
    """Float64 results are stored as float32; integers stay."""
    return tensor.detach().to(torch.float32) if tensor.is_floating_point() else tensor.detach()


def run_op(case):
    """Forward and backward of an op case, and the tensors of its file."""
    wide = {}
    for name, value in case["in"].items():
        wide[name] = value.double().requires_grad_(name not in case["fixed"]) if value.is_floating_point() else value
    outputs = case["run"](**wide)
    upstream = {name: ops.normal(y.shape) for name, y in outputs.items() if y.requires_grad}
    leaves = {name: x for name, x in wide.items() if x.is_floating_point() and x.requires_grad}
    grads = torch.autograd.grad(
        list(outputs[name] for name in upstream), list(leaves.values()), [g.double() for g in upstream.values()]
    ) if upstream and leaves else ()
    tensors = {f"in.{name}": x for name, x in case["in"].items()}
    tensors |= {f"out.{name}": single(y) for name, y in outputs.items()}
    tensors |= {f"gout.{name}": g for name, g in upstream.items()}
    tensors |= {f"gin.{name}": single(g) for name, g in zip(leaves, grads)}
    return tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder that takes the case files")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the cases whose name matches")
    parser.add_argument("--all", action="store_true", help="also the cases too big for the repository")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    attention.check()
    models.check_against_torchvision()
    total = 0
    for name, make in {**ops.CASES, **models.CASES, **(models.BIG_CASES if args.all else {})}.items():
        if not re.search(args.only, name):
            continue
        torch.manual_seed(zlib.crc32(name.encode()))
        case = make()
        tensors = case["tensors"] if "tensors" in case else run_op(case)
        for key, tensor in tensors.items():
            assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), f"{name}: {key} is not finite"
        path = args.out / f"{name}.safetensors"
        write(path, case, tensors)
        total += path.stat().st_size
        print(f"{path.stat().st_size:>10}  {path}")
    print(f"{total:>10}  bytes in all")


if __name__ == "__main__":
    main()
