"""Try design choices that only a GPU can decide, each in a process of its own.

    python -m gspo_ops.benchmarks.experiments PART --out NAME.jsonl

A finding is a line of JSON, written as soon as it is known, so that a part that is cut off, or that
crashes in a kernel, leaves what it has found. Without a GPU, the parts run at tiny sizes in the
interpreter of Triton, to show that they work.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gspo_ops
from gspo_ops.backend import matmul_fp32
from gspo_ops.head import Head, HeadOptions, Products
from gspo_ops.rows import AllRows
from gspo_ops.softmax import Softmax
from gspo_ops.tiles import Kept, Operands, Sums
from gspo_ops.tiles_gpu import MatMulTiles

from .bench import step
from .measure import (
    as_a_gpu_computes,
    default_device,
    device_properties,
    kernel_seconds,
    seconds,
    seconds_each,
    synchronize,
)
from .workloads import Batch, draw, normal

Finding = dict[str, Any]
DEVICE = default_device()
IS_GPU = DEVICE.type == "cuda"
N, V, H = (8192, 151936, 4096) if IS_GPU else (32, 300, 16)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PRODUCTS: tuple[Products, ...] = ("mm", "triton")


def draw_bf16(*size: int, scale: float = 1.0) -> Tensor:
    return normal(*size, scale=scale, dtype=BF16, generator=torch.Generator(DEVICE).manual_seed(0))


def rate(flops: float, run: Callable[[], object], calls: int = 10) -> float:
    """Return TFLOP/s of a call."""
    return flops / seconds_each(run, DEVICE, calls) / 1e12


# Parts


def probe() -> Iterator[Finding]:
    """Yield the device's properties and its memory's bandwidth in GB/s."""
    yield device_properties(DEVICE)
    source = torch.ones(1 << (31 if IS_GPU else 20), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copied = seconds_each(lambda: target.copy_(source), DEVICE)
    read = seconds_each(lambda: source.view(FP32).sum(), DEVICE)
    yield {"copy GB/s": 2 * source.nbytes / copied / 1e9, "read GB/s": source.nbytes / read / 1e9}


def products() -> Iterator[Finding]:
    """Yield TFLOP/s of torch.mm at the shapes that the ops give it."""
    x, w = draw_bf16(N, H), draw_bf16(V, H, scale=H**-0.5)
    for rows, columns in ((1024, 8192), (2048, 4096), (2048, 8192), (4096, 8192), (8192, 8192)):
        if not IS_GPU:
            rows, columns = 16, 128
        a, b = x[:rows], w[:columns].mT
        z = torch.empty(rows, columns, device=DEVICE)
        flops = 2.0 * rows * columns * H
        yield {
            "logits": [rows, columns], "bf16": rate(flops, partial(torch.mm, a, b)),
            "fp32": rate(flops, partial(matmul_fp32, a, b, out=z)),
        }  # fmt: skip
    e, total = draw_bf16(N, V), torch.zeros(N, H, device=DEVICE)
    whole = 2.0 * N * V * H
    yield {"dhidden, whole": rate(whole, lambda: matmul_fp32(e, w, out=total), 2)}
    tile = slice(0, min(8192, V))
    of_tile = 2.0 * N * tile.stop * H
    yield {
        "dhidden, a tile and +=": rate(
            of_tile, lambda: total.add_(matmul_fp32(e[:, tile], w[tile]))
        )
    }
    for columns in (1024, 2048, 4096, 8192):
        c = slice(0, min(columns, V))
        out = torch.empty(c.stop, H, dtype=BF16, device=DEVICE)
        yield {
            "dweight": c.stop,
            "by way of fp32": rate(
                2.0 * N * c.stop * H, partial(matmul_fp32, e[:, c].mT, x, out=out)
            ),
            "directly": rate(2.0 * N * c.stop * H, partial(torch.mm, e[:, c].mT, x, out=out)),
        }


def fold() -> Iterator[Finding]:
    """Yield milliseconds of product and fold for 1e9 logits, by size of a tile."""
    n, vocabulary = (N, 65536) if IS_GPU else (N, V)
    head = Head(draw_bf16(n, H), draw_bf16(vocabulary, H, scale=H**-0.5), None, None, None)
    targets = torch.randint(vocabulary, (n,), device=DEVICE)
    options = HeadOptions(Softmax(1.0, None, False, None), "mm", False, 1.0, vocabulary)
    tiles = MatMulTiles(Operands.of(head, targets, AllRows(), options))
    base = tiles.target_logits()
    kept = Kept(torch.empty(n, vocabulary, dtype=BF16, device=DEVICE), vocabulary)
    sums = Sums.empty(tiles.blocks.entries(vocabulary), base, False)
    blocks = type(tiles).blocks
    for rows, mebibytes in (
        (1024, 16),
        (2048, 16),
        (1024, 32),
        (2048, 32),
        (4096, 64),
        (8192, 128),
    ):
        tiles.blocks = blocks._replace(rows=rows, elements=mebibytes << 18)  # type: ignore[misc]
        fold_all = partial(tiles.fold, base, kept, None, sums, base.clone())
        taken = seconds_each(fold_all, DEVICE, 2)
        yield {"rows": rows, "MiB": mebibytes, "ms": 1e3 * taken / (n * vocabulary / 1e9)}


def whole() -> Iterator[Finding]:
    """Yield milliseconds of forward and backward of a loss from hidden states, by `products`."""
    for dtype, n in ((BF16, N), (FP16, N // 4), (FP32, N // 8)):
        n = max(n, 16)
        drawn = draw("hidden", (n, V, H), dtype, DEVICE)
        for f in (1.0, 0.5, 0.25):
            workload = drawn.at(f)
            for name in PRODUCTS:
                run = partial(step, partial(_loss, name), workload)
                run()
                taken = sorted(seconds(run, DEVICE) for _ in range(3))[1]
                yield {
                    "dtype": str(dtype)[6:], "products": name, "N": n, "V": V, "H": H, "f": f,
                    "ms": 1e3 * taken,
                }  # fmt: skip


def accuracy() -> Iterator[Finding]:
    """Yield errors of logits and log-probs against float64 by H, and what is bitwise equal."""
    n, vocabulary = (256, 32768) if IS_GPU else (16, 200)
    for hidden_size in (64, 896, 2048, 4096) if IS_GPU else (16,):
        drawn = draw("hidden", (n, vocabulary, hidden_size), BF16, DEVICE)
        hidden, weight = (x.detach() for x in drawn.operands)
        hidden, targets = hidden.flatten(0, 1), drawn.targets.flatten()
        z = hidden.double() @ weight.double().mT
        off = matmul_fp32(hidden, weight.mT) - z
        exact = z.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        found: Finding = {"H": hidden_size, "logits": off.abs().max().item()}
        for name in PRODUCTS:
            error = gspo_ops.log_probs_from_hidden(hidden, weight, targets, products=name) - exact
            found[name] = {"max": error.abs().max().item(), "mean": error.mean().item()}
        yield found
    for name in PRODUCTS:
        yield {"products": name, **_same_bits(name, hidden, weight, targets)}


def host() -> Iterator[Finding]:
    """Yield milliseconds of a small call and of its kernels alone; the rest is the host's time."""
    n, hidden_size = (512, 896) if IS_GPU else (16, 16)
    workload = draw("hidden", (n, V, hidden_size), BF16, DEVICE).at(1.0)
    for name in PRODUCTS:
        run = partial(step, partial(_loss, name), workload)
        run()
        calls = 20 if IS_GPU else 1

        def several(run: Callable[[], object] = run, calls: int = calls) -> None:
            for _ in range(calls):
                run()

        kernels = kernel_seconds(run, DEVICE)
        yield {
            "products": name, "N": n, "H": hidden_size,
            "call": 1e3 * seconds(several, DEVICE) / calls,
            "kernels": 1e3 * sum(taken for taken, _ in kernels.values()),
            "launches": sum(count for _, count in kernels.values()),
        }  # fmt: skip


