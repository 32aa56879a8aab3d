"""Log-probabilities from hidden states and the output head, without N x V logits.

Checks, operators and the autograd.Function. The loops over tiles stand in `logit_tiles.py`; the
Triton kernels, and the derivation that all paths share, in `kernels/linear_log_probs.py`.

Logits exist one tile at a time, in fp32. What the forward keeps of a row is the target's logit, a
`shift` (0 but for very unlikely targets), and the sum of the others' exponentials relative to both;
that is also what a split vocabulary has to exchange. What it may keep of a logit is its
exponential, so that the backward is two products: dhidden = diag(s) P weight and
dweight = P^T diag(s) hidden, with a factor s per row that is known only then.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from .backend import compute_dtype, exact_matmul, operator, refuse_graph, use_triton
from .head import (
    Choice,
    LoRA,
    PlanName,
    Products,
    Wanted,
    check_head,
    check_plan,
    choose_plan,
    grad_product_dtype,
    kept_width,
    product_dtype,
)
from .layout import IGNORED
from .log_probs import agreed_targets, check_softmax_options
from .logit_tiles import Head, HeadGrads, Kept, Options, RowStats, backward, forward
from .parallel import ProcessGroup, SharedChecks, group_name, replicated, vocab_part


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

    Logits are never rounded below fp32 and never stand in memory as a whole. Rows whose incoming
    gradient is zero are left out of the backward, and gradients that nobody asked for are not
    computed. Results of a row may change in the last bits with the number of rows, as those of
    matrix products do, except with `products="triton"`.

    Args:
        hidden: (B, T, H) or (N, H), float16, bfloat16, float32 or float64.
        weight: (V, H) of the head, of any of these dtypes.
        targets: (B, T) or (N,) int32 or int64: the token that each row predicts (already shifted);
            -100 marks a row that is left out: its results and its gradient are 0.
        bias: (V,) of the head; None for none.
        lora: a low-rank update of the head. It gets its own gradients; give a weight that does not
            require grad.
        temperature: sampling temperature, > 0.
        softcap: soft cap of the logits, > 0, as in Gemma; None for none.
        plan: what stays in memory for the backward: `"keep"` the exponentials of all logits,
            `"recompute"` nothing, `"auto"` as much as fits into the budget.
            `plan_from_hidden` tells what each costs.
        memory_budget: bytes for it; by default 2.1 per logit, where eager PyTorch takes 8 to 14,
            between 64 MiB and 4 GiB.
        products: on a GPU, `"mm"` multiplies with `torch.mm`, which computes dead rows as well
            unless `allow_sync`; `"triton"` with kernels that leave them out, and whose result for a
            row does not depend on the others; `"auto"` is `"mm"`.
        allow_sync: let `"mm"` look at which rows are live, one host synchronisation in the forward
            and one in the backward, and leave the others out.
        main_grad: (V, H) float32 buffer that d loss / d weight is added to; `weight.grad` then
            stays as it is.
        vocab_group: ranks that share the vocabulary: each passes the same hidden states and
            targets, and its own rows of weight, bias and lora.b, any number of them, in the order
            of the ranks, or a DTensor with Shard(0). Exchanged are 3 numbers per row (4 with the
            entropy) in the forward, and dhidden in the backward, in float32. The results are the
            same on all ranks, dweight is that of each rank's rows.
        return_entropy: also return the entropy in nats, differentiable (the backward then always
            recomputes logits).

    Returns:
        log_probs with the shape of `targets`, float32 (float64 if an input is); with
        `return_entropy` the pair (log_probs, entropy).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        IndexError: a target outside [0, V), on CPU. On GPU its log_prob is NaN.
    """
    with SharedChecks(hidden, weight, targets, vocab_group=vocab_group):
        hidden, weight, bias, lora = local_head(hidden, weight, bias, lora, vocab_group)
        check_head(hidden, weight, targets, bias, lora, main_grad)
        check_softmax_options(temperature, softcap, return_entropy)
        check_plan(plan, memory_budget, products, allow_sync, lora)
        if plan == "chunk":
            raise ValueError(
                "plan='chunk' needs a loss whose gradient it can make in the forward: "
                "policy_loss_from_hidden; here plan must be 'auto', 'keep' or 'recompute'"
            )
        ranks = group_name("vocab_group", vocab_group)
        mask = targets != IGNORED
        head = make_head(hidden, weight, bias, lora, mask)
        choice = choose_plan(
            hidden, weight, plan="recompute" if return_entropy else plan,
            memory_budget=memory_budget, has_gradient=has_gradient(head), can_chunk=False,
        )  # fmt: skip
        options = Options(
            temperature, softcap, return_entropy, resolve_products(products, hidden), allow_sync,
            ranks,
        )  # fmt: skip
    if ranks is not None:
        facts = facts_of_head(head, options, choice)
        targets = agreed_targets(
            targets, mask, weight.shape[0], options.products == "torch", facts, ranks
        )
    log_probs, entropy = LinearLogProbs.apply(
        *head, main_grad, targets, mask, choice.kept_columns, *options
    )
    return (log_probs, entropy) if return_entropy else log_probs


