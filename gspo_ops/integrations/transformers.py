"""Policy losses of a causal language model of transformers, from the hidden states at its head.

The model runs as it is, in whatever wraps it, but its head makes no logits. Written for
transformers 5, of which nothing is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from .. import PolicyLoss, log_probs_from_hidden, policy_loss_from_hidden
from .heads import OutputHead, hidden_to

Result = TypeVar("Result")


def log_probs_from_model(
    model: Any,
    batch: Mapping[str, Any],
    count: int,
    *,
    temperature: float = 1.0,
    check_model: bool = True,
    **options: Any,
) -> Tensor:
    """Log-probs of each row's last `count` tokens, as `loss_from_model` sees them.

    Args:
        model: a causal language model of transformers, as it is called in training: wrapped by
            peft, torch.compile, DDP, FSDP or DeepSpeed, or not.
        batch: arguments of its forward: `input_ids` (B, S), `attention_mask` and so on.
        count: T, tokens at the end of each row: the responses, padded on the right or not.
        temperature: sampling temperature, > 0.
        check_model: whether the head's logits are compared with the model's own before its first
            use, on at most 8 tokens.
        options: further ones of `log_probs_from_hidden`.

    Returns:
        (B, T) float32.

    Raises:
        ValueError: `batch` or `count` does not fit, or the model's head is unknown.
    """

    def of_head(head: OutputHead, hidden: Tensor, targets: Tensor, _: Any) -> Tensor:
        own = head.options(temperature)
        return log_probs_from_hidden(hidden, head.weight, targets, **own, **options)

    return hidden_to(model, batch, _responses(batch, count, of_head), check_model)


def loss_from_model(
    model: Any,
    batch: Mapping[str, Any],
    old_log_probs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor,
    temperature: float = 1.0,
    router_loss_coef: float = 0.0,
    check_model: bool = True,
    **options: Any,
) -> PolicyLoss:
    """The policy loss of the last T tokens of each row; see `policy_loss_from_hidden`.

    Args:
        model: a causal language model of transformers, as it is called in training: wrapped by
            peft, torch.compile, DDP, FSDP or DeepSpeed, or not.
        batch: arguments of its forward: `input_ids` (B, S), `attention_mask` and so on.
        old_log_probs: (B, T) float32 of the policy that sampled, or None for on-policy.
        advantages: (B,), or (B, T) with an objective that takes one per token.
        mask: (B, T) non-zero at response tokens; T is taken from it.
        temperature: sampling temperature, > 0.
        router_loss_coef: of the load-balancing loss of a mixture of experts, `aux_loss` in its
            output, which is added; reported as `router_loss`.
        check_model: whether the head's logits are compared with the model's own before its first
            use, on at most 8 tokens.
        options: further ones of `policy_loss_from_hidden`: `objective`, `denominator`, ...

    Returns:
        PolicyLoss(loss, stats).

    Raises:
        ValueError: an argument does not fit, or the model's head is unknown.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must have shape (B, T), one per response token, got {got}")

    def of_head(head: OutputHead, hidden: Tensor, targets: Tensor, output: Any) -> PolicyLoss:
        found = policy_loss_from_hidden(
            hidden, head.weight, targets, old_log_probs, advantages, mask=mask,
            **head.options(temperature), **options,
        )  # fmt: skip
        return _with_router_loss(found, output, router_loss_coef) if router_loss_coef else found

    if router_loss_coef:
        batch = {**batch, "output_router_logits": True}
    return hidden_to(model, batch, _responses(batch, mask.shape[1], of_head), check_model)


def _with_router_loss(found: PolicyLoss, output: Any, coef: float) -> PolicyLoss:
    router_loss = getattr(output, "aux_loss", None)
    if not isinstance(router_loss, Tensor):
        raise ValueError("router_loss_coef must be 0 for a model whose output has no aux_loss")
    stats = found.stats | {"router_loss": router_loss.detach()}
    return PolicyLoss(found.loss + coef * router_loss.to(found.loss), stats)


def _responses(
    batch: Mapping[str, Any], count: int, function: Callable[..., Result]
) -> Callable[[OutputHead, Tensor, Any], Result]:
    """function(head, hidden, targets, output) of each row's last tokens."""
    if "input_ids" not in batch:
        raise ValueError(f"batch must have input_ids, got {sorted(batch)}")
    if "labels" in batch:
        raise ValueError("batch must have no labels: the model makes no logits for its own loss")
    ids = batch["input_ids"]
    if ids.ndim != 2 or not 0 < count < ids.shape[1]:
        raise ValueError(
            f"batch['input_ids'] must have shape (B, S) with S > T={count} response tokens, got "
            f"{tuple(ids.shape)}"
        )

    def of_hidden(head: OutputHead, hidden: Tensor, output: Any) -> Result:
        return function(head, hidden[:, -count - 1 : -1], ids[:, -count:], output)

    return of_hidden
