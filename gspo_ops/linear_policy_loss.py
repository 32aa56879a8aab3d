"""Policy losses from hidden states and the output head: one node of autograd.

Log-probs come from `linear_log_probs.py`, the loss from `policy_loss.py`. What is new here is the
plan that goes through the batch in chunks of whole sequences: the gradient by the log-probs of a
chunk is known as soon as its log-probs are, so that its exponentials need not outlive it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import compute_dtype, graph_is_kept, operator, refuse_graph
from .head import (
    COLUMNS,
    ROUNDED_AT_ONCE,
    LoRA,
    PlanName,
    Products,
    Wanted,
    check_head,
    check_plan,
    choose_plan,
    kept_width,
    product_dtype,
)
from .layout import sequence_ids
from .linear_log_probs import (
    HEAD,
    OPTIONS,
    LinearLogProbs,
    empty_kept,
    facts_of_head,
    has_gradient,
    head_gradients,
    linear_log_probs_fwd,
    local_head,
    make_head,
    resolve_products,
)
from .log_probs import check_softmax_options
from .logit_tiles import Head, HeadGrads, Kept, Options, backward, forward, slices
from .objective import GSPO, Objective
from .parallel import ProcessGroup, SharedChecks, gathered, group_name
from .policy_loss import (
    POLICY_INPUTS,
    PolicyInputs,
    PolicyLoss,
    TokenLoss,
    agreed,
    check_layout,
    custom_loss,
    named_stats,
    policy_inputs,
    policy_loss_fake,
    policy_loss_fwd,
    token_mean,
    valid_tokens,
)


def policy_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    objective: Objective | TokenLoss = GSPO(),
    ref_log_probs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    context_group: ProcessGroup | None = None,
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
) -> PolicyLoss:
    """Clipped policy-gradient loss straight from hidden states and the output head.

    The same number as `policy_loss_from_log_probs(log_probs_from_hidden(...), ...)`, as one
    autograd node. Logits are never rounded below fp32 and never stand in memory as a whole. The
    backward leaves out every row with zero gradient, masked, clipped, or with zero advantage; of
    the last kind the forward computes no more than the statistics need, which is nothing when
    `old_log_probs` is None and neither reference nor entropy is asked for.

    Args:
        hidden: (B, T, H) or (N, H), float16, bfloat16, float32 or float64.
        weight: (V, H) of the head, of any of these dtypes.
        targets: (B, T) or (N,) int32 or int64: the token that each row predicts (already shifted);
            anything where the mask is zero.
        bias, lora, temperature, softcap: of the head, as in `log_probs_from_hidden`.
        plan: `"keep"` the exponentials of all logits from forward to backward; `"chunk"`: whole
            sequences at a time, gradients made in the forward (packed on a GPU, the borders of the
            sequences are read back, and with a vocab_group the chunks that suit all ranks, one host
            synchronisation each; not with context_group);
            `"recompute"` the logits in the backward; `"auto"` what costs the fewest FLOPs within
            the budget and without synchronisation. `plan_from_hidden` tells what each costs.
        memory_budget: bytes for exponentials and sums of gradients that are kept; by default 2.1
            per logit, where eager PyTorch takes 8 to 14, between 64 MiB and 4 GiB.
        products, allow_sync, main_grad, vocab_group: as in `log_probs_from_hidden`.
        return_entropy: adds `entropy`, the mean over valid tokens in nats, to the stats.
        old_log_probs, advantages, mask, cu_seqlens, objective, ref_log_probs, rollout_weights,
            denominator, context_group: as in `policy_loss_from_log_probs`.

    Returns:
        PolicyLoss(loss, stats).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        IndexError: a target outside [0, V) at a valid position, on CPU. On GPU its log_prob is NaN.

    Source: arXiv 2507.18071.
    """
    with SharedChecks(
        hidden, weight, targets, vocab_group=vocab_group, context_group=context_group
    ):
        hidden, weight, bias, lora = local_head(hidden, weight, bias, lora, vocab_group)
        check_head(hidden, weight, targets, bias, lora, main_grad)
        check_softmax_options(temperature, softcap, return_entropy)
        check_plan(plan, memory_budget, products, allow_sync, lora)
        if plan == "chunk" and context_group is not None:
            raise ValueError(
                "plan='chunk' needs whole sequences, which context_group spreads over ranks: plan "
                "must be 'auto', 'keep' or 'recompute'"
            )
        layout = check_layout(targets.shape, hidden.device, "hidden", mask, cu_seqlens)
        inputs = policy_inputs(
            layout, compute_dtype(product_dtype(hidden, weight)), objective, old_log_probs,
            advantages, ref_log_probs, rollout_weights, denominator, context_group,
            return_entropy,
        )  # fmt: skip
        is_custom = not isinstance(objective, Objective)
        if plan == "chunk" and is_custom:
            raise ValueError(
                "plan='chunk' makes gradients in the forward, which no function as objective "
                "tells: plan must be 'auto', 'keep' or 'recompute'"
            )
        ranks = group_name("vocab_group", vocab_group)
        head = make_head(hidden, weight, bias, lora, mask)
        choice = choose_plan(
            hidden, weight, plan=plan, memory_budget=memory_budget, has_gradient=has_gradient(head),
            # ranks have to choose the same without being told how large the others' parts are
            can_chunk=vocab_group is None
            and context_group is None
            and not is_custom
            and (cu_seqlens is None or not hidden.is_cuda),
        )  # fmt: skip
        options = Options(
            temperature, softcap, return_entropy, resolve_products(products, hidden), allow_sync,
            ranks,
        )  # fmt: skip
    inputs, targets = agreed(
        inputs, targets, weight.shape[0], options.products == "torch",
        facts_of_head(head, options, choice), ranks,
    )  # fmt: skip
    if not isinstance(objective, Objective):
        log_probs, _ = LinearLogProbs.apply(
            *head, main_grad, targets, inputs.mask, choice.kept_columns, *options
        )
        return custom_loss(layout, objective, log_probs, inputs)
    if choice.name == "chunk":
        loss, stats, log_ratio, entropy = _PolicyLossInChunks.apply(
            *head, main_grad, targets, choice.chunk_rows, options, *inputs
        )
    else:
        loss, stats, log_ratio, entropy = _PolicyLossFromHidden.apply(
            *head, main_grad, targets, choice.kept_columns, options, *inputs
        )
    named = named_stats(stats, log_ratio, inputs)
    if return_entropy:
        named["entropy"] = entropy
    return PolicyLoss(loss, named)


class _PolicyLossFromHidden(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        hidden,
        weight,
        bias,
        lora_x,
        lora_b,
        main_grad,
        targets,
        kept_columns,
        options,
        *inputs,
    ):  # fmt: skip
        head = Head(hidden, weight, bias, lora_x, lora_b)
        policy = PolicyInputs(*inputs)
        mask, grad_mask, needs_log_probs = _row_masks(policy, Options(*options))
        log_probs, *saved, kept = linear_log_probs_fwd(
            *head, targets, mask, grad_mask, kept_columns, *options
        )
        entropy = token_mean(saved[-1], policy.mask, policy.rows, policy.context_group)
        loss, stats, log_ratio, g, inv_denominator = policy_loss_fwd(
            log_probs if needs_log_probs else None, *inputs
        )
        ctx.save_for_backward(*head, targets, mask, *saved, kept, g, inv_denominator)
        ctx.main_grad, ctx.kept_columns, ctx.options = main_grad, kept_columns, options
        ctx.mark_non_differentiable(stats, log_ratio, entropy)
        return loss, stats, log_ratio, entropy

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[override]
        *saved, g, inv_denominator = ctx.saved_tensors
        grads = head_gradients(
            ctx.needs_input_grad, ctx.main_grad, *saved, ctx.kept_columns,
            g, None, grad_loss, inv_denominator, *ctx.options,
        )  # fmt: skip
        return (*grads, None, None, None, None, *(None for _ in PolicyInputs._fields))


def _row_masks(policy: PolicyInputs, options: Options) -> tuple[Tensor | None, Tensor | None, bool]:
    """Rows to compute, rows that may have a gradient, and whether the loss needs log-probs.

    It does not on-policy: then rows without advantage are left out altogether.
    """
    needs_log_probs = (
        options.return_entropy
        or policy.old_log_probs is not None
        or policy.ref_log_probs is not None
    )
    if policy.kl_coef > 0:
        return policy.mask, policy.mask, True
    has_advantage = policy.advantages != 0
    if not policy.advantage_per_token:
        ids = sequence_ids(policy.batch, policy.rows, policy.cu_seqlens, policy.advantages.device)
        has_advantage = has_advantage[ids]
    if policy.mask is not None:
        has_advantage = has_advantage & (policy.mask != 0)
    return (policy.mask if needs_log_probs else has_advantage), has_advantage, needs_log_probs


# In chunks


class ChunkGrads(NamedTuple):
    """Gradients of loss * D, in the dtype of sums; empty where not wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    lora_x: Tensor
    lora_b: Tensor


