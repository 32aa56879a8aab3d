"""Measure how a log-prob method's rounding changes GSPO's ratio, on a real model's hidden states.

    python -m gspo_ops.benchmarks.clip_error --out NAME.json

A model samples responses. Its bf16 hidden states and its bf16 head are the inputs of every method
and of float64. The old policy has the head before a small update. The error is that of s_i. A
decision is flipped if the error carries s_i over the edge of the clip range that applies to its
advantage.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gspo_ops import GSPO, reference

from .measure import default_device, provenance, write
from .plots import CASES
from .providers import METHODS, Method, versions

LENGTHS = (64, 128, 256, 512, 1024)
# Exact log-ratios are taken to be normal. With this standard deviation, 15% of the sequences are
# clipped, which is the fraction that the GSPO paper reports.
SPREAD = 3.4e-4
# Every head weight changes by this much between the two policies: a few steps of Adam at lr 1e-6.
UPDATE = 4e-6
PROMPTS = (
    "Write a long story about a lighthouse keeper who finds a map in a bottle.",
    "Explain step by step how a computer adds two numbers, then how it multiplies them.",
    "Prove that there are infinitely many primes, and discuss three other proofs of it.",
    "Write a Python program that plays tic-tac-toe, with comments on every function.",
)


class Sampled(NamedTuple):
    """Responses of a model: bf16 hidden states (S, T, H), targets (S, T), and two bf16 heads."""

    hidden: Tensor
    targets: Tensor
    weight: Tensor
    old_weight: Tensor


@torch.no_grad()
def sample_tokens(
    name: str, sequences: int, length: int, generator: torch.Generator
) -> tuple[Any, Tensor, int]:
    """Return a model, (S, P + T) tokens sampled from it at temperature 1 without a stop, and P."""
    from gspo_ops.trainer.model import load_model
    from gspo_ops.trainer.rollout import generate

    model, tokenizer = load_model(name)
    device = generator.device
    model = model.to(device)
    never_stop = torch.empty(0, dtype=torch.long, device=device)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    shortest = min(map(len, prompts))
    rollout = generate(
        model, [prompt[:shortest] for prompt in prompts], never_stop,
        group_size=-(-sequences // len(prompts)), max_new_tokens=length, temperature=1.0,
        autocast=nullcontext, generator=generator,
    )  # fmt: skip
    prompts_of = rollout.prompts.repeat_interleave(rollout.group_size, 0)
    return model, torch.cat([prompts_of, rollout.responses], 1)[:sequences], shortest


@torch.no_grad()
def sample(name: str, sequences: int, length: int, device: torch.device) -> Sampled:
    """Sample, and return hidden states with the head before and after a small update."""
    generator = torch.Generator(device).manual_seed(0)
    model, tokens, prompt = sample_tokens(name, sequences, length, generator)
    hidden = torch.cat([
        model.base_model(row[None, :-1]).last_hidden_state[:, prompt - 1 :].bfloat16()
        for row in tokens
    ])  # fmt: skip
    old = model.get_output_embeddings().weight.detach()
    step = torch.randn(old.shape, generator=generator, device=device).sign()
    return Sampled(hidden, tokens[:, prompt:], (old + UPDATE * step).bfloat16(), old.bfloat16())


@torch.no_grad()
def log_probs(method: Method, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute (S, T) log-probs one sequence at a time, and return them in float64."""
    rows = [method(h[None], weight, y[None]).double() for h, y in zip(hidden, targets, strict=True)]
    return torch.cat(rows)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return reference.log_probs_from_hidden(hidden.double(), weight.double(), targets)


def log_ratios(new: Tensor, old: Tensor, length: int) -> Tensor:
    """Return l_i of every piece of `length` tokens, each taken as a response of its own."""
    return (new - old).unflatten(1, (-1, length)).mean(-1).flatten()


def flipped(errors: Tensor) -> float:
    """Return the fraction of clip decisions that errors of l_i change, for l_i spread by SPREAD."""
    normal = NormalDist(0, SPREAD)
    quantiles = [normal.inv_cdf((k + 0.5) / 1024) for k in range(1024)]
    log_ratio = torch.tensor(quantiles, dtype=torch.float64)
    true, seen = log_ratio.exp(), (log_ratio + errors.cpu()[:, None]).exp()
    high, low = 1 + GSPO().clip_high, 1 - GSPO().clip_low
    # advantages of both signs are equally frequent
    changed = ((seen > high) != (true > high)).double() + ((seen < low) != (true < low)).double()
    return changed.mean().item() / 2


def by_length(new: Tensor, old: Tensor, exact_new: Tensor, exact_old: Tensor) -> dict[str, dict]:
    """Return errors of s_i and flipped decisions at each length that divides T."""
    results = {}
    for length in (n for n in LENGTHS if new.shape[1] % n == 0):
        true = log_ratios(exact_new, exact_old, length)
        error = log_ratios(new, old, length) - true
        of_ratio = true.exp() * torch.expm1(error)
        results[str(length)] = {
            "rms_error": of_ratio.square().mean().sqrt().item(),
            "max_error": of_ratio.abs().max().item(),
            "flipped": flipped(error),
        }
    return results


def measure(sampled: Sampled) -> Iterator[tuple[str, dict]]:
    """Yield the rms of exact log-ratios, then the results of each method as they are found."""
    hidden, targets, weight, old_weight = sampled
    exact_new, exact_old = (log_probs(exact, hidden, w, targets) for w in (weight, old_weight))
    # a caller would pass them in float32
    given_old = exact_old.float().double()
    yield "exact", {"log_ratio_rms": _log_ratio_rms(exact_new, exact_old)}
    for name, provider in METHODS.items():
        missing = provider.missing(hidden.device)
        if missing:
            yield name, {"missing": missing}
            continue
        new, old = (log_probs(provider.compute, hidden, w, targets) for w in (weight, old_weight))
        yield (
            name,
            {
                "exact": by_length(new, given_old, exact_new, given_old),
                "same": by_length(new, old, exact_new, exact_old),
            },
        )


def _log_ratio_rms(new: Tensor, old: Tensor) -> dict[str, float]:
    lengths = [n for n in LENGTHS if new.shape[1] % n == 0]
    return {str(n): log_ratios(new, old, n).square().mean().sqrt().item() for n in lengths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2 or a local model directory")
    parser.add_argument("--sequences", type=int, default=16, help="responses to sample")
    parser.add_argument("--length", type=int, default=1024, help="tokens sampled per sequence")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    sampled = sample(args.model, args.sequences, args.length, default_device())
    report = {
        "benchmark": "clip_error", **provenance(), "peers": versions(), "model": args.model,
        "sequences": args.sequences, "length": args.length, "spread": SPREAD, "update": UPDATE,
        "methods": {},
    }  # fmt: skip
    for name, of in measure(sampled):
        if name == "exact":
            report.update(of)
        else:
            report["methods"][name] = of
        show(name, of)
        if args.out:
            write(args.out, report)


def show(name: str, of: dict) -> None:
    if "exact" not in of:
        print(f"{name}: {of}")
        return
    for case in CASES:
        cells = "  ".join(
            f"{n}: {at['rms_error']:.1e} {at['flipped']:6.2%}" for n, at in of[case].items()
        )
        print(f"{name:40} {CASES[case]:34} {cells}", flush=True)


if __name__ == "__main__":
    main()