def local_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor | None, LoRA | None]:
    """The operands as this rank holds them."""
    weight = vocab_part("weight", weight, 0, group)
    if bias is not None:
        bias = vocab_part("bias", bias, 0, group)
    if isinstance(lora, LoRA):
        lora = lora._replace(
            a=replicated("lora.a", lora.a), b=vocab_part("lora.b", lora.b, 0, group)
        )
    return replicated("hidden", hidden), weight, bias, lora


def facts_of_head(head: Head, options: Options, choice: Choice) -> dict[str, int]:
    """What ranks that share a vocabulary must have in common, to exchange the same."""
    hidden, weight, _, lora_x, lora_b = head
    wants_grad = torch.is_grad_enabled()
    return {
        "the number of rows of hidden": math.prod(hidden.shape[:-1]),
        "the last dimension of hidden": hidden.shape[-1],
        "the rank of lora": 0 if lora_b is None else lora_b.shape[1],
        "the precision of log-probs, in bytes,": _stats_dtype(hidden, weight).itemsize,
        "return_entropy": int(options.return_entropy),
        "products": ("torch", "mm", "triton").index(options.products),
        "allow_sync": int(options.allow_sync),
        "whether plan is 'chunk'": int(choice.name == "chunk"),
        "whether hidden requires grad": int(wants_grad and hidden.requires_grad),
        "whether lora.a requires grad": int(
            wants_grad and lora_x is not None and lora_x.requires_grad
        ),
    }


def make_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    mask: Tensor | None,
) -> Head:
    """The operands; with LoRA, hidden @ a^T is a node of its own."""
    if lora is None:
        return Head(hidden, weight, bias, None, None)
    clean = hidden if mask is None else torch.where((mask != 0).unsqueeze(-1), hidden, 0.0)
    dtype = compute_dtype(product_dtype(hidden, weight))
    x = _ExactProduct.apply(clean.reshape(-1, hidden.shape[-1]), lora.a).to(dtype) * lora.scale
    return Head(hidden, weight, bias, x, lora.b)


class _ExactProduct(torch.autograd.Function):
    """x @ a^T, forwards and backwards in fp32, whatever the process allows."""

    @staticmethod
    def forward(ctx, x, a):  # type: ignore[override]
        ctx.save_for_backward(x, a)
        return exact_matmul(x, a.mT)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, a = ctx.saved_tensors
        needs_x, needs_a = ctx.needs_input_grad
        return (
            exact_matmul(grad, a).to(x.dtype) if needs_x else None,
            exact_matmul(grad.mT, x).to(a.dtype) if needs_a else None,
        )


def has_gradient(head: Head) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head)


def resolve_products(products: Products, hidden: Tensor) -> str:
    """`torch`, `mm` or `triton`: who multiplies."""
    if not use_triton(hidden):
        return "torch"
    # which is faster is to be decided by a measurement on each device
    return "mm" if products == "auto" else products


class LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, hidden, weight, bias, lora_x, lora_b, main_grad, targets, mask, kept_columns, *options
    ):
        head = Head(hidden, weight, bias, lora_x, lora_b)
        log_probs, *saved = linear_log_probs_fwd(*head, targets, mask, None, kept_columns, *options)
        ctx.save_for_backward(*head, targets, mask, *saved)
        ctx.main_grad, ctx.kept_columns, ctx.options = main_grad, kept_columns, options
        entropy = saved[3]
        if not Options(*options).return_entropy:
            ctx.mark_non_differentiable(entropy)
            return log_probs.view(targets.shape), entropy
        return log_probs.view(targets.shape), entropy.view(targets.shape)

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy):  # type: ignore[override]
        grads = head_gradients(
            ctx.needs_input_grad, ctx.main_grad, *ctx.saved_tensors, ctx.kept_columns,
            grad_log_probs, grad_entropy if Options(*ctx.options).return_entropy else None,
            None, None, *ctx.options,
        )  # fmt: skip
        return (*grads, *(None for _ in range(10)))


def head_gradients(needs_input_grad, main_grad: Tensor | None, *arguments) -> list[Tensor | None]:
    """Gradients of the five operands, None where not asked for or added to main_grad."""
    wanted = Wanted(*needs_input_grad[:5])
    if main_grad is None or not wanted.weight:
        grads = linear_log_probs_bwd(*arguments, *wanted)
    else:
        refuse_graph()
        grads = linear_log_probs_bwd_into(main_grad, *arguments, *wanted)
        wanted = wanted._replace(weight=False)
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]


