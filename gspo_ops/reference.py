"""The definitions, in plain torch and any floating-point dtype: slow, differentiable, obvious.

They go sequence by sequence and term by term, with autograd for every gradient. The ops are checked
against these functions in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .constants import ESS_RATIO_CAP, IGNORED, LOG_RATIO_CAP
from .head import LoRA
from .objective import GSPO, Objective


def log_probs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """log_softmax(softcap(logits) / temperature) at the targets, 0 at targets of -100."""
    log_p = _log_softmax(logits, temperature, softcap)
    ignored = targets == IGNORED
    index = targets.masked_fill(ignored, 0).long().unsqueeze(-1)
    return torch.where(ignored, 0.0, log_p.gather(-1, index).squeeze(-1))


def entropy_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """-sum_v p_v log p_v of each row, 0 at targets of -100."""
    log_p = _log_softmax(logits, temperature, softcap)
    p_log_p = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p)
    return torch.where(targets == IGNORED, 0.0, -p_log_p.sum(-1))


def _log_softmax(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return (z / temperature).log_softmax(-1)


def logits_from_hidden(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, lora: LoRA | None = None
) -> Tensor:
    """hidden @ weight^T + bias, with weight + scale * b @ a for a LoRA head."""
    if lora is not None:
        weight = weight + lora.scale * lora.b @ lora.a
    logits = hidden @ weight.mT
    return logits if bias is None else logits + bias


def log_probs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`log_probs_from_logits` of `logits_from_hidden`."""
    # values at ignored positions must not matter, NaN included
    hidden = torch.where((targets == IGNORED).unsqueeze(-1), 0.0, hidden)
    logits = logits_from_hidden(hidden, weight, bias=bias, lora=lora)
    return log_probs_from_logits(logits, targets, temperature=temperature, softcap=softcap)


def policy_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss_from_logits` of `logits_from_hidden`."""
    if mask is not None:
        hidden = torch.where((mask == 0).unsqueeze(-1), 0.0, hidden)
    logits = logits_from_hidden(hidden, weight, bias=bias, lora=lora)
    return policy_loss_from_logits(logits, targets, old_log_probs, advantages, mask=mask, **options)


def policy_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    return_log_probs: bool = False,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss_from_log_probs` of `log_probs_from_logits`."""
    if mask is not None:
        targets = targets.masked_fill(mask == 0, IGNORED)
        # values at masked positions must not matter, NaN included
        logits = torch.where((mask == 0).unsqueeze(-1), 0.0, logits)
    log_probs = log_probs_from_logits(logits, targets, temperature=temperature, softcap=softcap)
    entropy = None
    if return_entropy or options.get("objective", GSPO()).entropy_coef > 0:
        entropy = entropy_from_logits(logits, targets, temperature=temperature, softcap=softcap)
    loss, stats = policy_loss_of_tokens(
        log_probs, entropy, old_log_probs, advantages, mask=mask, **options
    )
    if entropy is not None:
        valid = targets.numel() if mask is None else (mask != 0).sum()
        stats["entropy"] = entropy.detach().sum() / valid
    if return_log_probs:
        stats["log_probs"] = log_probs.detach()
    return loss, stats


def policy_loss_from_log_probs(
    log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss_of_tokens` without entropies."""
    return policy_loss_of_tokens(log_probs, None, old_log_probs, advantages, **options)