class _PolicyLossInChunks(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, hidden, weight, bias, lora_x, lora_b, main_grad, targets, chunk_rows, options, *inputs
    ):
        head = Head(hidden, weight, bias, lora_x, lora_b)
        wanted = Wanted(*ctx.needs_input_grad[:5])
        loss, stats, log_ratio, entropy, inv_denominator, *grads = linear_policy_loss_chunks(
            *head, targets, chunk_rows, *options, *wanted, *inputs
        )
        ctx.save_for_backward(*head, *grads, inv_denominator)
        ctx.main_grad = main_grad
        ctx.mark_non_differentiable(stats, log_ratio, entropy)
        return loss, stats, log_ratio, entropy

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[override]
        *tensors, inv_denominator = ctx.saved_tensors
        head, units = tensors[:5], tensors[5:]
        wanted = Wanted(*ctx.needs_input_grad[:5])
        if ctx.main_grad is not None and wanted.weight:
            refuse_graph()
            add_scaled_gradient(ctx.main_grad, units[1], grad_loss, inv_denominator)
            wanted = wanted._replace(weight=False)
        grads = (
            gradient_from_unit(unit, x, grad_loss, inv_denominator) if want else None
            for unit, x, want in zip(units, head, wanted, strict=True)
        )
        return (*grads, None, None, None, None, *(None for _ in PolicyInputs._fields))


