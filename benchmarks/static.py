"""Compile the kernels of gspo_ops and of peers for GPUs that are not present.

    python -m gspo_ops.benchmarks.static --out NAME.json

Launchers run on meta tensors under a driver that only names a target, so that the kernels compile
with the specialisation of a real launch. Registers, spills, shared memory, access widths,
instruction counts and matrix instructions are read from the result. Times are predictions from
formulas for bytes and FLOPs, at a given bandwidth and a given rate of matrix products.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_ops.tiles_gpu import EPILOGUE, SUMS

from .binaries import TARGETS, Compiled, compiling, instructions_per_logit, read_binary
from .launches import (
    ALL,
    BF16,
    HEAD_V,
    PRODUCTS,
    TMA,
    B,
    H,
    N,
    T,
    V,
    call_from_hidden,
    empty,
    make_logits,
)
from .measure import provenance, write
from .providers import versions


@cache
def compile_variant(name: str, target: str) -> Compiled:
    """Compile one of our kernels."""
    launch: Callable[..., None]
    options: dict[str, Any]
    launch, options = ALL[name]  # type: ignore[assignment]
    with compiling(target) as binaries:
        launch(**options)
    *_, (_, binary) = binaries  # launches that it needs come before it
    return read_binary(binary, target)


# The peers' kernels


def _liger() -> None:
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    logits, ids = empty(B, T + 1, V, dtype=BF16), empty(B, T, dtype=torch.int64)
    mask = empty(B, T, dtype=torch.int32)
    ctx = mock.MagicMock()
    GrpoLossFunction.forward(
        ctx, logits, empty(B, T), None, ids, empty(B), mask, 1.0, 0.0, 3e-4, 4e-4, False,
        "grpo", T, True, "sequence",
    )  # fmt: skip
    (ctx.saved_tensors,) = (call.args for call in ctx.save_for_backward.call_args_list[-1:])
    GrpoLossFunction.backward(ctx, empty(), empty(), empty())


def _trl() -> None:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    logits = make_logits(BF16, V).requires_grad_()
    log_prob, _ = selective_log_softmax_and_entropy(logits, empty(B, T, dtype=torch.int64))
    log_prob.sum().backward()


def _trl_chunked() -> None:
    from trl.kernels import chunked_logprob

    operands = empty(N, H, dtype=BF16), empty(HEAD_V, H, dtype=BF16)
    hidden, weight = (x.requires_grad_() for x in operands)
    with mock.patch.object(chunked_logprob, "_use_triton", return_value=True):
        out = chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, None, empty(N, dtype=torch.int64), 1.0, 8192, None, 1.0, ()
        )
        (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()


def _verl() -> None:
    from verl.utils.kernel import kernels

    with mock.patch.object(torch.Tensor, "is_cuda", True):
        hidden, weight = empty(N, H, dtype=BF16), empty(HEAD_V, H, dtype=BF16)
        labels = empty(N, dtype=torch.int64)
        found = kernels.efficient_entropy_forward(hidden, weight, labels, 2, 1.0, None)
        _, _, maximum, accumulate, entropy_b = found
        kernels.efficient_entropy_backward(
            empty(N), empty(N), hidden, weight, labels, maximum, accumulate, entropy_b, 2, False,
            1.0, None,
        )  # fmt: skip


def _cut_cross_entropy() -> None:
    from cut_cross_entropy.cce_backward import cce_backward_kernel
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel

    e, c = empty(N, H, dtype=BF16), empty(HEAD_V, H, dtype=BF16)
    cce_lse_forward_kernel(e, c)
    cce_backward_kernel(
        empty(N), e, c, empty(N), None, None, None, targets=empty(N, dtype=torch.int64)
    )


# package, and a function that launches its kernels in bf16 with our kernels' shapes
PEERS: dict[str, tuple[str, Callable[[], None]]] = {
    "Liger GRPO, sequence level": ("liger_kernel", _liger),
    "TRL log-prob and entropy": ("trl", _trl),
    "TRL ChunkedLogProbFunction": ("trl", _trl_chunked),
    "verl fused linear": ("verl", _verl),
    "cut-cross-entropy": ("cut_cross_entropy", _cut_cross_entropy),
}


def compile_peer(name: str, target: str) -> tuple[dict[str, Compiled], str | None]:
    """Return the kernels of a peer that compile, by name, and the error that stopped it, if any."""
    package, launch = PEERS[name]
    if importlib.util.find_spec(package) is None:
        return {}, "not installed"
    why = None
    with compiling(target) as binaries:
        try:
            launch()
        except Exception as error:  # whatever a peer raises is reported in the table
            first = str(error).strip().splitlines() or [""]
            why = f"{type(error).__name__}: {first[0][:120]}"
    found: dict[str, Compiled] = {}
    for kernel, binary in binaries:
        found.setdefault(kernel, read_binary(binary, target))
    return found, why


# Launches


class Launched(TorchDispatchMode):
    """A counter of what torch would launch: every op that is neither a view nor an allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict | None = None
    ) -> Any:
        makes_memory = "empty" in op.overloadpacket.__name__
        self.count += not (op.is_view or makes_memory)
        return op(*args, **(kwargs or {}))


