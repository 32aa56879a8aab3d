"""Policy losses of a causal language model of transformers, from the hidden states at its head.

The model runs unchanged, inside its wrappers, except that its head makes no logits, and that it
runs only for the sequences that can have a gradient. This module is for transformers 5, which it
does not import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .. import (
    GSPO,
    Objective,
    PolicyLoss,
    global_denominator,
    log_probs_from_hidden,
    policy_loss_from_hidden,
)
from ..checks import check_choice, check_tensor
from .batches import Batch, Part, fractions_of_all, require_separate
from .checkpointing import live_checkpointing
from .heads import OutputHead, hidden_to

__all__ = ["Skip", "live_checkpointing", "log_probs_from_model", "loss_from_model"]

Skip = Literal["auto", "dead", "none"]
"""Which sequences without a gradient the model skips: see `skip` of `loss_from_model`."""


def log_probs_from_model(
    model: Any,
    batch: Mapping[str, Any],
    count: int | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    needed: Tensor | None = None,
    temperature: float = 1.0,
    return_router_loss: bool = False,
    check_model: bool = True,
    **options: Any,
) -> Any:
    """Log-probs of each row's last `count` tokens, as `loss_from_model` sees them.

    Args:
        model: a causal language model of transformers, as it is called in training, possibly
            wrapped by peft, torch.compile, DDP, FSDP or DeepSpeed.
        batch: arguments of its forward: `input_ids` (B, S), `attention_mask` and so on.
        count: T, the number of tokens at the end of each row that are responses, padded on the
            right or not.
        cu_seqlens: (B + 1,) in place of `count`, if sequences are packed in one row: the first
            token of each, followed by S. `batch` then contains `position_ids` that restart.
        needed: (B,) bool, the sequences for which the model runs; None for all. It takes one host
            synchronisation. For a loss, pass the sequences with an advantage.
        temperature: sampling temperature, > 0.
        return_router_loss: also return the load-balancing loss of a mixture of experts, 0-dim, of
            the sequences for which the model runs.
        check_model: before the model's first use, compare the head's logits with the model's own on
            at most 8 tokens, and check that packed sequences do not see each other.
        **options: further options of `log_probs_from_hidden`.

    Returns:
        (B, T) float32, or (S,) with 0 at first tokens if packed; NaN where not needed. With
        `return_entropy`, the entropies follow, and with `return_router_loss`, that loss comes last.

    Raises:
        ValueError: `batch` or `count` is invalid, an argument of the model cannot be split into
            sequences, or the model's head is unknown.
    """
    whole = Batch.of(batch, count, cu_seqlens)
    if check_model:
        require_separate(model, whole)
    if return_router_loss:
        whole.arguments["output_router_logits"] = True
    part = None if needed is None else _needed(whole, needed)
    run = whole if part is None else part.batch

    def of_head(head: OutputHead, hidden: Tensor, output: Any) -> Any:
        own = head.options(temperature)
        found = log_probs_from_hidden(
            run.hidden(hidden), head.weight, run.targets(), **own, **options
        )
        parts = [*map(whole_of, found if isinstance(found, tuple) else (found,))]
        if return_router_loss:
            parts.append(_router_loss(output, "return_router_loss must be False"))
        return tuple(parts) if len(parts) > 1 else parts[0]

    def whole_of(x: Tensor) -> Tensor:
        by_token = run.of_tokens(x)
        return by_token if part is None else part.by_token(by_token)

    return hidden_to(model, run.arguments, of_head, check_model)


def _needed(whole: Batch, needed: Tensor) -> Part:
    check_tensor("needed", needed, whole.ids.device)
    if needed.dtype != torch.bool:
        raise TypeError(f"needed must be bool, as in advantages != 0, got {needed.dtype}")
    if needed.shape != (whole.number,):
        raise ValueError(
            f"needed must have shape {(whole.number,)}, one per sequence, got {tuple(needed.shape)}"
        )
    _require_cuttable("needed", whole)
    return whole.some(needed)


def loss_from_model(
    model: Any,
    batch: Mapping[str, Any],
    old_log_probs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    router_loss_coef: float = 0.0,
    skip: Skip = "auto",
    check_model: bool = True,
    **options: Any,
) -> PolicyLoss:
    """The policy loss of the last T tokens of each row; see `policy_loss_from_hidden`.

    The model runs, forward and backward, only for the sequences that can have a gradient: those
    with a token whose advantage, times its rollout weight, is not zero. With a KL term, an entropy
    bonus, a router loss, a function as objective or a context_group, all sequences can have one.
    Loss and gradients are those of all sequences, whose number or tokens still divide the loss.

    Args:
        model: a causal language model of transformers, as it is called in training, possibly
            wrapped by peft, torch.compile, DDP, FSDP or DeepSpeed.
        batch: arguments of its forward: `input_ids` (B, S), `attention_mask` and so on.
        old_log_probs: (B, T) float32 of the policy that sampled, or None for on-policy; arbitrary
            where a sequence is left out.
        advantages: (B,), or (B, T) with an objective that takes one per token.
        mask: (B, T), 1 at response tokens and 0 elsewhere; its width is T.
        cu_seqlens: (B + 1,) if sequences are packed in one row: the first token of each, followed
            by S. `mask` and other arguments per token then have the shape (S,), with the value at
            the token itself. They are not read at the first token of a sequence, where the mask is
            0. `batch` contains `position_ids` that restart.
        temperature: sampling temperature, > 0.
        router_loss_coef: weight of the load-balancing loss of a mixture of experts, `aux_loss` in
            the model's output, which is added to the loss and reported as `router_loss`.
        skip: `"auto"` leaves sequences without a gradient out if the arguments of the model can be
            split into sequences, which text can and images cannot. `"dead"` refuses arguments that
            cannot. `"none"` runs all sequences, without the one host synchronisation and with a
            shape that does not change from batch to batch.
        check_model: before the model's first use, compare the head's logits with the model's own on
            at most 8 tokens, and check that packed sequences do not see each other.
        **options: further options of `policy_loss_from_hidden`: `objective`, `denominator`, ...

    Returns:
        PolicyLoss(loss, stats). The statistics include `computed` (B,) bool, the sequences for
        which the model ran. Fractions (`clip_frac_...`, `active_token_frac`) describe all
        sequences. The other statistics describe the computed ones, and `log_ratio` and `log_probs`
        are NaN elsewhere.

    Raises:
        ValueError: an argument is invalid, or the model's head is unknown.
    """
    if not isinstance(mask, Tensor) or mask.ndim != (2 if cu_seqlens is None else 1):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        shape = "(B, T)" if cu_seqlens is None else "(S,)"
        raise ValueError(f"mask must have shape {shape}, one per response token, got {got}")
    check_choice("skip", skip, ("auto", "dead", "none"))
    check_tensor("advantages", advantages, mask.device)
    whole = Batch.of(batch, mask.shape[1] if cu_seqlens is None else None, cu_seqlens)
    if cu_seqlens is None and len(mask) != whole.number:
        raise ValueError(
            f"mask must have a row for each of the {whole.number} in batch['input_ids'], got "
            f"{len(mask)}"
        )
    if check_model:
        require_separate(model, whole)
    if router_loss_coef:
        whole.arguments["output_router_logits"] = True
    given: dict[str, Any] = {
        "mask": mask, "old_log_probs": old_log_probs, "advantages": advantages,
        "ref_log_probs": options.pop("ref_log_probs", None),
        "rollout_weights": options.pop("rollout_weights", None),
    }  # fmt: skip
    part = None
    if not router_loss_coef and _is_skipped(skip, whole, given, options):
        part = whole.some(_can_have_gradient(whole, given))
    run = whole if part is None else part.batch
    if part is not None:
        if options.get("denominator") is None:
            options["denominator"] = _denominator(whole, mask, options)
        given = _of_part(part, given)

    def of_head(head: OutputHead, hidden: Tensor, output: Any) -> PolicyLoss:
        rows: dict[str, Any] = {
            name: None if x is None else run.of_rows(x) for name, x in given.items()
        }
        found = policy_loss_from_hidden(
            run.hidden(hidden), head.weight, run.targets(), cu_seqlens=run.cu_seqlens,
            **rows, **head.options(temperature), **options,
        )  # fmt: skip
        return _with_router_loss(found, output, router_loss_coef) if router_loss_coef else found

    loss, stats = hidden_to(model, run.arguments, of_head, check_model)
    return PolicyLoss(loss, _stats_of_all(stats, whole, part, mask))


def _require_cuttable(option: str, whole: Batch) -> None:
    if name := whole.obstacle():
        raise ValueError(
            f"batch['{name}'] cannot be split into sequences, as {option} requires: it is unknown "
            "which part of it belongs to which sequence"
        )


def _is_skipped(
    skip: Skip, whole: Batch, given: Mapping[str, Any], options: Mapping[str, Any]
) -> bool:
    """Return whether a sequence without an advantage has no gradient, and can be left out."""
    objective = options.get("objective", GSPO())
    if skip == "none" or not isinstance(objective, Objective) or not objective.needs_advantage():
        return False
    if options.get("context_group") is not None:  # other ranks have tokens of the sequence
        return False
    if skip == "dead":
        _require_cuttable("skip='dead'", whole)
    # the op refuses other shapes
    shapes = {tuple(x.shape) for x in given.values() if isinstance(x, Tensor)}
    mask = given["mask"]
    fitting = {(whole.number,), tuple(mask.shape), (1, *mask.shape)}
    return shapes <= fitting and whole.obstacle() is None


def _can_have_gradient(whole: Batch, given: Mapping[str, Any]) -> Tensor:
    """Return (B,) bool: whether a token that counts has an advantage and a weight."""
    mask, advantages = given["mask"], given["advantages"]
    factor = whole.by_token(advantages.detach())
    if (weights := given["rollout_weights"]) is not None:
        factor = factor * whole.by_token(weights)  # 0 * inf is NaN, which is not 0
    return whole.sequences_with((factor != 0) & (mask != 0))


def _denominator(whole: Batch, mask: Tensor, options: Mapping[str, Any]) -> Tensor:
    objective = options.get("objective", GSPO())
    batch = {"mask": mask} | ({} if whole.width else {"cu_seqlens": whole.cu_seqlens})
    return global_denominator([batch], objective=objective)


def _of_part(part: Part, given: Mapping[str, Any]) -> dict[str, Any]:
    if not part.is_stand_in:
        return {name: None if x is None else part.take(x) for name, x in given.items()}
    nothing = given["advantages"].new_zeros(1)
    found = {"mask": nothing[:, None], "old_log_probs": None, "advantages": nothing}
    if given["ref_log_probs"] is not None:  # statistics have the same names on every rank
        found["ref_log_probs"] = nothing[:, None].float()
    return found


def _stats_of_all(
    stats: dict[str, Tensor], whole: Batch, part: Part | None, mask: Tensor
) -> dict[str, Tensor]:
    """Convert fractions to those of all sequences, and add which of them were computed."""
    if "log_probs" in stats:
        by_token = (whole if part is None else part.batch).of_tokens(stats["log_probs"])
        by_token = by_token if part is None else part.by_token(by_token)
        stats = stats | {"log_probs": by_token}
    computed = torch.ones(whole.number, dtype=torch.bool, device=mask.device)
    if part is None:
        return stats | {"computed": computed}
    computed = torch.zeros_like(computed).index_fill(0, part.sequences, True)
    is_token = mask != 0
    is_computed = whole.by_token(computed) & is_token
    sequences = [whole.sequences_with(x).sum() for x in (is_computed, is_token)]
    found = stats | {"log_ratio": part.by_sequence(stats["log_ratio"]), "computed": computed}
    return fractions_of_all(found, sequences, [is_computed.sum(), is_token.sum()])


def _router_loss(output: Any, otherwise: str) -> Tensor:
    router_loss = getattr(output, "aux_loss", None)
    if not isinstance(router_loss, Tensor):
        raise ValueError(f"{otherwise} for a model whose output has no aux_loss")
    return router_loss


def _with_router_loss(found: PolicyLoss, output: Any, coef: float) -> PolicyLoss:
    router_loss = _router_loss(output, "router_loss_coef must be 0")
    stats = found.stats | {"router_loss": router_loss.detach()}
    return PolicyLoss(found.loss + coef * router_loss.to(found.loss), stats)
