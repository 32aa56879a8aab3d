"""Policy losses of a causal language model of transformers, from its body's hidden states.

The head is never called, so that logits never exist. Written for transformers 5; nothing of it is
imported, and any model with `base_model` and `get_output_embeddings` will do, inside of
DistributedDataParallel, FSDP2 (`fully_shard`) or peft as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from .. import PolicyLoss, log_probs_from_hidden, policy_loss_from_hidden

Result = TypeVar("Result")


class OutputHead(NamedTuple):
    """logits = softcap(scale * (hidden @ weight^T + bias)).

    Attributes:
        weight: (V, H), also where it is tied to the embeddings.
        bias: (V,) or None.
        scale: of the logits, as in Cohere, Granite and Falcon-H1; 1 for most.
        softcap: of the logits, as in Gemma; None for most.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def options(self, temperature: float) -> dict[str, Any]:
        """Of the ops from hidden states. A scale divides the temperature."""
        return {
            "bias": self.bias, "softcap": self.softcap, "temperature": temperature / self.scale
        }  # fmt: skip

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) in fp32.

        A bf16 head would round them, which alone moves a sequence's ratio by as much as GSPO's clip
        range is wide.
        """
        bias = None if self.bias is None else self.bias.float()
        logits = nn.functional.linear(hidden.float(), self.weight.float(), bias) * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def output_head(model: Any) -> OutputHead:
    """The head of a causal language model, wrapped or not.

    Raises:
        ValueError: the model has no head, or one that the ops can't apply.
    """
    model = unwrapped(model)
    last = _last_layer(model)
    config = model.config.get_text_config()
    scale = _scale(config)
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None and scale != 1.0:
        raise ValueError(
            f"{type(model).__name__} has both a scale of its logits and a soft cap: which comes "
            "first is not known here"
        )
    return OutputHead(last.weight, getattr(last, "bias", None), scale, softcap)


def _scale(config: Any) -> float:
    """What the model's forward multiplies its logits by."""

    def value(name: str) -> float:
        return float(getattr(config, name, None) or 1.0)

    # of Cohere; of Falcon-H1; of Muse
    scale = value("logit_scale") * value("lm_head_multiplier") * value("output_multiplier")
    # Granite divides by it, and whoever follows it but for one
    divisor = value("logits_scaling")
    return scale * divisor if config.model_type == "hyperclovax" else scale / divisor


def _last_layer(model: Any) -> Any:
    last = getattr(model, "get_output_embeddings", lambda: None)()
    if last is None or getattr(last, "weight", None) is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: is it a causal model?")
    if hasattr(last, "base_layer"):
        raise ValueError(
            f"the head of {type(model).__name__} has an adapter of peft, {type(last).__name__}, "
            "which would be left out: take it out of target_modules"
        )
    return last


def log_probs_from_model(
    model: Any,
    batch: Mapping[str, Tensor],
    count: int,
    *,
    temperature: float = 1.0,
    **options: Any,
) -> Tensor:
    """Log-probs of each row's last `count` tokens, as `loss_from_model` sees them.

    Args:
        model: a causal language model of transformers, wrapped by peft, DDP or FSDP2 or not.
        batch: arguments of its forward: `input_ids` (B, S), `attention_mask` and so on.
        count: T, tokens at the end of each row: the responses, padded on the right or not.
        temperature: sampling temperature, > 0.
        options: further ones of `log_probs_from_hidden`.

    Returns:
        (B, T) float32.

    Raises:
        ValueError: `batch` or `count` does not fit, or the model's head is unknown.
    """
    return _with_head(
        model,
        lambda: _last_hidden(model, batch, count),
        lambda head, hidden, targets: log_probs_from_hidden(
            hidden, head.weight, targets, **head.options(temperature), **options
        ),
    )


def loss_from_model(
    model: Any,
    batch: Mapping[str, Tensor],
    old_log_probs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor,
    temperature: float = 1.0,
    **options: Any,
) -> PolicyLoss:
    """The policy loss of the last T tokens of each row; see `policy_loss_from_hidden`.

    Args:
        model: a causal language model of transformers, wrapped by peft, DDP or FSDP2 or not.
        batch: arguments of its forward: `input_ids` (B, S), `attention_mask` and so on.
        old_log_probs: (B, T) float32 of the policy that sampled, or None for on-policy.
        advantages: (B,), or (B, T) with an objective that takes one per token.
        mask: (B, T) non-zero at response tokens; T is taken from it.
        temperature: sampling temperature, > 0.
        options: further ones of `policy_loss_from_hidden`: `objective`, `denominator`, ...

    Returns:
        PolicyLoss(loss, stats).

    Raises:
        ValueError: an argument does not fit, or the model's head is unknown.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must have shape (B, T), one per response token, got {got}")
    return _with_head(
        model,
        lambda: _last_hidden(model, batch, mask.shape[1]),
        lambda head, hidden, targets: policy_loss_from_hidden(
            hidden, head.weight, targets, old_log_probs, advantages, mask=mask,
            **head.options(temperature), **options,
        ),
    )  # fmt: skip


def _with_head(
    model: Any, body: Callable[[], tuple[Tensor, ...]], function: Callable[..., Result]
) -> Result:
    """function(head, *body()), where the model's wrappers expect a forward.

    DDP and FSDP2 gather weights and reduce gradients in hooks around `forward`, of the whole model
    and of each part that is wrapped by itself, as a large head may be.
    """
    return as_forward(model, lambda: apply_head(model, function, *body()))


def apply_head(model: Any, function: Callable[..., Result], *operands: Tensor) -> Result:
    """function(head, *operands), within a forward of the model."""
    return as_forward(
        _last_layer(unwrapped(model)), lambda: function(output_head(model), *operands)
    )


def as_forward(module: Any, function: Callable[[], Result]) -> Result:
    """function() as the forward of a module that DDP or FSDP2 wraps, and as it is for another."""
    inner = getattr(module, "module", module)  # of DDP
    is_sharded = hasattr(module, "set_requires_gradient_sync")  # FSDP2, whose class is mixed in
    if inner is module and not is_sharded:
        return function()
    own = vars(inner).get("forward")
    inner.forward = lambda *_, **__: function()
    try:
        return module()
    finally:
        del inner.forward
        if own is not None:
            inner.forward = own


def _last_hidden(model: Any, batch: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, H) that predict the last T tokens, and these."""
    if "input_ids" not in batch:
        raise ValueError(f"batch must have input_ids, got {sorted(batch)}")
    ids = batch["input_ids"]
    if ids.ndim != 2 or not 0 < count < ids.shape[1]:
        raise ValueError(
            f"batch['input_ids'] must have shape (B, S) with S > T={count} response tokens, got "
            f"{tuple(ids.shape)}"
        )
    body = unwrapped(model).base_model
    hidden = body(**{"use_cache": False, **batch}).last_hidden_state
    return hidden[:, -count - 1 : -1], ids[:, -count:]


def unwrapped(model: Any) -> Any:
    """The model of transformers inside of DistributedDataParallel and peft."""
    model = getattr(model, "module", model)  # DistributedDataParallel
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # peft