def launches_from_hidden(products: str, n: int, hidden_size: int, calls: int = 9) -> dict:
    """Return what one call costs its host: kernels that are launched, and time on meta tensors.

    The time is that of the Python code and of torch's dispatcher, without what a driver takes for a
    launch.
    """
    with compiling("sm_90") as binaries:
        call_from_hidden(products, n, hidden_size)
        kernels = len(binaries)
        with Launched() as launched:
            call_from_hidden(products, n, hidden_size)
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            call_from_hidden(products, n, hidden_size)
            times.append(time.perf_counter() - start)
    return {
        "products": products, "N": n, "V": HEAD_V, "H": hidden_size, "triton": kernels,
        "torch": launched.count, "ms": 1e3 * statistics.median(times),
    }  # fmt: skip


# Predictions


def predictions(bandwidth: float, matmul: float, fractions: tuple[float, ...]) -> list[dict]:
    """Compute the least time of each op from its bytes or FLOPs.

    Args:
        bandwidth: bytes per second.
        matmul: FLOPs per second.
        fractions: values of f, the fraction of rows with a gradient.

    Returns:
        Rows with op, f, bytes or FLOPs, and milliseconds.

    The formulas are for bf16. From logits, the forward reads 2 bytes per logit; the backward reads
    2 f and writes 2. From hidden states, the FLOPs are (2 + 4f) N V H if exponentials are kept or
    computed in chunks, and (2 + 6f) N V H if they are recomputed. Among the peers, Liger reads the
    logits of every row twice in the forward and once in the backward, and writes them once; TRL's
    log-prob equals ours at f=1; verl, cut-cross-entropy and TRL's chunks take 8 N V H.
    """
    logits = N * HEAD_V
    unit = N * HEAD_V * H
    of_bytes: dict[str, Callable[[float], float]] = {
        "gspo_ops from logits": lambda f: (2 + 2 * f + 2) * logits,
        "Liger GRPO, sequence level": lambda f: 8 * logits,
        "TRL log-prob": lambda f: 6 * logits,
    }
    of_flops: dict[str, Callable[[float], float]] = {
        "gspo_ops from hidden, keep or chunk": lambda f: (2 + 4 * f) * unit,
        "gspo_ops from hidden, recompute": lambda f: (2 + 6 * f) * unit,
        "verl, cut-cross-entropy, TRL chunks": lambda f: 8 * unit,
    }
    rows = []
    for f in fractions:
        for op, nbytes in of_bytes.items():
            rows.append({"op": op, "f": f, "bytes": nbytes(f), "ms": 1e3 * nbytes(f) / bandwidth})
        for op, flops in of_flops.items():
            rows.append({"op": op, "f": f, "flops": flops(f), "ms": 1e3 * flops(f) / matmul})
    return rows