def gradient_from_unit(
    unit: Tensor, like: Tensor, grad_loss: Tensor, inv_denominator: Tensor
) -> Tensor:
    """unit * grad_loss / D; in place where its dtype is right and no other backward can follow."""
    if unit.dtype != like.dtype or graph_is_kept():
        return scaled_gradient(unit, like, grad_loss, inv_denominator)
    return unit.mul_(grad_loss * inv_denominator)


def _scaled_fake(unit, like, grad_loss, inv_denominator):
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@operator(
    "scaled_gradient(Tensor unit, Tensor like, Tensor grad_loss, Tensor inv_denominator) -> Tensor",
    _scaled_fake,
)
def scaled_gradient(unit, like, grad_loss, inv_denominator):
    """unit * grad_loss / D in the dtype and shape of `like`, whose values are not read."""
    out = _scaled_fake(unit, like, grad_loss, inv_denominator)
    unit, flat, scale = unit.view(-1), out.view(-1), grad_loss * inv_denominator
    for part in slices(len(flat), ROUNDED_AT_ONCE):  # or a rounded copy would take as much again
        flat[part] = unit[part] * scale
    return out


@operator(
    "add_scaled_gradient(Tensor(a!) out, Tensor unit, Tensor grad_loss, Tensor inv_denominator) "
    "-> ()",
    lambda *_: None,
)
def add_scaled_gradient(out, unit, grad_loss, inv_denominator):
    """out += unit * grad_loss / D."""
    out.addcmul_(unit, grad_loss * inv_denominator)


def _chunks_fake(
    hidden, weight, bias, lora_x, lora_b, targets, chunk_rows, *options_and_wanted_and_inputs,
):  # fmt: skip
    _, wanted, inputs = _split(options_and_wanted_and_inputs)
    head = Head(hidden, weight, bias, lora_x, lora_b)
    loss, stats, log_ratio, _, inv_denominator = policy_loss_fake(None, *inputs)
    grads = _empty_sums(head, wanted)
    return loss, stats, log_ratio, torch.empty_like(loss), inv_denominator, *grads


def _split(arguments: tuple) -> tuple[Options, Wanted, tuple]:
    """Options, Wanted and the fields of PolicyInputs that follow each other."""
    wanted = len(Options._fields)
    inputs = wanted + len(Wanted._fields)
    return Options(*arguments[:wanted]), Wanted(*arguments[wanted:inputs]), arguments[inputs:]


def _empty_sums(head: Head, wanted: Wanted) -> ChunkGrads:
    dtype = compute_dtype(product_dtype(head.hidden, head.weight))
    return ChunkGrads(
        *(
            x.new_empty(x.shape, dtype=dtype)
            if want and x is not None
            else head.hidden.new_empty(0, dtype=dtype)
            for x, want in zip(head, wanted, strict=True)
        )
    )


