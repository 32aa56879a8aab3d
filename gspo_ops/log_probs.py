"""Log-probs of target tokens, from logits or from hidden states: the public functions.

Each checks its arguments once and applies the autograd.Function `LogProbs` to a source, from
`logits.py` or `hidden.py`.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from .autograd import LogProbs
from .constants import IGNORED
from .head import (
    Head,
    HeadOptions,
    LoRA,
    Products,
    check_head,
    local_head,
    resolve_products,
)
from .hidden import HiddenSource, vocabulary_of_head
from .logits import LogitsSource, check_logits, vocabulary_of_logits
from .parallel import ProcessGroup, SharedChecks, agree_on_targets, vocab_part
from .plan import PlanName, check_plan, choose_plan
from .softmax import TargetRows, checked_softmax


@overload
def log_probs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_group: ProcessGroup | None = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...
@overload
def log_probs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    softcap: float | None = ...,
    vocab_group: ProcessGroup | None = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def log_probs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_group: ProcessGroup | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each row's target.

        log_prob[t] = log_softmax(softcap(logits[t]) / temperature)[targets[t]]
        entropy[t]  = -sum_v p[t, v] * log p[t, v],    softcap(x) = softcap * tanh(x / softcap)

    Logits are read once and never copied. The backward reads them once and writes dlogits once.
    Rows whose incoming gradient is zero are not read at all.

    Args:
        logits: (B, T, V) or (N, V), float16, bfloat16, float32 or float64; any strides, as long as
            the vocabulary is contiguous.
        targets: (B, T) or (N,) int32 or int64: the token that each row predicts (already shifted);
            -100 marks a row to leave out: its results and its gradient are 0.
        temperature: sampling temperature, > 0.
        softcap: soft cap of the logits, > 0, as in Gemma; None for none.
        vocab_group: ranks over which the vocabulary is sharded. Each passes the same targets and
            its own shard of the logits, of any size, in the order of the ranks, or a DTensor. The
            results are the same on all ranks, which exchange 3 numbers per row (4 with the entropy)
            in the forward and nothing in the backward.
        return_entropy: also return the entropy in nats, differentiable.

    Returns:
        log_probs with the shape of `targets`, float32 (float64 for float64 logits); with
        `return_entropy` the pair (log_probs, entropy).

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        IndexError: a target outside [0, V), on a CPU. On a GPU its log_prob is NaN.
    """
    with SharedChecks(logits, targets, vocab_group=vocab_group):
        logits = vocab_part("logits", logits, -1, vocab_group)
        check_logits(logits, targets)
        softmax = checked_softmax(temperature, softcap, vocab_group, return_entropy)
    mask = targets != IGNORED
    if softmax.vocab_group is not None:
        targets = agree_on_targets(targets, mask, vocabulary_of_logits(logits, softmax))
    log_probs, entropy = LogProbs.apply(
        LogitsSource(softmax), TargetRows(targets, mask), return_entropy, logits
    )
    return (log_probs, entropy) if return_entropy else log_probs


@overload
def log_probs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    lora: LoRA | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    plan: PlanName = ...,
    memory_budget: int | None = ...,
    products: Products = ...,
    allow_sync: bool = ...,
    main_grad: Tensor | None = ...,
    vocab_group: ProcessGroup | None = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...