def designs(bandwidth: float, matmul: float, fractions: tuple[float, ...]) -> list[dict]:
    """Predict the time of the phases of each way from hidden states to gradients, ours and peers'.

    At these shapes, torch.mm is assumed to reach 0.94 of `matmul`, and Triton 0.79 with TMA (0.83
    in the backward) and 0.61 without it (0.43 where operands are transposed). The peers are assumed
    to reach what they publish. Tiles of 32 MiB of fp32 logits are written at `bandwidth`, and read
    from the L2 cache.
    """
    logits, unit = N * HEAD_V, 2.0 * N * HEAD_V * H
    parts = -(-HEAD_V // 8192)  # parts of the vocabulary in which a peer processes it

    def product(rate: float) -> float:
        return unit / (rate * matmul)

    def moved(nbytes: float) -> float:
        return nbytes / bandwidth

    ways: dict[str, Callable[[float], dict[str, float]]] = {
        'gspo_ops, products="mm"': lambda f: {
            "logits": product(0.94), "fold": moved(6 * logits), "dhidden": product(0.94),
            "dweight": product(0.94),
        },
        'gspo_ops, products="triton", TMA': lambda f: {
            "logits": product(0.79), "sums": moved(8 * logits / 128), "dhidden": f * product(0.83),
            "dweight": f * product(0.83),
        },
        'gspo_ops, products="triton", without TMA': lambda f: {
            "logits": product(0.61), "sums": moved(8 * logits / 128), "dhidden": f * product(0.61),
            "dweight": f * product(0.43),
        },
        "quack, linear cross entropy": lambda f: {
            "products": 3 * product(0.94), "rest": moved(0.1 * logits + 6 * HEAD_V * H),
        },
        "Liger, SM90 cross entropy": lambda f: {
            "forward": product(0.98), "backward": 3 * product(0.97),
        },
        "TRL chunks": lambda f: {
            "products": 4 * product(0.94), "fold": moved(6 * logits),
            "sums": moved(8 * H * (N * parts + 2 * HEAD_V)),
        },
    }  # fmt: skip
    return [
        {"way": way, "f": f, "ms": 1e3 * sum(phases(f).values()),
         "phases": {name: 1e3 * seconds for name, seconds in phases(f).items()}}
        for f in fractions
        for way, phases in ways.items()
    ]  # fmt: skip


# The command

FRACTIONS = (1, 0.6, 0.35, 0.1)
SHOWN = (
    "fwd bf16", "fwd fp32", "bwd bf16", "bwd fp32", "bwd bf16 recompute", "loss sequence packed",
    *PRODUCTS, *TMA, "fold", "weigh", "row sums",
)  # fmt: skip


def can_compile(name: str, target: str) -> bool:
    """Return whether the kernel exists: with TMA, Triton compiles no soft cap for sm_100."""
    return name not in TMA or target == "sm_90" or (target == "sm_100" and "softcap" not in name)


def row(kernel: str, target: str, compiled: Compiled, itemsize: int, per_logit: bool) -> dict:
    loops = [loop for loop in compiled.loops if loop.loads] if per_logit else []
    per_logit_of_all = None
    if kernel in ("fold", "weigh"):  # without a loop: all instructions of a program, per column
        columns = {"fold": SUMS, "weigh": EPILOGUE}[kernel]
        per_logit_of_all = compiled.instructions / columns
    return {
        "kernel": kernel, "target": target, "registers": compiled.registers,
        "spills": compiled.spills, "shared": compiled.shared,
        "load_bits": sorted({8 * width for loop in loops for width in loop.loads}),
        "per_logit": instructions_per_logit(itemsize, loops) if loops else per_logit_of_all,
        "matrix_instructions": compiled.matrix_instructions,
        "boxes": compiled.boxes_loaded + compiled.boxes_stored,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--targets", nargs="+", choices=TARGETS, default=["sm_90", "sm_100", "gfx942"],
        help="architectures to compile for")  # fmt: skip
    add("--bandwidth", type=float, default=3000, help="GB/s that the predictions assume")
    add("--matmul", type=float, default=790, help="TFLOP/s that the predictions assume")
    add("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    report: dict = {
        "benchmark": "static", **provenance(), "peers": versions(), "ours": [], "others": [],
        "given": {"bandwidth": args.bandwidth, "matmul": args.matmul}, "N": N, "V": HEAD_V, "H": H,
        "launches": [
            launches_from_hidden(products, n, hidden_size)
            for products in ("mm", "triton")
            for n, hidden_size in ((512, 896), (N, H))
        ],
        "predictions": predictions(1e9 * args.bandwidth, 1e12 * args.matmul, FRACTIONS),
        "designs": designs(1e9 * args.bandwidth, 1e12 * args.matmul, FRACTIONS),
    }  # fmt: skip
    for target in args.targets:
        for name in SHOWN:
            if not can_compile(name, target):
                continue
            itemsize = 4 if "fp32" in name else 2
            compiled = compile_variant(name, target)
            report["ours"].append(
                row(name, target, compiled, itemsize, name.startswith(("fwd", "bwd")))
            )
        for peer in PEERS:
            kernels, why = compile_peer(peer, target)
            on_logits = peer in ("Liger GRPO, sequence level", "TRL log-prob and entropy")
            for kernel, compiled in kernels.items():
                of = row(kernel, target, compiled, 2, on_logits)
                report["others"].append({"peer": peer, **of})
            if why is not None:
                report["others"].append({"peer": peer, "target": target, "missing": why})
        print(f"{target}: done", flush=True)
    for of in report["ours"] + report["others"]:
        print({key: value for key, value in of.items() if value not in (None, "", [])})
    if args.out:
        write(args.out, report)


if __name__ == "__main__":
    main()
