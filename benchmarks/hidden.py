"""Time, peak memory and error of GSPO from hidden states: ours, eager, compiled and peers, here.

    python -m gspo_ops.benchmarks.hidden --out benchmarks/results/NAME.json

Eager is `hidden.float() @ weight.float().T`, log_softmax, gather and GSPO's loss. Everybody gets
the same tensors. Rounds are interleaved; ratios are taken within a round, because the speed of a
machine drifts. Peers come with `pip install '.[bench]'`; without them the table says so.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import gspo_ops
from gspo_ops import reference
from gspo_ops.testing import relative

from .measure import (
    default_device,
    interleaved,
    peak_bytes,
    plausible,
    provenance,
    release_memory,
    seconds,
    write,
)
from .providers import DEFAULT_LOSSES, LOSSES, Loss, versions

BASELINE = "eager"
OURS = "gspo_ops"
SEQUENCES = 16
ROUNDS = {(1024, 49152, 576): 5, (1024, 151936, 896): 3}  # by (N, V, H)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Relative L2 of a gradient: ours is not timed beyond it, a peer that is far beyond it computes
# something else.
FP32_ERROR, BF16_ULP, DIFFERENT = 5e-6, 2**-8, 0.05


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old: Tensor
    advantages: Tensor


class Gradients(NamedTuple):
    hidden: Tensor
    weight: Tensor

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes + self.weight.nbytes


class Sample(NamedTuple):
    seconds: float
    peak_bytes: int


def make_inputs(
    N: int, V: int, H: int, dtype: torch.dtype, f: float, device: torch.device
) -> Inputs:
    """16 sequences of sampled tokens, a fraction f of them with an advantage.

    The ratio of a sequence with an advantage is far on the side of 1 that is never clipped:
    whatever the rounding of a provider, all have the same live rows.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (SEQUENCES, N // SEQUENCES)
    hidden = torch.randn(*shape, H, generator=generator).to(device, dtype)
    weight = (torch.randn(V, H, generator=generator) * 3 / H**0.5).to(device, dtype)
    targets = torch.empty(shape, dtype=torch.long, device=device)
    new = torch.empty(shape, device=device)
    for b in range(SEQUENCES):
        log_p = (hidden[b].float() @ weight.float().T).log_softmax(-1)
        noise = torch.empty(log_p.shape).exponential_(generator=generator).to(device)
        targets[b] = (log_p - noise.log()).argmax(-1)
        new[b] = log_p.gather(-1, targets[b, :, None]).squeeze(-1)
    advantages = torch.randn(SEQUENCES, generator=generator).to(device)
    advantages[round(SEQUENCES * f) :] = 0
    return Inputs(hidden, weight, targets, new + 0.1 * advantages.sign()[:, None], advantages)


def leaves(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()


def step(loss: Loss, inputs: Inputs) -> Gradients:
    hidden, weight = leaves(inputs)
    loss(hidden, weight, *inputs[2:]).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Gradients(hidden.grad, weight.grad)


def exact_gradients(inputs: Inputs) -> Gradients:
    """In float64, sequence after sequence."""
    hidden, weight = (x.detach().double().requires_grad_() for x in inputs[:2])
    for b in inputs.advantages.nonzero().flatten().tolist():
        one = slice(b, b + 1)
        loss, _ = reference.policy_loss_from_hidden(
            hidden[one], weight, inputs.targets[one], inputs.old[one].double(),
            inputs.advantages[one].double(), denominator=float(SEQUENCES),
        )  # fmt: skip
        loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Gradients(hidden.grad, weight.grad)


def grad_errors(losses: dict[str, Loss], inputs: Inputs) -> dict[str, dict[str, float]]:
    """Relative L2 error of each gradient against float64; also everybody's first, warming call."""
    exact = exact_gradients(inputs)
    errors = {}
    for name, loss in losses.items():
        grads = step(loss, inputs)
        errors[name] = {
            f"d{what}": relative(grad, true)
            for what, grad, true in zip(grads._fields, grads, exact, strict=True)
        }
    return errors


def check_errors(errors: dict[str, dict[str, float]], dtype: torch.dtype) -> None:
    """Refuse to time what is not the same function, or ours when it is not exact."""
    ulp = 0.0 if dtype == torch.float32 else BF16_ULP
    for name, of_provider in errors.items():
        for what, error in of_provider.items():
            bound = DIFFERENT
            if name.startswith(OURS):
                bound = max(FP32_ERROR, 1.1 * errors[BASELINE][what] + ulp)
            if not error <= bound:
                raise SystemExit(f"not timed: {what} of {name} is off by {error:.1e} > {bound:.1e}")


def sample(loss: Loss, inputs: Inputs) -> Sample:
    """Time and peak memory of one step."""
    release_memory()
    run, device = partial(step, loss, inputs), inputs.hidden.device
    taken: list[float] = []
    peak = peak_bytes(lambda: taken.append(seconds(run, device)), device)
    return Sample(taken[0], peak)


def summary(samples: list[Sample], baseline: list[Sample], returned_bytes: int) -> dict:
    """Medians over rounds; memory is counted beyond the returned gradients."""
    extra, extra_of_baseline = (
        [s.peak_bytes - returned_bytes for s in taken if plausible(s.peak_bytes, returned_bytes)]
        for taken in (samples, baseline)
    )
    if not extra or not extra_of_baseline:
        raise SystemExit("peak memory can't be measured here: the system takes pages back")
    ratios = [a.seconds / b.seconds for a, b in zip(samples, baseline, strict=True)]
    return {
        "median_ms": 1e3 * statistics.median(s.seconds for s in samples),
        "time_ratio": {
            "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)
        },
        "extra_bytes": statistics.median(extra),
        "memory_ratio": statistics.median(extra) / statistics.median(extra_of_baseline),
        "memory_rounds": len(extra),
    }  # fmt: skip


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, f: float, names: Sequence[str], rounds: int
) -> dict:
    """One row of the results: every provider at one shape, dtype and f."""
    torch.compiler.reset()  # or a second shape would be compiled as a dynamic one
    inputs = make_inputs(*shape, dtype, f, default_device())
    missing = {name: LOSSES[name].missing() for name in names}
    losses = {name: LOSSES[name].compute for name in names if missing[name] is None}
    errors = grad_errors(losses, inputs)
    check_errors(errors, dtype)
    samples = interleaved(
        {name: partial(sample, loss, inputs) for name, loss in losses.items()}, rounds
    )
    returned = inputs.hidden.nbytes + inputs.weight.nbytes
    return {
        **dict(zip("NVH", shape, strict=True)),
        "dtype": str(dtype)[6:], "f": f, "rounds": rounds, "returned_bytes": returned,
        "plan": str(gspo_ops.plan_from_hidden(*leaves(inputs))),
        "providers": {
            name: {"missing": why} if why
            else {**summary(samples[name], samples[BASELINE], returned), "grad_error": errors[name]}
            for name, why in missing.items()
        },
    }  # fmt: skip


def show(row: dict) -> None:
    print("N={N} V={V} H={H} {dtype} f={f:g}, {rounds} rounds, plan: {plan}".format(**row))
    for name, of in row["providers"].items():
        if "missing" in of:
            print(f"  {name:30} {of['missing']}")
            continue
        ratio, error = of["time_ratio"], of["grad_error"]
        print(
            f"  {name:30} {of['median_ms']:7.0f} ms  {ratio['median']:.2f} "
            f"({ratio['min']:.2f}-{ratio['max']:.2f})  {of['extra_bytes'] / 2**20:6.0f} MiB  "
            f"{of['memory_ratio']:.2f}  error {error['dhidden']:.1e} {error['dweight']:.1e}",
            flush=True,
        )


def shape_of(text: str) -> tuple[int, int, int]:
    N, V, H = (int(x) for x in text.split("x"))
    if N % SEQUENCES:
        raise argparse.ArgumentTypeError(f"N must be a multiple of {SEQUENCES}")
    return N, V, H


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=shape_of, action="append", metavar="NxVxH")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    parser.add_argument("--f", type=float, action="append", help="default: 1 and 0.5")
    parser.add_argument("--rounds", type=int, help="default: as many as the shape has time for")
    parser.add_argument(
        "--providers", nargs="+", choices=LOSSES, default=DEFAULT_LOSSES, metavar="NAME",
        help=f"any of: {'; '.join(LOSSES)} (default: the first {len(DEFAULT_LOSSES)})",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    names = list(dict.fromkeys([BASELINE, *args.providers]))
    results: list[dict] = []
    for shape in args.shape or ROUNDS:
        rounds = args.rounds or ROUNDS.get(shape, 5)
        for dtype in args.dtype or DTYPES:
            for f in args.f or (1.0, 0.5):
                results.append(measure(shape, DTYPES[dtype], f, names, rounds))
                show(results[-1])
                if args.out:  # after every row: an interrupted run leaves what it has
                    report = {"benchmark": "hidden", **provenance(), "peers": versions()}
                    write(args.out, {**report, "results": results})


if __name__ == "__main__":
    main()