@operator(
    f"linear_policy_loss_chunks({HEAD}, Tensor targets, SymInt chunk_rows, {OPTIONS}, "
    "bool want_hidden, bool want_weight, bool want_bias, bool want_lora_x, bool want_lora_b, "
    f"{POLICY_INPUTS}) -> ({', '.join(['Tensor'] * 10)})",
    _chunks_fake,
)
def linear_policy_loss_chunks(
    hidden, weight, bias, lora_x, lora_b, targets, chunk_rows, *options_and_wanted_and_inputs,
):  # fmt: skip
    """loss, stats, log_ratio, mean entropy, 1 / D, and the gradients of loss * D."""
    options, wanted, inputs = _split(options_and_wanted_and_inputs)
    head = Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, lora_x, lora_b)
    policy = PolicyInputs(*inputs)
    mask, grad_mask, needs_log_probs = _row_masks(policy, options)
    targets = targets.reshape(-1)
    sums = _empty_sums(head, wanted)
    if policy.batch == 0:
        for x in sums[1:]:
            x.zero_()
    log_probs = sums.hidden.new_zeros(policy.rows)
    entropy = sums.hidden.new_zeros(())
    if options.vocab_group is not None:
        # the same chunks on all ranks, however large their parts: each chunk is an exchange
        own = targets.new_full((), chunk_rows, dtype=torch.int64)
        chunk_rows = int(gathered(own, options.vocab_group).min())
    buffer = empty_kept(hidden, weight, min(chunk_rows, max(policy.rows, 1)), weight.shape[0])
    for i, (sequences, rows) in enumerate(_chunks(policy, chunk_rows)):
        part = head._replace(
            hidden=head.hidden[rows], lora_x=None if lora_x is None else lora_x[rows]
        )
        kept = _kept_in(buffer, rows.stop - rows.start, weight.shape[0])
        live = None if mask is None else mask[rows]
        log_probs[rows], stats = forward(
            part, targets[rows], live, None if grad_mask is None else grad_mask[rows], options, kept
        )
        g = policy_loss_fwd(
            log_probs[rows] if needs_log_probs else None, *_part(policy, sequences, rows)
        )[3]
        out = HeadGrads(
            sums.hidden[rows] if wanted.hidden else None,
            sums.weight if wanted.weight else None,
            sums.bias if wanted.bias else None,
            sums.lora_x[rows] if wanted.lora_x else None,
            sums.lora_b if wanted.lora_b else None,
        )
        backward(
            part, targets[rows], live, stats, g, None, options, kept, out,
            add=Wanted(weight=i > 0, bias=i > 0, lora_b=i > 0),
        )  # fmt: skip
        entropy += stats.entropy.sum()
    loss, stats, log_ratio, _, inv_denominator = policy_loss_fwd(
        log_probs if needs_log_probs else None, *inputs
    )
    return (
        loss,
        stats,
        log_ratio,
        entropy / valid_tokens(policy.mask, policy.rows),
        inv_denominator,
        *(
            sums.hidden.view(hidden.shape) if wanted.hidden else sums.hidden,
            *sums[1:],
        ),
    )


def _chunks(policy: PolicyInputs, chunk_rows: int) -> Iterator[tuple[slice, slice]]:
    """Sequences and rows of each chunk: as many as fit, one at least."""
    if policy.cu_seqlens is None:
        T = policy.rows // max(policy.batch, 1)
        borders = [b * T for b in range(policy.batch + 1)]
    else:
        borders = policy.cu_seqlens.tolist()
    first = 0
    for b, (_, stop) in enumerate(pairwise(borders), start=1):
        is_last = b == policy.batch
        if is_last or borders[b + 1] - borders[first] > chunk_rows:
            yield slice(first, b), slice(borders[first], stop)
            first = b


def _part(policy: PolicyInputs, sequences: slice, rows: slice) -> PolicyInputs:
    """The inputs of some sequences, without the denominator, which g does not contain."""

    def per_row(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows]

    def either(x: Tensor | None, per_token: bool) -> Tensor | None:
        return None if x is None else x[rows if per_token else sequences]

    cu_seqlens = policy.cu_seqlens
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens[sequences.start : sequences.stop + 1] - rows.start
    return policy._replace(
        old_log_probs=per_row(policy.old_log_probs),
        advantages=policy.advantages[rows if policy.advantage_per_token else sequences],
        mask=per_row(policy.mask),
        cu_seqlens=cu_seqlens,
        ref_log_probs=per_row(policy.ref_log_probs),
        rollout_weights=either(policy.rollout_weights, policy.rollout_weight_per_token),
        denominator=None,
        rows=rows.stop - rows.start,
        batch=sequences.stop - sequences.start,
    )


def _kept_in(buffer: Tensor, rows: int, vocabulary: int) -> Kept:
    """As many columns of exponentials as the buffer has room for: all, but for long sequences."""
    if rows <= len(buffer):
        return Kept(buffer[:rows], vocabulary)
    columns = buffer.numel() // rows // COLUMNS * COLUMNS
    while columns and rows * kept_width(columns) > buffer.numel():
        columns -= COLUMNS
    width = kept_width(columns)
    e = buffer.view(-1)[: rows * width].view(rows, width) if columns else buffer[:0]
    return Kept(e, columns)
