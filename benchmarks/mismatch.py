"""Measure the sources of the noise between an engine's log-probs and the trainer's.

    python -m gspo_ops.benchmarks.mismatch --out NAME.json

A model samples responses. Their log-probs are computed twice, with one difference: the padding, the
other rows of the batch, decoding with a cache instead of one forward, the rounding of the head, or
the dtype of the body. GSPO's ratio mistakes the resulting change, averaged over a response, for a
change of the policy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gspo_ops import GRPO, GSPO, log_probs_from_hidden

from .clip_error import flipped, log_ratios, sample_tokens
from .measure import default_device, provenance, write
from .providers import METHODS

LENGTHS = (4, 8, 16, 32, 64, 128, 256, 512)
PADDING = 7  # columns on the left
BODIES = ("float32", "bfloat16")


class Sampled(NamedTuple):
    """A model, (S, P + T) tokens of prompts and responses, and P."""

    model: Any
    tokens: Tensor
    prompt: int

    @property
    def targets(self) -> Tensor:
        return self.tokens[:, self.prompt :]


def body(dtype: str, device: torch.device) -> AbstractContextManager:
    enabled = dtype == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


# Hidden states that predict the responses, (S, T, H)


def one_forward(of: Sampled, dtype: str) -> Tensor:
    """Run the whole batch without padding, as an update does."""
    with body(dtype, of.tokens.device):
        hidden = of.model.base_model(of.tokens[:, :-1], use_cache=False).last_hidden_state
    return hidden[:, of.prompt - 1 :]


def padded(of: Sampled, dtype: str) -> Tensor:
    tokens = torch.nn.functional.pad(of.tokens[:, :-1], (PADDING, 0))
    mask = torch.ones_like(tokens)
    mask[:, :PADDING] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with body(dtype, tokens.device):
        hidden = of.model.base_model(
            tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
    return hidden[:, PADDING + of.prompt - 1 :]


def alone(of: Sampled, dtype: str) -> Tensor:
    rows = [one_forward(of._replace(tokens=row[None]), dtype) for row in of.tokens]
    return torch.cat(rows)


def cached(of: Sampled, dtype: str) -> Tensor:
    """Run token by token with a cache, as an engine decodes."""
    from transformers import DynamicCache

    cache = DynamicCache(config=of.model.config)
    found = []
    step = of.tokens[:, : of.prompt]
    for t in range(of.prompt, of.tokens.shape[1]):
        with body(dtype, of.tokens.device):
            hidden = of.model.base_model(step, past_key_values=cache).last_hidden_state
        found.append(hidden[:, -1])
        step = of.tokens[:, t : t + 1]
    return torch.stack(found, 1)


# Log-probs from hidden states, (S, T)


def exact_head(of: Sampled, hidden: Tensor) -> Tensor:
    weight = of.model.get_output_embeddings().weight.detach()
    return log_probs_from_hidden(hidden.contiguous(), weight, of.targets)


def rounded_head(of: Sampled, hidden: Tensor) -> Tensor:
    """Apply a bf16 head with bf16 logits, as most engines do."""
    weight = of.model.get_output_embeddings().weight.detach().bfloat16()
    method = METHODS["eager, bf16 logits"].compute
    rows = zip(hidden.bfloat16(), of.targets, strict=True)
    return torch.cat([method(h[None], weight, y[None]) for h, y in rows]).float()


@torch.no_grad()
def differences(of: Sampled) -> dict[str, dict[str, Tensor]]:
    """Return the changes of (S, T) log-probs by dtype of the body and by source."""
    found: dict[str, dict[str, Tensor]] = {}
    training = {}
    ways: dict[str, Callable[[Sampled, str], Tensor]] = {
        "padding": padded, "micro-batch": alone, "cached decoding": cached
    }  # fmt: skip
    for dtype in BODIES:
        hidden = one_forward(of, dtype)
        training[dtype] = exact_head(of, hidden)
        others = {name: way(of, dtype) for name, way in ways.items()}
        changed = {name: exact_head(of, other) for name, other in others.items()}
        changed["head rounding"] = rounded_head(of, hidden)
        changed["engine: cached, rounded head"] = rounded_head(of, others["cached decoding"])
        found[dtype] = {name: x - training[dtype] for name, x in changed.items()}
    found["bfloat16"]["body in bf16, training in fp32"] = training["bfloat16"] - training["float32"]
    return found


def summary(difference: Tensor) -> dict[str, Any]:
    """Return errors of s_i and flipped decisions by length, and what leaves GRPO's clip range."""
    by_length = {}
    for length in (n for n in LENGTHS if difference.shape[1] % n == 0):
        error = log_ratios(difference.double(), torch.zeros_like(difference).double(), length)
        by_length[str(length)] = {
            "rms": error.expm1().square().mean().sqrt().item(), "flipped": flipped(error),
            "clipped_by_noise": _outside(error, GSPO().clip_low, GSPO().clip_high),
        }  # fmt: skip
    tokens = difference.double().flatten()
    return {
        "by_length": by_length, "token_rms": tokens.expm1().square().mean().sqrt().item(),
        "tokens_clipped_by_noise": _outside(tokens, GRPO().clip_low, GRPO().clip_high),
    }  # fmt: skip


def _outside(log_ratio: Tensor, low: float, high: float) -> float:
    """Return the fraction of ratios that is clipped when half of the advantages are positive."""
    ratio = log_ratio.exp()
    return ((ratio > 1 + high).double() + (ratio < 1 - low).double()).mean().item() / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2 or a local model directory")
    parser.add_argument("--sequences", type=int, default=16, help="a multiple of 4")
    parser.add_argument("--length", type=int, default=512, help="tokens sampled per sequence")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    made = provenance()  # taken now, as the commit may change during the run
    generator = torch.Generator(default_device()).manual_seed(0)
    of = Sampled(*sample_tokens(args.model, args.sequences, args.length, generator))
    report = {
        "benchmark": "mismatch", **made, "model": args.model,
        "sequences": len(of.tokens), "length": args.length, "padding": PADDING,
        "bodies": {
            dtype: {name: summary(d) for name, d in sources.items()}
            for dtype, sources in differences(of).items()
        },
    }  # fmt: skip
    for dtype, sources in report["bodies"].items():
        for name, at in sources.items():
            cells = "  ".join(
                f"{n}: {x['rms']:.1e} {x['flipped']:4.0%}" for n, x in at["by_length"].items()
            )
            print(f"{dtype:9} {name:32} {cells}")
    if args.out:
        write(args.out, report)


if __name__ == "__main__":
    main()