def policy_loss_of_tokens(
    log_probs: Tensor,
    entropy: Tensor | None,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    objective: Objective = GSPO(),
    ref_log_probs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that an `Objective` defines, and its statistics; entropies are for its bonus."""
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    loss_sum = log_probs.new_zeros(())
    tokens, sequences = 0, 0
    seen = _Seen()
    all_rows = _sequences(log_probs, mask, cu_seqlens)
    batch = len(all_rows)
    for b, rows in enumerate(all_rows):
        n = len(rows)
        new_b, old_b = log_probs.reshape(-1)[rows], old.reshape(-1)[rows]
        log_ratio = new_b - old_b
        if n == 0:
            seen.log_ratio.append(log_probs.new_zeros(()))
            continue
        tokens, sequences = tokens + n, sequences + 1
        A = _pick(advantages, b, rows, batch)
        ratio, decisive = _ratios(objective, new_b, log_ratio, A)
        terms = -_surrogates(objective, ratio, A, new_b)
        if rollout_weights is not None:
            terms = terms * _pick(rollout_weights, b, rows, batch)
        if ref_log_probs is not None:
            kl = _kl(objective, new_b - ref_log_probs.reshape(-1)[rows])
            if objective.kl_weight != "one":
                kl = kl * (ratio if objective.kl_weight == "ratio" else ratio.detach())
            terms = terms + objective.kl_coef * kl
            seen.ref_kl.append(kl.detach())
        if entropy is not None:
            terms = terms - objective.entropy_coef * entropy.reshape(-1)[rows]
        is_mean = objective.aggregation == "seq-mean-token-mean"
        loss_sum = loss_sum + (terms.sum() / n if is_mean else terms.sum())

        seen.log_ratio.append(log_ratio.detach().sum() / n)
        seen.ratio.append(
            ratio.detach() if objective.ratio_level == "token" else ratio.detach()[:1]
        )
        seen.low.append((A < 0) & (decisive < 1 - objective.clip_low))
        seen.high.append((A > 0) & (decisive > 1 + objective.clip_high))
        if objective.dual_clip < math.inf:
            seen.dual.append((A < 0) & (decisive > objective.dual_clip))
        seen.kl.append(-log_ratio.detach())
        seen.k3.append(torch.expm1(_capped(log_ratio.detach())) - log_ratio.detach())
    if denominator is None:
        denominator = {"token-mean": max(tokens, 1), "token-sum": 1}.get(
            objective.aggregation, max(sequences, 1)
        )
    return loss_sum / denominator, seen.stats(log_probs)


@dataclass
class _Seen:
    """The values behind the statistics, sequence by sequence."""

    log_ratio: list[Tensor] = field(default_factory=list)
    ratio: list[Tensor] = field(default_factory=list)
    low: list[Tensor] = field(default_factory=list)
    high: list[Tensor] = field(default_factory=list)
    dual: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    k3: list[Tensor] = field(default_factory=list)
    ref_kl: list[Tensor] = field(default_factory=list)

    def stats(self, like: Tensor) -> dict[str, Tensor]:
        log_ratio = torch.stack(self.log_ratio) if self.log_ratio else like.new_zeros(0)
        if not self.ratio:
            zero, one = like.new_zeros(()), like.new_ones(())
            names = ("clip_frac_sequences", "clip_frac_tokens", "clip_frac_low", "clip_frac_high",
                     "approx_kl", "approx_kl_k3")  # fmt: skip
            ones = ("ratio_mean", "ratio_min", "ratio_max", "effective_sample_size")
            return dict.fromkeys(names, zero) | dict.fromkeys(ones, one) | {"log_ratio": log_ratio}
        ratio, low, high = torch.cat(self.ratio), torch.cat(self.low), torch.cat(self.high)
        in_sequence = [bool((a | b).any()) for a, b in zip(self.low, self.high, strict=True)]
        w = ratio.clamp(1 / ESS_RATIO_CAP, ESS_RATIO_CAP)
        stats = {
            "ratio_mean": ratio.mean(),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
            "clip_frac_sequences": torch.tensor(in_sequence, device=like.device).to(like).mean(),
            "clip_frac_tokens": (low | high).to(like).mean(),
            "clip_frac_low": low.to(like).mean(),
            "clip_frac_high": high.to(like).mean(),
            "approx_kl": torch.cat(self.kl).mean(),
            "approx_kl_k3": torch.cat(self.k3).mean(),
            "effective_sample_size": w.sum().square() / w.square().sum() / len(w),
            "log_ratio": log_ratio,
        }
        if self.dual:
            stats["clip_frac_dual"] = torch.cat(self.dual).to(like).mean()
        if self.ref_kl:
            stats["ref_kl"] = torch.cat(self.ref_kl).mean()
        return stats


def _sequences(log_probs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Return the positions of each sequence's valid tokens among the flattened ones."""
    if cu_seqlens is None:
        B, T = log_probs.shape
        bounds = [b * T for b in range(B + 1)]
    else:
        bounds = cu_seqlens.tolist()
    rows = [torch.arange(*pair, device=log_probs.device) for pair in pairwise(bounds)]
    return rows if mask is None else [r[mask.reshape(-1)[r] != 0] for r in rows]


def _pick(x: Tensor, b: int, rows: Tensor, batch: int) -> Tensor:
    """Return an argument per sequence, one of `batch`, or per token at the rows of sequence b."""
    return x[b].expand(len(rows)) if x.shape == (batch,) else x.reshape(-1)[rows]


def _capped(log_ratio: Tensor) -> Tensor:
    """Cap a log-ratio to keep values finite; the gradient passes as if there were no cap."""
    return log_ratio + (log_ratio.clamp(-LOG_RATIO_CAP, LOG_RATIO_CAP) - log_ratio).detach()


def _capped_exp(log_ratio: Tensor) -> Tensor:
    return _capped(log_ratio).exp()


def _ratios(
    objective: Objective, new: Tensor, log_ratio: Tensor, A: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the ratio of each token of a sequence, and, as a constant, the one that is clipped."""
    if objective.ratio_level == "geometric":
        # arXiv 2507.20673 clips each token's ratio before it takes their geometric mean
        low = math.log(1 - objective.clip_low) if objective.clip_low < 1 else -math.inf
        high = math.log(1 + objective.clip_high)
        clipped = torch.where(A > 0, log_ratio.clamp(max=high), log_ratio)
        clipped = torch.where(A < 0, log_ratio.clamp(min=low), clipped)
        return _capped_exp(clipped.mean()).expand(len(new)), _capped_exp(log_ratio.detach())
    of_sequence = _capped_exp(log_ratio.mean())
    ratio = {
        "sequence": of_sequence.expand(len(new)),
        "sequence_shared": of_sequence.expand(len(new)),
        "sequence_token": of_sequence.detach() * torch.exp(new - new.detach()),
        "token": _capped_exp(log_ratio),
    }[objective.ratio_level]
    return ratio, ratio.detach()


def _surrogates(objective: Objective, ratio: Tensor, A: Tensor, new: Tensor) -> Tensor:
    """Return the surrogate of each token of a sequence."""
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    if objective.surrogate == "weighted":
        return ratio.detach().clamp(low, high) * A * new
    if objective.surrogate == "soft":
        tau = torch.full_like(A, objective.soft_temperature_neg)
        tau = tau.masked_fill(A > 0, objective.soft_temperature_pos)
        return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * A
    if objective.ratio_level == "geometric":
        return ratio * A
    clipped = torch.minimum(ratio * A, ratio.clamp(low, high) * A)
    if objective.dual_clip == math.inf:
        return clipped
    return torch.where(A < 0, torch.maximum(clipped, objective.dual_clip * A), clipped)


def _kl(objective: Objective, d: Tensor) -> Tensor:
    """Return the KL estimate of each token, from d = log_prob - ref_log_prob."""
    clamped = d.clamp(-objective.kl_input_clamp, objective.kl_input_clamp)
    value = {
        "k1": lambda x: x,
        "k2": lambda x: x.square() / 2,
        "k3": lambda x: torch.expm1(_capped(-x)) + x,
        "abs": torch.abs,
    }[objective.kl_estimator.rstrip("+")](clamped)
    value = value.clamp(-objective.kl_output_clamp, objective.kl_output_clamp)
    if not objective.kl_estimator.endswith("+"):
        return value
    k2 = d.square() / 2
    return value.detach() + (k2 - k2.detach())
