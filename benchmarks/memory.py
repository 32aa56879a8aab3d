"""Compare the peak memory of each plan, beyond the gradients it returns, with its own estimate.

    python -m gspo_ops.benchmarks.memory --out benchmarks/results/NAME.json

H is small, so that memory proportional to N * V dominates and a CPU finishes within minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gspo_ops
from gspo_ops.plan import PlanName

from .measure import default_device, peak_tensor_bytes, provenance, write

V, H, SEQUENCES = 151936, 64, 16
BUDGET = 642_500_000  # bytes: 2048 rows of bf16 exponentials, and dweight in fp32


def make_inputs(N: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shape = (SEQUENCES, N // SEQUENCES)
    hidden = torch.randn(*shape, H, generator=generator).to(device, dtype)
    weight = (torch.randn(V, H, generator=generator) / H**0.5).to(device, dtype)
    targets = torch.randint(V, shape, generator=generator).to(device)
    with torch.no_grad():
        new = gspo_ops.log_probs_from_hidden(hidden, weight, targets)
    advantages = torch.randn(SEQUENCES, generator=generator).to(device)
    # ratios lie on the side of the clip range where no sequence is clipped
    return hidden, weight, targets, new + 0.1 * advantages.sign()[:, None], advantages


def measure(N: int, dtype: torch.dtype, plan: PlanName) -> dict:
    device = default_device()
    hidden, weight, *rest = make_inputs(N, dtype, device)
    options: dict[str, Any] = {"plan": plan, "memory_budget": BUDGET}
    hidden.requires_grad_()
    weight.requires_grad_()

    def step() -> None:
        gspo_ops.policy_loss_from_hidden(hidden, weight, *rest, **options).loss.backward()

    peak = peak_tensor_bytes(step, device) - hidden.nbytes - weight.nbytes
    predicted = gspo_ops.plan_from_hidden(hidden, weight, **options)
    return {
        "N": N, "V": V, "H": H, "dtype": str(dtype)[6:], "plan": plan,
        "peak_bytes": peak, "predicted_bytes": predicted.bytes,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 4096, 8192, 16384],
        help="numbers of rows to measure")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    results = []
    for plan in ("keep", "chunk", "recompute"):
        for N in args.rows:
            row = measure(N, torch.bfloat16, plan)
            results.append(row)
            print(
                f"{plan:10} N={N:6}  peak {row['peak_bytes'] / 2**20:6.0f} MiB  predicted "
                f"{row['predicted_bytes'] / 2**20:6.0f} MiB  "
                f"ratio {row['peak_bytes'] / row['predicted_bytes']:.2f}",
                flush=True,
            )
    if args.out:
        write(args.out, {"benchmark": "memory", **provenance(), "results": results})


if __name__ == "__main__":
    main()
