"""Fused policy losses for verl, a backend of its fused forward, and shorter updates.

This module is for verl 0.9; `register()` makes the losses and the backend known. When verl calls a
policy loss, it has gathered the log-probs already, and `verl_losses.py` fuses the rest. The fused
forward computes the log-probs, from hidden states and the head, without logits.
`skip_zero_advantages()` leaves sequences without a gradient out of both and of the body.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from .. import log_probs_from_hidden
from .heads import OutputHead, hidden_to, last_layer, unwrapped
from .verl_losses import NAME, policy_loss, register_losses, require_verl
from .verl_skip import skip_zero_advantages

__all__ = ["NAME", "fuse_forward", "policy_loss", "register", "skip_zero_advantages"]

_KEPT = ("past_key_values", "hidden_states", "attentions")  # kept from the model's output


def register() -> str:
    """Make the policy losses and the fused forward known to verl.

    The losses go into verl's registry: `"gspo_ops"`, which is GSPO, and for each loss in the
    registry, those of users included, one with the prefix `gspo_ops_`. verl has no registry for
    backends of the fused forward, so its `patch_forward_with_backends` is replaced by a function
    that also knows this backend and leaves all others to verl.

    Returns:
        `"gspo_ops"`, for `actor_rollout_ref.actor.policy_loss.loss_mode` and
        `actor_rollout_ref.model.fused_kernel_options.impl_backend`.

    Raises:
        ImportError: verl is not installed, or is not verl 0.9.
    """
    require_verl()
    from verl.models.transformers import monkey_patch

    register_losses()
    theirs = monkey_patch.patch_forward_with_backends
    if theirs.__module__ != __name__:
        monkey_patch.patch_forward_with_backends = _with_our_backend(theirs)
    return NAME


def fuse_forward(model: Any, *, check_model: bool = True) -> None:
    """Give a causal language model the forward that verl expects of fused kernels.

        z[t]         = logits of hidden[t] / temperature
        log_probs[t] = log_softmax(z[t])[shift_labels[t]]
        entropy[t]   = -sum_v p[t, v] * log p[t, v]

    The body runs, and the head is never called. `model(input_ids, temperature=...,
    shift_labels=...)` returns verl's output class with `log_probs` and `entropy`, both
    differentiable, in float32 and in the shape (1, N) or (B, S) of `input_ids`. Without
    `shift_labels`, each row predicts the next token of `labels` or `input_ids`. verl calls this
    function if `impl_backend` is `"gspo_ops"`.

    Args:
        model: a causal language model of transformers, whose `forward` is replaced on the instance.
            It may see images and have adapters of peft.
        check_model: whether the head's logits are compared with the model's own at its first use.

    Raises:
        ImportError: verl is not installed, or is not verl 0.9.
        ValueError: the model's head is unknown.
    """
    require_verl()
    model = unwrapped(model)
    last_layer(model)  # refuses a model without a head
    if getattr(model.forward, "func", None) is not _forward:  # replace it only once
        model.forward = partial(_forward, model, model.forward, check_model)


def _with_our_backend(theirs: Callable[..., None]) -> Callable[..., None]:
    """Extend verl's patch_forward_with_backends by this backend."""

    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        if use_fused_kernels and fused_kernels_backend == NAME:
            fuse_forward(model)
        else:
            theirs(model, use_fused_kernels, fused_kernels_backend)

    return patch_forward_with_backends


def _forward(
    model: Any,
    own: Callable[..., Any],
    check_model: bool,
    input_ids: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    temperature: float = 1.0,
    **arguments: Any,
) -> Any:
    from verl.models.transformers.dense_common import CausalLMOutputForPPO

    if shift_labels is None:  # verl gives them if tokens are packed, or split over ranks
        tokens = input_ids if labels is None else labels
        if tokens is None:
            raise ValueError("one of input_ids, labels and shift_labels must be given")
        shift_labels = tokens.roll(-1, dims=-1)

    def at_head(head: OutputHead, hidden: Tensor, output: Any) -> Any:
        log_probs, entropy = log_probs_from_hidden(
            hidden, head.weight, shift_labels, **head.options(temperature), return_entropy=True
        )
        kept = {name: output.get(name) for name in _KEPT}
        return CausalLMOutputForPPO(log_probs=log_probs, entropy=entropy, **kept)

    batch = {"input_ids": input_ids} | arguments | {"return_dict": True}
    return hidden_to(model, batch, at_head, check_model, within=own)