@overload
def log_probs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    lora: LoRA | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    plan: PlanName = ...,
    memory_budget: int | None = ...,
    products: Products = ...,
    allow_sync: bool = ...,
    main_grad: Tensor | None = ...,
    vocab_group: ProcessGroup | None = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def log_probs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    plan: PlanName = "auto",
    memory_budget: int | None = None,
    products: Products = "auto",
    allow_sync: bool = False,
    main_grad: Tensor | None = None,
    vocab_group: ProcessGroup | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each row's target, from hidden states and the output head.

        z[t]        = softcap(hidden[t] @ weight^T + bias) / temperature
        log_prob[t] = log_softmax(z[t])[targets[t]]
        entropy[t]  = -sum_v p[t, v] * log p[t, v],    softcap(x) = softcap * tanh(x / softcap)

    Logits are never rounded below fp32 and never stored as a whole. The backward skips rows whose
    incoming gradient is zero, and computes only the gradients that are needed. Like the results of
    matrix products, those of a row may change in the last bits with the number of rows, except with
    `products="triton"`.

    Args:
        hidden: (B, T, H) or (N, H), float16, bfloat16, float32 or float64.
        weight: (V, H) of the head, in any of these dtypes.
        targets: (B, T) or (N,) int32 or int64: the token that each row predicts (already shifted);
            -100 marks a row to leave out: its results and its gradient are 0.
        bias: (V,) of the head; None for none.
        lora: a low-rank update of the head, which gets gradients of its own. The weight must not
            require grad.
        temperature: sampling temperature, > 0.
        softcap: soft cap of the logits, > 0, as in Gemma; None for none.
        plan: what stays in memory for the backward: with `"keep"` the exponentials of all logits,
            with `"recompute"` nothing, with `"auto"` as much as fits into the budget.
            `plan_from_hidden` says what each costs.
        memory_budget: bytes for these exponentials; by default 2.1 per logit (eager PyTorch takes 8
            to 14), between 64 MiB and 4 GiB.
        products: on a GPU, `"mm"` multiplies with `torch.mm`, which computes dead rows as well
            unless `allow_sync`. `"triton"` multiplies with kernels that skip them, and whose result
            for a row does not depend on the other rows. `"auto"` takes what `make gpu` has found to
            be faster on this device, `"triton"` if it has not run there, and `"mm"` with lora.
        allow_sync: let `"mm"` look at which rows are live and skip the others, with one host
            synchronisation in the forward and one in the backward.
        main_grad: (V, H) float32 buffer to which d loss / d weight is added; `weight.grad` is then
            left unchanged.
        vocab_group: ranks over which the vocabulary is sharded. Each passes the same hidden states
            and targets, and its own rows of weight, bias and lora.b, any number of them, in the
            order of the ranks, or a DTensor with Shard(0). The ranks exchange 4 numbers per row (5
            with the entropy) in the forward, and dhidden in float32 in the backward. The results
            are the same on all ranks; dweight is that of each rank's rows.
        return_entropy: also return the entropy in nats, differentiable (the backward then always
            recomputes logits).

    Returns:
        log_probs with the shape of `targets`, float32 (float64 if an input is); with
        `return_entropy` the pair (log_probs, entropy).

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        IndexError: a target outside [0, V), on a CPU. On a GPU its log_prob is NaN.
    """
    with SharedChecks(hidden, weight, targets, vocab_group=vocab_group):
        hidden, weight, bias, lora = local_head(hidden, weight, bias, lora, vocab_group)
        check_head(hidden, weight, targets, bias, lora, main_grad)
        softmax = checked_softmax(temperature, softcap, vocab_group, return_entropy)
        check_plan(plan, memory_budget, products, allow_sync, lora)
        if plan == "chunk":
            raise ValueError(
                "plan='chunk' needs a loss whose gradient it can compute in the forward, as in "
                "policy_loss_from_hidden: here plan must be 'auto', 'keep' or 'recompute'"
            )
        mask = targets != IGNORED
        head = Head.of(hidden, weight, bias, lora)
        choice = choose_plan(
            hidden, weight, "recompute" if return_entropy else plan, memory_budget,
            has_gradient=head.has_gradient(), can_chunk=False,
        )  # fmt: skip
        multiplier = resolve_products(products, head)
        scale = 1.0 if lora is None else lora.scale
        options = HeadOptions(softmax, multiplier, allow_sync, scale, choice.kept_columns)
    if softmax.vocab_group is not None:
        targets = agree_on_targets(targets, mask, vocabulary_of_head(head, options, choice))
    source = HiddenSource(options, main_grad)
    log_probs, entropy = LogProbs.apply(source, TargetRows(targets, mask), return_entropy, *head)
    return (log_probs, entropy) if return_entropy else log_probs
