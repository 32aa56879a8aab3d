"""Policy losses from log-probs, from logits or from hidden states: the public functions.

Each checks its arguments once and turns them into a source of log-probs and a policy. The
autograd.Functions are in `autograd.py` and `chunks.py`, functions as objectives in `custom.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Size, Tensor

from .autograd import GivenLogProbs, LogProbs, Source, SourceLoss
from .backend import compute_dtype
from .checks import check_log_probs
from .chunks import ChunkLoss, Chunks
from .constants import STATS
from .custom import TokenLoss, custom_loss, options_of
from .head import (
    Head,
    HeadOptions,
    LoRA,
    Products,
    check_head,
    local_head,
    resolve_products,
    stats_dtype,
)
from .hidden import HiddenSource, vocabulary_of_head
from .layout import resolve_layout
from .logits import LogitsSource, check_logits, vocabulary_of_logits
from .objective import GSPO, Objective
from .parallel import ProcessGroup, SharedChecks, vocab_part
from .plan import PlanName, check_plan, choose_plan
from .policy import Policy, make_policy
from .policy_loss import agreed
from .softmax import TargetRows, checked_softmax


class PolicyLoss(NamedTuple):
    """A loss and its statistics.

    Attributes:
        loss: 0-dim, differentiable.
        stats: detached tensors on the input's device, by name; 0-dim except for `log_ratio` (B,)
            and `log_probs`. docs/guide.md defines each of them.
    """

    loss: Tensor
    stats: dict[str, Tensor]


def policy_loss_from_log_probs(
    log_probs: Tensor,
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
) -> PolicyLoss:
    """Clipped policy-gradient loss from given log-probs.

        l_i  = (1 / |y_i|) * sum_t (log_prob_t - old_log_prob_t),     s_i = exp(l_i)
        loss = -(1 / D) * sum_i min(s_i * A_i, clip(s_i, 1 - clip_low, 1 + clip_high) * A_i)

    This is GSPO; `Objective` says what changes for the others.

    Args:
        log_probs: (B, T) padded or (N,) packed, float32 or float64.
        old_log_probs: same shape, of the policy that sampled. None means on-policy: every ratio is
            exactly 1, and the gradient flows.
        advantages: (B,), or per token unless the ratio is the sequence's. Packed with N == B, they
            are read as (B,) unless they are given as (1, N). An infinite advantage, like an
            infinite weight, makes the loss NaN.
        mask: padded (B, T) or packed (N,): 1 where a token counts, and 0 elsewhere. A CPU refuses
            other values. Whatever other arguments hold where the mask is 0 is never used.
        cu_seqlens: (B + 1,) int32 first rows of packed sequences, followed by N.
        objective: an `Objective`, or a function of flat (N,) tensors (log_probs, old_log_probs,
            advantages, sequence_ids). The function returns loss terms (N,), which autograd
            differentiates, alone or with a bool tensor (N,) that marks the clipped ones. Its
            attribute `aggregation` chooses their average, by default `"seq-mean-token-mean"`.
            Through parameters of these names it also receives `mask` (N,) bool, `lengths` (B,) of
            whole sequences on all ranks, and `ref_log_probs` (N,).
        ref_log_probs: same shape as log_probs, of the reference policy, for the KL term.
        rollout_weights: (B,) or per token: importance weights with respect to the rollout engine,
            which multiply the loss terms (not the KL term).
        denominator: D, a positive number or 0-dim tensor; by default the number of non-empty
            sequences (of tokens for `"token-mean"`, 1 for `"token-sum"`).
        context_group: ranks over which the tokens of the sequences are sharded, in any order. Each
            rank passes the same B sequences with the tokens that it holds, possibly none. Packed
            arguments have the shape (1, N) per token and (B,) per sequence. The ranks exchange sums
            per sequence, never log-probs. Loss and statistics are the same on all ranks. The
            gradient is that of each rank's own tokens, so gradients of parameters have to be summed
            over the ranks.

    Returns:
        PolicyLoss(loss, stats).

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Source: arXiv 2507.18071.
    """
    with SharedChecks(log_probs, context_group=context_group):
        check_log_probs("log_probs", log_probs)
        if _has_bonus(objective):
            raise ValueError(
                "entropy_coef must be 0 for a loss from log_probs, which do not determine the "
                "entropy: take it from log_probs_from_logits or log_probs_from_hidden with "
                "return_entropy=True, and subtract its mean times the coefficient"
            )
        layout = resolve_layout("log_probs", log_probs.shape, log_probs.device, mask, cu_seqlens)
        policy = make_policy(
            layout, log_probs.dtype, options_of(objective), old_log_probs, advantages,
            ref_log_probs, rollout_weights, denominator, context_group,
        )  # fmt: skip
    policy, targets = agreed(policy)
    flat = log_probs.reshape(-1).contiguous()
    if not isinstance(objective, Objective):
        return PolicyLoss(*custom_loss(objective, flat, policy, None))
    out = SourceLoss.apply(GivenLogProbs(), TargetRows(targets, None), policy, flat)
    return _result(policy, False, log_probs.shape, *out)


def policy_loss_from_logits(
    logits: Tensor,
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
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_group: ProcessGroup | None = None,
    return_entropy: bool = False,
    return_log_probs: bool = False,
) -> PolicyLoss:
    """Clipped policy-gradient loss straight from logits, without an N x V intermediate.

    It equals `policy_loss_from_log_probs(log_probs_from_logits(...), ...)`, but is one autograd
    node, whose backward writes dlogits in one pass and skips every row with zero gradient: masked,
    clipped, or with zero advantage.

    With `old_log_probs=None`, the gradient with respect to the log-probs is known beforehand. The
    forward then does not read the logits at all, and the backward reads only the rows with a
    non-zero advantage. NaN in the logits and targets out of range then show in the backward, not in
    the loss. This does not hold for `surrogate="weighted"` (CISPO, REINFORCE), a function as
    objective, a reference, an entropy, return_log_probs or a vocab_group, which need the log-probs.

    Args:
        logits: (B, T, V) or (N, V), float16, bfloat16, float32 or float64; any strides, as long as
            the vocabulary is contiguous.
        targets: (B, T) or (N,) int32 or int64: the token that each row predicts (already shifted);
            arbitrary where the mask is zero.
        temperature, softcap, vocab_group: of the logits, as in `log_probs_from_logits`.
        return_entropy: add `entropy`, the mean over valid tokens in nats, to the stats; an entropy
            bonus adds it by itself.
        return_log_probs: add `log_probs`, detached, in the shape of targets, to the stats;
            arbitrary where the mask is zero.
        old_log_probs, advantages, mask, cu_seqlens, objective, ref_log_probs, rollout_weights,
            denominator, context_group: as in `policy_loss_from_log_probs`.

    Returns:
        PolicyLoss(loss, stats).

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        IndexError: a target outside [0, V) at a valid position, on a CPU. On a GPU its log_prob is
            NaN.

    Source: arXiv 2507.18071.
    """
    with SharedChecks(logits, targets, vocab_group=vocab_group, context_group=context_group):
        logits = vocab_part("logits", logits, -1, vocab_group)
        check_logits(logits, targets)
        softmax = checked_softmax(
            temperature, softcap, vocab_group, return_entropy or _has_bonus(objective)
        )
        layout = resolve_layout("logits", targets.shape, logits.device, mask, cu_seqlens)
        policy = make_policy(
            layout, compute_dtype(logits.dtype), options_of(objective), old_log_probs, advantages,
            ref_log_probs, rollout_weights, denominator, context_group, return_log_probs,
        )  # fmt: skip
    shape = targets.shape
    policy, targets = agreed(policy, targets, vocabulary_of_logits(logits, softmax))
    rows = TargetRows(targets, policy.sequences.mask)
    return _loss(LogitsSource(softmax), rows, policy, objective, shape, logits)


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
    return_log_probs: bool = False,
) -> PolicyLoss:
    """Clipped policy-gradient loss straight from hidden states and the output head.

    It equals `policy_loss_from_log_probs(log_probs_from_hidden(...), ...)`, but is one autograd
    node. Logits are never rounded below fp32 and never stored as a whole. The backward skips every
    row with zero gradient: masked, clipped, or with zero advantage. For rows with zero advantage,
    the forward computes no more than the statistics need. That is nothing if `old_log_probs` is
    None, unless `surrogate="weighted"`, a function as objective, a reference, an entropy or
    return_log_probs needs the log-probs.

    Args:
        hidden: (B, T, H) or (N, H), float16, bfloat16, float32 or float64.
        weight: (V, H) of the head, in any of these dtypes.
        targets: (B, T) or (N,) int32 or int64: the token that each row predicts (already shifted);
            arbitrary where the mask is zero.
        bias, lora, temperature, softcap: of the head, as in `log_probs_from_hidden`.
        plan: `"keep"` keeps the exponentials of all logits from forward to backward. `"chunk"`
            processes whole sequences at a time and computes their gradients in the forward; with
            packed sequences on a GPU it reads the sequence boundaries back, and with a vocab_group
            the chunks that suit all ranks, with one host synchronisation each; it does not work
            with context_group. `"recompute"` recomputes the logits in the backward. `"auto"` takes
            the plan with the fewest FLOPs within the budget and without synchronisation.
            `plan_from_hidden` says what each costs.
        memory_budget: bytes for kept exponentials and sums of gradients; by default 2.1 per logit
            (eager PyTorch takes 8 to 14), between 64 MiB and 4 GiB.
        products, allow_sync, main_grad, vocab_group: as in `log_probs_from_hidden`.
        return_entropy: add `entropy`, the mean over valid tokens in nats, to the stats; an entropy
            bonus adds it by itself.
        return_log_probs: add `log_probs`, detached, in the shape of targets, to the stats;
            arbitrary where the mask is zero.
        old_log_probs, advantages, mask, cu_seqlens, objective, ref_log_probs, rollout_weights,
            denominator, context_group: as in `policy_loss_from_log_probs`.

    Returns:
        PolicyLoss(loss, stats).

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        IndexError: a target outside [0, V) at a valid position, on a CPU. On a GPU its log_prob is
            NaN.

    Source: arXiv 2507.18071.
    """
    with SharedChecks(
        hidden, weight, targets, vocab_group=vocab_group, context_group=context_group
    ):
        hidden, weight, bias, lora = local_head(hidden, weight, bias, lora, vocab_group)
        check_head(hidden, weight, targets, bias, lora, main_grad)
        softmax = checked_softmax(
            temperature, softcap, vocab_group, return_entropy or _has_bonus(objective)
        )
        check_plan(plan, memory_budget, products, allow_sync, lora)
        layout = resolve_layout("hidden", targets.shape, hidden.device, mask, cu_seqlens)
        head = Head.of(hidden, weight, bias, lora)
        policy = make_policy(
            layout, stats_dtype(hidden, weight), options_of(objective), old_log_probs, advantages,
            ref_log_probs, rollout_weights, denominator, context_group, return_log_probs,
        )  # fmt: skip
        if plan == "chunk":
            _check_chunks(objective, context_group)
        if _has_bonus(objective):  # its gradient needs logits, which exponentials do not determine
            if plan == "keep":
                raise ValueError(
                    "plan must be 'auto' or 'recompute' with an entropy bonus, got 'keep'"
                )
            plan = "recompute"
        # ranks have to choose the same plan without knowing the sizes of the others' shards
        is_alone = vocab_group is None and context_group is None
        borders_are_known = cu_seqlens is None or not hidden.is_cuda
        can_chunk = is_alone and isinstance(objective, Objective) and borders_are_known
        choice = choose_plan(
            hidden, weight, plan, memory_budget,
            has_gradient=head.has_gradient(), can_chunk=can_chunk,
        )  # fmt: skip
        multiplier = resolve_products(products, head)
        scale = 1.0 if lora is None else lora.scale
        options = HeadOptions(softmax, multiplier, allow_sync, scale, choice.kept_columns)
    shape = targets.shape
    policy, targets = agreed(policy, targets, vocabulary_of_head(head, options, choice))
    rows = TargetRows(targets, policy.sequences.mask)
    if choice.name == "chunk":
        chunks = Chunks(options, choice.chunk_rows, main_grad)
        return _result(
            policy, softmax.return_entropy, shape, *ChunkLoss.apply(chunks, rows, policy, *head)
        )
    source = HiddenSource(options, main_grad)
    return _loss(source, rows, policy, objective, shape, *head)


def _check_chunks(objective: Objective | TokenLoss, context_group: ProcessGroup | None) -> None:
    if context_group is not None:
        raise ValueError(
            "plan='chunk' needs whole sequences, which context_group shards over ranks: plan "
            "must be 'auto', 'keep' or 'recompute'"
        )
    if not isinstance(objective, Objective):
        raise ValueError(
            "plan='chunk' computes gradients in the forward, which a function as objective "
            "does not provide: plan must be 'auto', 'keep' or 'recompute'"
        )
    if _has_bonus(objective):
        raise ValueError(
            "plan='chunk' keeps exponentials, which do not determine the gradient of an entropy "
            "bonus: plan must be 'auto' or 'recompute'"
        )


def _has_bonus(objective: Objective | TokenLoss) -> bool:
    return isinstance(objective, Objective) and objective.entropy_coef > 0


def _loss(
    source: Source,
    rows: TargetRows,
    policy: Policy,
    objective: Objective | TokenLoss,
    shape: Size,
    *operands: Any,
) -> PolicyLoss:
    if isinstance(objective, Objective):
        out = SourceLoss.apply(source, rows, policy, *operands)
        return _result(policy, source.returns_entropy(), shape, *out)
    log_probs, entropy = LogProbs.apply(source, rows, False, *operands)
    entropies = entropy if source.returns_entropy() else None
    loss, stats = custom_loss(objective, log_probs.reshape(-1), policy, entropies)
    if policy.returns_log_probs:
        stats["log_probs"] = log_probs.detach().view(shape)
    return PolicyLoss(loss, stats)


def _result(
    policy: Policy,
    return_entropy: bool,
    shape: Size,
    loss: Tensor,
    stats: Tensor,
    log_ratio: Tensor,
    entropy: Tensor,
    log_probs: Tensor,
) -> PolicyLoss:
    named = dict(zip(STATS, stats.unbind(), strict=True))
    if policy.ref_log_probs is None:
        del named["ref_kl"]
    if policy.objective.dual_clip == math.inf:
        del named["clip_frac_dual"]
    named["log_ratio"] = log_ratio
    if return_entropy:
        named["entropy"] = entropy
    if policy.returns_log_probs:
        named["log_probs"] = log_probs.view(shape)
    return PolicyLoss(loss, named)