# Operators


def _stats_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return compute_dtype(product_dtype(hidden, weight))


def _fwd_fake(
    hidden, weight, bias, lora_x, lora_b, targets, mask, grad_mask, kept_columns,
    *options,
):  # fmt: skip
    rows = targets.new_empty(targets.numel(), dtype=_stats_dtype(hidden, weight))
    entropy = torch.empty_like(rows) if Options(*options).return_entropy else rows.new_empty(0)
    stats = (rows, *(torch.empty_like(rows) for _ in range(3)), entropy)
    return (*stats, empty_kept(hidden, weight, targets.numel(), kept_columns))


def empty_kept(hidden: Tensor, weight: Tensor, rows: int, kept_columns: int) -> Tensor:
    """Room for exponentials of so many rows and columns; none without columns."""
    if kept_columns == 0:
        rows = 0
    dtype = grad_product_dtype(hidden, weight)
    return hidden.new_empty(rows, kept_width(kept_columns), dtype=dtype)


HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_x, Tensor? lora_b"
OPTIONS = (
    "float temperature, float? softcap, bool return_entropy, str products, bool allow_sync, "
    "str? vocab_group"
)


@operator(
    f"linear_log_probs_fwd({HEAD}, Tensor targets, Tensor? mask, Tensor? grad_mask, "
    f"SymInt kept_columns, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
def linear_log_probs_fwd(
    hidden, weight, bias, lora_x, lora_b, targets, mask, grad_mask, kept_columns, *options,
):  # fmt: skip
    """RowStats of the rows where mask is non-zero, and their exponentials where grad_mask is."""
    kept = empty_kept(hidden, weight, targets.numel(), kept_columns)
    log_probs, stats = forward(
        Head(hidden, weight, bias, lora_x, lora_b), targets, mask, grad_mask,
        Options(*options), Kept(kept, kept_columns),
    )  # fmt: skip
    return (log_probs, *stats, kept)


_BWD_ARGUMENTS = (
    f"{HEAD}, Tensor targets, Tensor? mask, Tensor target_logit, Tensor shift, Tensor row_sum, "
    "Tensor entropy, Tensor kept, SymInt kept_columns, Tensor grad_log_probs, "
    f"Tensor? grad_entropy, Tensor? grad_loss, Tensor? inv_denominator, {OPTIONS}, "
    "bool want_hidden, bool want_weight, bool want_bias, bool want_lora_x, bool want_lora_b"
)


def _empty_grads(head: Head, wanted: Wanted) -> tuple[Tensor, ...]:
    """A contiguous gradient for each wanted operand, an empty tensor for the others."""
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if want and x is not None
        else head.hidden.new_empty(0)
        for x, want in zip(head, wanted, strict=True)
    )


def _bwd_fake(*arguments):
    return _empty_grads(Head(*arguments[:5]), Wanted(*arguments[-5:]))


@operator(
    f"linear_log_probs_bwd({_BWD_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def linear_log_probs_bwd(*arguments):
    """Gradients of the five operands for d loss / d log_prob = g * grad_loss / D."""
    return _backward_op(*arguments)


def _bwd_into_fake(main_grad, *arguments):
    return _empty_grads(Head(*arguments[:5]), Wanted(*arguments[-5:])._replace(weight=False))


@operator(
    f"linear_log_probs_bwd_into(Tensor(a!) main_grad, {_BWD_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_into_fake,
)
def linear_log_probs_bwd_into(main_grad, *arguments):
    """The same, with d loss / d weight added to main_grad."""
    return _backward_op(*arguments, main_grad=main_grad)


def _backward_op(
    hidden, weight, bias, lora_x, lora_b, targets, mask, target_logit, shift, row_sum, entropy,
    kept, kept_columns, grad_log_probs, grad_entropy, grad_loss, inv_denominator,
    *options_and_wanted, main_grad=None,
):  # fmt: skip
    head = Head(hidden, weight, bias, lora_x, lora_b)
    options, wanted = Options(*options_and_wanted[:-5]), Wanted(*options_and_wanted[-5:])
    grads = _empty_grads(head, wanted if main_grad is None else wanted._replace(weight=False))
    out = HeadGrads(*(x if want else None for x, want in zip(grads, wanted, strict=True)))
    g = grad_log_probs.reshape(-1).to(row_sum.dtype)
    if grad_loss is not None:
        g = g * (grad_loss * inv_denominator)
    h = None if grad_entropy is None else grad_entropy.reshape(-1).to(row_sum.dtype)
    if main_grad is not None:
        out = out._replace(weight=main_grad)
    backward(
        head, targets, mask, RowStats(target_logit, shift, row_sum, entropy), g, h, options,
        Kept(kept, kept_columns), out, add=Wanted(weight=main_grad is not None),
    )  # fmt: skip
    return grads