PARTS: dict[str, Callable[[], Iterator[Finding]]] = {
    part.__name__: part for part in (probe, accuracy, whole, products, fold, host)
}


def _loss(name: Products, operands: tuple[Tensor, ...], batch: Batch) -> Tensor:
    hidden, weight = operands
    loss, _ = gspo_ops.policy_loss_from_hidden(
        hidden, weight, batch.targets, batch.old, batch.advantages, mask=batch.mask, products=name
    )
    return loss


def _same_bits(name: Products, hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, bool]:
    """Return whether log-probs stay bitwise equal under each change that must not matter.

    The changes are a repeat, no_grad, another place in the batch, and the process's TF32 setting.
    """
    of = partial(gspo_ops.log_probs_from_hidden, products=name)
    leaf = hidden.clone().requires_grad_()
    trained = of(leaf, weight, targets).detach()
    again = of(leaf, weight, targets).detach()
    with torch.no_grad():
        without = of(leaf, weight, targets)
    last = of(hidden[-3:], weight, targets[-3:])
    with _coarse():
        coarse = of(leaf, weight, targets).detach()
    return {
        "repeat": torch.equal(again, trained), "no_grad": torch.equal(without, trained),
        "batch": torch.equal(last, trained[-3:]), "tf32": torch.equal(coarse, trained),
    }  # fmt: skip


@contextmanager
def _coarse() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS, help="what to try")
    parser.add_argument("--out", type=Path, required=True, help="file to which lines are appended")
    args = parser.parse_args(argv)
    as_a_gpu_computes()
    with args.out.open("a") as out:
        for finding in PARTS[args.part]():
            synchronize(DEVICE)
            line = json.dumps({"part": args.part, **finding})
            print(line, flush=True)
            out.write(line + "\n")
            out.flush()
    return 0


def faster(findings: Sequence[Finding], f: float = 0.5) -> dict[str, str]:
    """Return the faster products of each dtype when a fraction f of the rows has a gradient."""
    least: dict[str, tuple[float, str]] = {}
    for of in findings:
        if of.get("part") == "whole" and of["f"] == f:
            ms, _ = least.get(of["dtype"], (math.inf, ""))
            if of["ms"] < ms:
                least[of["dtype"]] = of["ms"], of["products"]
    return {dtype: name for dtype, (_, name) in least.items()}


if __name__ == "__main__":
    sys.exit(main())
