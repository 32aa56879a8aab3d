"""Time, peak memory and error of `policy_loss_from_logits` against the eager formula, here.

    python -m gspo_ops.benchmarks.logits --out benchmarks/results/NAME.json

Eager is `logits.float().log_softmax(-1).gather(...)` followed by the same GSPO loss in torch.
Rounds are interleaved; ratios are taken within a round, because the speed of a machine drifts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gspo_ops import GSPO, policy_loss_from_logits, reference
from gspo_ops.testing import relative

from .measure import (
    default_device,
    interleaved,
    plausible_peak_bytes,
    provenance,
    seconds,
    write,
)


def eager_gspo(logits: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """GSPO as trainers write it, for (B, T, V) without padding."""
    log_probs = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    ratio = (log_probs - old).mean(-1).exp()
    clipped = ratio.clamp(1 - GSPO().clip_low, 1 + GSPO().clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def fused_gspo(logits: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    return policy_loss_from_logits(logits, targets, old, advantages).loss


PROVIDERS: dict[str, Callable[..., Tensor]] = {"eager": eager_gspo, "gspo_ops": fused_gspo}


def make_inputs(N: int, V: int, dtype: torch.dtype, f: float, device: torch.device) -> dict:
    """16 sequences, a fraction f of them with non-zero advantage, none of those clipped."""
    generator = torch.Generator().manual_seed(0)
    B = 16
    logits = (3 * torch.randn(B, N // B, V, generator=generator)).to(device, dtype)
    targets = torch.randint(V, (B, N // B), generator=generator).to(device)
    with torch.no_grad():
        new = torch.stack(
            [
                reference.log_probs_from_logits(x.float(), y)
                for x, y in zip(logits, targets, strict=True)
            ]
        )
    advantages = torch.randn(B, generator=generator)
    advantages[round(B * f) :] = 0
    # well inside the clip range
    old = new - 1e-4
    return {"logits": logits, "targets": targets, "old": old, "advantages": advantages.to(device)}


def step(provider: Callable[..., Tensor], inputs: dict) -> Tensor:
    logits = inputs["logits"].detach().requires_grad_()
    provider(**{**inputs, "logits": logits}).backward()
    assert logits.grad is not None
    return logits.grad


def error(provider: Callable[..., Tensor], inputs: dict) -> float:
    """Relative L2 error of dlogits against float64, on the first sequence with a gradient."""
    grad = step(provider, inputs)[0]
    exact = inputs["logits"][:1].double().requires_grad_()
    loss, _ = reference.policy_loss_from_logits(
        exact, inputs["targets"][:1], inputs["old"][:1].double(), inputs["advantages"][:1].double(),
        denominator=float(len(inputs["advantages"])),
    )  # fmt: skip
    loss.backward()
    assert exact.grad is not None
    return relative(grad, exact.grad[0])


def measure(
    N: int, V: int, dtype: torch.dtype, f: float, device: torch.device, rounds: int
) -> dict:
    inputs = make_inputs(N, V, dtype, f, device)
    errors = {name: error(provider, inputs) for name, provider in PROVIDERS.items()}
    if not errors["gspo_ops"] <= max(4e-6, 1.1 * errors["eager"]):
        raise SystemExit(f"not timed, because the gradient is off: {errors}")
    dlogits = inputs["logits"].nbytes
    steps = {name: partial(step, provider, inputs) for name, provider in PROVIDERS.items()}
    memory = {name: plausible_peak_bytes(run, dlogits, device) for name, run in steps.items()}
    times = interleaved(
        {name: partial(seconds, run, device) for name, run in steps.items()}, rounds
    )
    ratios = sorted(b / a for a, b in zip(times["eager"], times["gspo_ops"], strict=True))
    return {
        "N": N, "V": V, "dtype": str(dtype)[6:], "f": f,
        "median_ms": {name: 1e3 * statistics.median(t) for name, t in times.items()},
        "time_ratio": {
            "median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]
        },
        "peak_bytes": memory,
        "dlogits_bytes": dlogits,
        "peak_over_dlogits": memory["gspo_ops"] / dlogits,
        "grad_error_rel_l2": errors,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048, help="N, a multiple of 16")
    parser.add_argument("--vocabulary", type=int, default=49152, help="V")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    device = default_device()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        for f in (1.0, 0.5):
            row = measure(args.rows, args.vocabulary, dtype, f, device, args.rounds)
            results.append(row)
            ms, ratio = row["median_ms"], row["time_ratio"]
            print(
                f"{row['dtype']:8} f={f:.1f}  eager {ms['eager']:7.1f} ms  "
                f"gspo_ops {ms['gspo_ops']:7.1f} ms  ratio {ratio['median']:.2f} "
                f"({ratio['min']:.2f}-{ratio['max']:.2f})  peak/dlogits "
                f"{row['peak_over_dlogits']:.3f} (eager "
                f"{row['peak_bytes']['eager'] / row['dlogits_bytes']:.1f})  "
                f"error {row['grad_error_rel_l2']['gspo_ops']:.1e} "
                f"(eager {row['grad_error_rel_l2']['eager']:.1e})"
            )
    if args.out:
        write(args.out, {**provenance(), "rounds": args.rounds, "results": results})


if __name__ == "__main__":
    main()
