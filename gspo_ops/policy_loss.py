"""Policy losses from log-probs or from logits: checks, operators, autograd.Functions, CPU path.

The kernel stands in `kernels/policy_loss.py`; logits are handled by `log_probs.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from .backend import compute_dtype, device_guard, operator, scalar, use_triton
from .layout import (
    Layout,
    check_constant,
    check_tensor,
    checked_targets,
    resolve_layout,
    segment_sum,
    sequence_ids,
)
from .log_probs import (
    LogProbs,
    check_logits,
    check_softmax_options,
    facts_of_logits,
    loadable,
    log_probs_bwd,
    log_probs_fwd,
)
from .objective import (
    GSPO,
    LOG_RATIO_CAP,
    Aggregation,
    KLEstimator,
    Objective,
    RatioLevel,
    check_number,
)
from .parallel import (
    ProcessGroup,
    SharedChecks,
    agree,
    checksum,
    error_of,
    gathered,
    group_name,
    local_targets,
    vocab_part,
)

TokenLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# in the order that the kernel writes them
STATS = (
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "clip_frac_sequences",
    "clip_frac_tokens",
    "clip_frac_low",
    "clip_frac_high",
    "approx_kl",
    "approx_kl_k3",
    "effective_sample_size",
    "active_token_frac",
    "ref_kl",
)
# as in kernels/common.py: its square, and that of its inverse, leave room for sums in fp32
ESS_RATIO_CAP = 1e15


class PolicyLoss(NamedTuple):
    """A loss and what it saw.

    Attributes:
        loss: 0-dim, differentiable.
        stats: name to detached tensor on the input's device, 0-dim but for `log_ratio` (B,);
            each is defined in the README.
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
    """Clipped policy-gradient loss of log-probs that are already there.

        l_i  = (1 / |y_i|) * sum_t (log_prob_t - old_log_prob_t),     s_i = exp(l_i)
        loss = -(1 / D) * sum_i min(s_i * A_i, clip(s_i, 1 - clip_low, 1 + clip_high) * A_i)

    for GSPO; `Objective` says what changes for the others.

    Args:
        log_probs: (B, T) padded or (N,) packed, float32 or float64.
        old_log_probs: same shape, of the policy that sampled; None means on-policy: every ratio is
            exactly 1, and the gradient flows.
        advantages: (B,), or per token unless the ratio is the sequence's. Packed, with N == B,
            they are read as (B,), unless they are given as (1, N). An infinite one, like an
            infinite weight, makes the loss NaN.
        mask: padded (B, T) or packed (N,); non-zero where a token counts. Nothing at other places
            is used, whatever it holds.
        cu_seqlens: (B + 1,) int32 first rows of packed sequences, and N.
        objective: an `Objective`, or a function of flat (N,) tensors (log_probs, old_log_probs,
            advantages, sequence_ids) that returns loss terms (N,), which autograd differentiates;
            they are averaged as its attribute `aggregation` says, by default
            `"seq-mean-token-mean"`.
        ref_log_probs: same shape as log_probs, of the reference policy for the KL term.
        rollout_weights: (B,) or per token: importance weights of the rollout engine, which multiply
            the loss terms (not the KL term).
        denominator: D, a positive number or 0-dim tensor; by default the number of non-empty
            sequences (of tokens for `"token-mean"`, 1 for `"token-sum"`).
        context_group: ranks over which the tokens of the sequences are spread, in any order: each
            passes the same B sequences, with the tokens that it has, none at all included; packed,
            what is per token or per sequence is per token as (1, N) and per sequence as (B,). Sums
            per sequence are exchanged, never log-probs. Loss and statistics are the same on all;
            the gradient is that of each rank's tokens, so gradients of parameters are to be added
            up over the ranks.

    Returns:
        PolicyLoss(loss, stats).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: arXiv 2507.18071.
    """
    with SharedChecks(log_probs, context_group=context_group):
        check_log_probs("log_probs", log_probs)
        layout = check_layout(log_probs.shape, log_probs.device, "log_probs", mask, cu_seqlens)
        inputs = policy_inputs(
            layout, log_probs.dtype, objective, old_log_probs, advantages, ref_log_probs,
            rollout_weights, denominator, context_group,
        )  # fmt: skip
    if not isinstance(objective, Objective):
        return custom_loss(layout, objective, log_probs, inputs)
    inputs, _ = agreed(inputs)
    flat = log_probs.reshape(-1).contiguous()
    loss, stats, log_ratio = _PolicyLossFromLogProbs.apply(flat, *inputs)
    return PolicyLoss(loss, named_stats(stats, log_ratio, inputs))


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
) -> PolicyLoss:
    """Clipped policy-gradient loss straight from logits, without an N x V intermediate.

    The same number as `policy_loss_from_log_probs(log_probs_from_logits(...), ...)`, as one
    autograd node whose backward writes dlogits in one pass and leaves out every row with zero
    gradient: masked, clipped, or with zero advantage.

    With `old_log_probs=None`, and without reference, entropy and vocab_group, the gradient by the
    log-probs is known beforehand: the forward does not read the logits at all, and the backward
    only the rows with non-zero advantage (NaN in the logits, and a target out of range, then show
    in the backward, not in the loss).

    Args:
        logits: (B, T, V) or (N, V), float16, bfloat16, float32 or float64; any strides, as long as
            the vocabulary is contiguous.
        targets: (B, T) or (N,) int32 or int64: the token that each row predicts (already shifted);
            anything where the mask is zero.
        temperature, softcap, vocab_group: of the logits, as in `log_probs_from_logits`.
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
    with SharedChecks(logits, targets, vocab_group=vocab_group, context_group=context_group):
        logits = vocab_part("logits", logits, -1, vocab_group)
        check_logits(logits, targets)
        check_softmax_options(temperature, softcap, return_entropy)
        layout = check_layout(targets.shape, logits.device, "logits", mask, cu_seqlens)
        inputs = policy_inputs(
            layout, compute_dtype(logits.dtype), objective, old_log_probs, advantages,
            ref_log_probs, rollout_weights, denominator, context_group, return_entropy,
        )  # fmt: skip
        ranks = group_name("vocab_group", vocab_group)
    inputs, targets = agreed(
        inputs, targets, logits.shape[-1], not use_triton(logits),
        facts_of_logits(logits, return_entropy), ranks,
    )  # fmt: skip
    options = temperature, softcap, return_entropy, ranks
    if not isinstance(objective, Objective):
        log_probs, _ = LogProbs.apply(logits, targets, inputs.mask, *options)
        return custom_loss(layout, objective, log_probs, inputs)
    loss, stats, log_ratio, entropy = _PolicyLossFromLogits.apply(
        logits, targets, *options, *inputs
    )
    named = named_stats(stats, log_ratio, inputs)
    if return_entropy:
        named["entropy"] = entropy
    return PolicyLoss(loss, named)


class PolicyInputs(NamedTuple):
    """Everything the operator takes besides the log-probs: flat tensors, then plain options."""

    old_log_probs: Tensor | None
    advantages: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    ref_log_probs: Tensor | None
    rollout_weights: Tensor | None
    denominator: Tensor | None
    rows: int
    batch: int
    advantage_per_token: bool
    rollout_weight_per_token: bool
    ratio_level: RatioLevel
    aggregation: Aggregation
    kl_estimator: KLEstimator
    clip_low: float
    clip_high: float
    kl_coef: float
    context_group: str | None


class _PolicyLossFromLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_probs, *inputs):  # type: ignore[override]
        loss, stats, log_ratio, g, inv_denominator = policy_loss_fwd(log_probs, *inputs)
        ctx.save_for_backward(log_probs, g, inv_denominator)
        ctx.mark_non_differentiable(stats, log_ratio)
        return loss, stats, log_ratio

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[override]
        grad = policy_loss_bwd(*ctx.saved_tensors, grad_loss)
        return (grad, *(None for _ in PolicyInputs._fields))


class _PolicyLossFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, logits, targets, temperature, softcap, return_entropy, vocab_group, *inputs
    ):
        policy = PolicyInputs(*inputs)
        log_probs = row_max = row_sum = target_logit = None
        entropy = targets.new_empty(0, dtype=compute_dtype(logits.dtype))
        if (
            return_entropy
            or policy.old_log_probs is not None
            or policy.ref_log_probs is not None
            or vocab_group is not None
        ):
            log_probs, row_max, row_sum, rows_entropy, target_logit = log_probs_fwd(
                logits, targets, policy.mask, temperature, softcap, return_entropy, vocab_group
            )
            if return_entropy:
                entropy = token_mean(rows_entropy, policy.mask, policy.rows, policy.context_group)
        loss, stats, log_ratio, g, inv_denominator = policy_loss_fwd(log_probs, *inputs)
        ctx.save_for_backward(
            logits, targets, policy.mask, row_max, row_sum, target_logit, g, inv_denominator
        )
        ctx.options = temperature, softcap, vocab_group
        ctx.mark_non_differentiable(stats, log_ratio, entropy)
        return loss, stats, log_ratio, entropy

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[override]
        logits, targets, mask, row_max, row_sum, target_logit, g, inv_denominator = (
            ctx.saved_tensors
        )
        grad_logits = log_probs_bwd(
            logits, targets, mask, row_max, row_sum, None, target_logit, g, None,
            grad_loss, inv_denominator, *ctx.options,
        )  # fmt: skip
        return (grad_logits, *(None for _ in range(5)), *(None for _ in PolicyInputs._fields))


def valid_tokens(mask: Tensor | None, rows: int) -> Tensor | int:
    return max(rows, 1) if mask is None else (mask != 0).sum().clamp(min=1)


@operator(
    "token_mean(Tensor x, Tensor? mask, SymInt rows, str? context_group) -> Tensor",
    lambda x, *_: x.new_empty(()),
)
def token_mean(x, mask, rows, context_group):
    """Mean over valid tokens, on whatever rank, of what is 0 elsewhere."""
    total, count = x.sum(), valid_tokens(mask, rows)
    if context_group is None:
        return total / count
    count = x.new_full((), rows) if mask is None else (mask != 0).sum().to(x.dtype)
    total, count = gathered(torch.stack([total, count]), context_group).sum(0).unbind()
    return total / count.clamp(min=1)


def named_stats(stats: Tensor, log_ratio: Tensor, inputs: PolicyInputs) -> dict[str, Tensor]:
    named = dict(zip(STATS, stats.unbind(), strict=True))
    if inputs.ref_log_probs is None:
        del named["ref_kl"]
    named["log_ratio"] = log_ratio
    return named


# Checks


def check_log_probs(name: str, x: Tensor) -> None:
    """Refuse log-probs that are too coarse to take a ratio of."""
    check_tensor(name, x)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64, got {x.dtype}: rounding log-probs to 16 bits "
            "moves a sequence's ratio by more than the clip range of GSPO (3e-4)"
        )


def check_layout(
    shape: torch.Size,
    device: torch.device,
    name: str,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Layout:
    if len(shape) not in (1, 2):
        raise ValueError(f"{name} must be padded (B, T) or packed (N,) tokens, got {tuple(shape)}")
    return resolve_layout(shape, device, mask, cu_seqlens)


def policy_inputs(
    layout: Layout,
    dtype: torch.dtype,
    objective: Objective | TokenLoss,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    rollout_weights: Tensor | None,
    denominator: float | Tensor | None,
    context_group: ProcessGroup | None,
    return_entropy: bool = False,
) -> PolicyInputs:
    """Checked and flattened arguments."""
    if not isinstance(objective, Objective):
        objective = _generic(objective, ref_log_probs, context_group, return_entropy)
    old, ref = _flat_old_and_ref(layout, dtype, old_log_probs, ref_log_probs)
    if objective.kl_coef > 0 and ref is None:
        raise ValueError(f"ref_log_probs is needed for kl_coef={objective.kl_coef:g}")
    is_part = context_group is not None
    advantages, per_token = layout.per_sequence_or_token(
        "advantages", advantages, dtype, is_part=is_part
    )
    if per_token and objective.ratio_level == "sequence":
        raise ValueError(
            f"advantages must have shape {(layout.batch,)} for ratio_level='sequence', got one per "
            "token: GSPOToken is the objective that takes them"
        )
    weights, weight_per_token = _flat_rollout_weights(layout, dtype, rollout_weights, is_part)
    return PolicyInputs(
        old, advantages, layout.mask, layout.cu_seqlens, ref, weights,
        _denominator_tensor(layout, dtype, denominator),
        layout.rows, layout.batch, per_token, weight_per_token,
        objective.ratio_level, objective.aggregation, objective.kl_estimator,
        objective.clip_low, objective.clip_high, objective.kl_coef,
        group_name("context_group", context_group),
    )  # fmt: skip


def _flat_old_and_ref(
    layout: Layout, dtype: torch.dtype, old: Tensor | None, ref: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if old is not None:
        check_log_probs("old_log_probs", old)
        old = layout.flat_float("old_log_probs", old, dtype)
    if ref is not None:
        check_log_probs("ref_log_probs", ref)
        ref = layout.flat_float("ref_log_probs", ref, dtype)
    return old, ref


def _flat_rollout_weights(
    layout: Layout, dtype: torch.dtype, weights: Tensor | None, is_part: bool
) -> tuple[Tensor | None, bool]:
    if weights is None:
        return None, False
    return layout.per_sequence_or_token("rollout_weights", weights, dtype, is_part=is_part)


def _denominator_tensor(
    layout: Layout, dtype: torch.dtype, denominator: float | Tensor | None
) -> Tensor | None:
    if denominator is None:
        return None
    if not isinstance(denominator, Tensor):
        check_number("denominator", denominator, minimum=0.0, exclusive=True)
        return scalar(denominator, dtype, layout.device)
    check_tensor("denominator", denominator, layout.device)
    check_constant("denominator", denominator)
    if denominator.ndim != 0:
        raise ValueError(
            f"denominator must be a number or a 0-dim tensor, got {tuple(denominator.shape)}"
        )
    return denominator.to(dtype)


def agreed(
    inputs: PolicyInputs,
    targets: Tensor | None = None,
    columns: int = 0,
    checks_range: bool = False,
    facts: Mapping[str, int] | None = None,
    vocab_group: str | None = None,
) -> tuple[PolicyInputs, Tensor]:
    """Inputs and local targets, if all ranks that exchange numbers can go on."""
    like = inputs.advantages
    if targets is None:
        targets = like.new_empty(0, dtype=torch.int64)
    if vocab_group is None and (inputs.context_group is None or like.device.type != "cpu"):
        return inputs, targets
    facts = facts or {}
    targets, advantages = agree_on_inputs(
        targets, columns, checks_range, list(facts), list(facts.values()), vocab_group, *inputs
    )
    return inputs._replace(advantages=advantages), targets


# Operators


def policy_loss_fake(log_probs, *inputs):
    policy = PolicyInputs(*inputs)
    like = policy.advantages
    scalar = like.new_empty(())
    return (
        scalar, like.new_empty(len(STATS)), like.new_empty(policy.batch),
        like.new_empty(policy.rows), torch.empty_like(scalar),
    )  # fmt: skip


# the schema of PolicyInputs
POLICY_INPUTS = (
    "Tensor? old_log_probs, Tensor advantages, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? ref_log_probs, Tensor? rollout_weights, Tensor? denominator, SymInt rows, "
    "SymInt batch, bool advantage_per_token, bool rollout_weight_per_token, str ratio_level, "
    "str aggregation, str kl_estimator, float clip_low, float clip_high, float kl_coef, "
    "str? context_group"
)


@operator(
    "agree_on_inputs(Tensor targets, SymInt columns, bool checks_range, str[] names, "
    f"SymInt[] facts, str? vocab_group, {POLICY_INPUTS}) -> (Tensor, Tensor)",
    lambda targets, columns, checks_range, names, facts, vocab_group, *inputs: (
        targets.new_empty(targets.shape, dtype=torch.int64),
        torch.empty_like(PolicyInputs(*inputs).advantages),
    ),
)
def agree_on_inputs(targets, columns, checks_range, names, facts, vocab_group, *inputs):
    """Targets, local ones with a vocab_group, and advantages, if all ranks can go on."""
    policy = PolicyInputs(*inputs)
    sizes = None
    if targets.device.type == "cpu":
        known = dict(zip(names, facts, strict=True))
        objective = (
            policy.ratio_level, policy.aggregation, policy.kl_estimator, policy.clip_low,
            policy.clip_high, policy.kl_coef,
        )  # fmt: skip
        shared = {
            "the number of sequences": policy.batch,
            "return_entropy": known.get("return_entropy", 0),
            "the checksum of the objective's options": crc32(repr(objective).encode()),
        }
        counted, of_rows = _counted(targets, policy)
        error = error_of(_check_values, policy)
        if checks_range and vocab_group is None:
            error = error or error_of(checked_targets, counted, columns)
        rows = {"the checksum of targets, mask, advantages and the like": checksum(of_rows)}
        sizes = agree(
            {
                "vocab_group": (vocab_group, known | shared | rows),
                "context_group": (policy.context_group, shared),
            },
            error, counted if checks_range else None, columns,
        )  # fmt: skip
    advantages = policy.advantages.clone()
    if vocab_group is None:
        return targets.to(torch.int64, copy=True), advantages
    return local_targets(targets, columns, vocab_group, sizes), advantages


@operator(
    f"policy_loss_fwd(Tensor? log_probs, {POLICY_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    policy_loss_fake,
)
def policy_loss_fwd(log_probs, *inputs):
    """loss, stats (len(STATS),), log_ratio (B,), g (N,) and 1 / D.

    g is d (loss * D) / d log_prob: D is known only when every sequence has been seen. log_probs are
    not read when there is neither old nor ref.
    """
    policy = PolicyInputs(*inputs)
    # what ranks have to exchange in between does not fit into one launch
    if use_triton(policy.advantages) and policy.batch and policy.context_group is None:
        return _triton_policy_loss(log_probs, policy)
    return _torch_policy_loss(log_probs, policy)


def _counted(targets: Tensor, policy: PolicyInputs) -> tuple[Tensor, list[Tensor | None]]:
    """Targets, and all that has a value per token or sequence; 0 at tokens that don't count."""
    mask = policy.mask
    valid = targets.new_ones(policy.rows, dtype=torch.bool) if mask is None else mask != 0
    per_row = (
        targets.reshape(-1).long(), policy.old_log_probs, policy.advantages, policy.ref_log_probs,
        policy.rollout_weights,
    )  # fmt: skip
    counted = [
        x if x is None or len(x) != policy.rows else torch.where(valid, x, 0) for x in per_row
    ]
    cu_seqlens = None if policy.cu_seqlens is None else policy.cu_seqlens.long()
    assert counted[0] is not None
    return counted[0], [valid, cu_seqlens, *counted]


def _bwd_fake(log_probs, g, inv_denominator, grad_loss):
    return torch.empty_like(g)


@operator(
    "policy_loss_bwd(Tensor log_probs, Tensor g, Tensor inv_denominator, Tensor grad_loss) "
    "-> Tensor",
    _bwd_fake,
)
def policy_loss_bwd(log_probs, g, inv_denominator, grad_loss):
    """d loss / d log_probs, which are not read: they tie the gradient to its input, so that a
    second derivative is refused, not zero."""
    return torch.where(g == 0, 0.0, g * (grad_loss * inv_denominator))


# Triton path


def _triton_policy_loss(log_probs, policy: PolicyInputs):
    from .kernels.policy_loss import NUM_PARTIALS, policy_loss_fwd_kernel

    loss, stats, log_ratio, g, inv_denominator = policy_loss_fake(log_probs, *policy)
    partials = g.new_empty(policy.batch, NUM_PARTIALS.value)
    ticket = torch.zeros(1, dtype=torch.int32, device=g.device)
    mask = None if policy.mask is None else loadable(policy.mask)
    with device_guard(g):
        policy_loss_fwd_kernel[(policy.batch,)](
            log_probs, policy.old_log_probs, policy.ref_log_probs, policy.advantages,
            policy.rollout_weights, mask, policy.cu_seqlens, policy.denominator,
            g, log_ratio, loss, stats, inv_denominator,
            partials, ticket,
            policy.rows, policy.rows // policy.batch,
            policy.clip_low, policy.clip_high, *_log_clip_range(policy), policy.kl_coef,
            RATIO_LEVEL=policy.ratio_level, AGGREGATION=policy.aggregation,
            KL_ESTIMATOR=policy.kl_estimator,
            ADVANTAGE_PER_TOKEN=policy.advantage_per_token,
            ROLLOUT_WEIGHT_PER_TOKEN=policy.rollout_weight_per_token,
            BLOCK_T=512, BLOCK_B=512, num_warps=8,
        )  # fmt: skip
    return loss, stats, log_ratio, g, inv_denominator


def _log_clip_range(policy: PolicyInputs) -> tuple[float, float]:
    """The clip range of the log-ratio, where it is resolved best."""
    low = math.log1p(-policy.clip_low) if policy.clip_low < 1 else -math.inf
    return low, math.log1p(policy.clip_high)


# CPU path (also float64, and context_group, on any device): N numbers, in float64


def _torch_policy_loss(log_probs, policy: PolicyInputs):
    valid = _checked_mask(policy)
    ids = sequence_ids(policy.batch, policy.rows, policy.cu_seqlens, valid.device)
    new_minus_old = _difference(log_probs, policy.old_log_probs, valid)
    weights = _rollout_weights(policy, ids, valid)

    dtype = policy.advantages.dtype

    def per_sequence(x: Tensor) -> Tensor:
        return segment_sum(x, policy.batch, policy.cu_seqlens)

    def saturated(x: Tensor) -> Tensor:
        return x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)

    sums = torch.stack([per_sequence(x) for x in (valid.double(), new_minus_old, weights)])
    n, log_ratio_sum, weight_sum = _over_context(sums, policy)
    n_or_1 = n.clamp(min=1)
    log_ratio = log_ratio_sum / n_or_1
    is_token_level = policy.ratio_level == "token"
    token_log_ratio = new_minus_old if is_token_level else log_ratio[ids]
    ratio = _capped_exp(token_log_ratio)
    advantages = policy.advantages.double()
    if not policy.advantage_per_token:
        advantages = advantages[ids]
    advantages = _nan_if_infinite(torch.where(valid, advantages, 0.0))

    log_low, log_high = _log_clip_range(policy)
    is_high = (advantages > 0) & (token_log_ratio > log_high)
    is_low = (advantages < 0) & (token_log_ratio < log_low)
    is_clipped = is_high | is_low
    bound = torch.full_like(ratio, 1 - policy.clip_low).masked_fill(is_high, 1 + policy.clip_high)
    loss_terms = -torch.where(is_clipped, bound, ratio) * advantages * weights
    if policy.ratio_level == "sequence":
        # every token's rollout weight reaches every token through the sequence's one ratio
        weights = (weight_sum / n_or_1)[ids]
    g = torch.where(is_clipped, 0.0, -ratio * advantages * weights)
    delta = _difference(log_probs, policy.ref_log_probs, valid)
    ref_kl, ref_kl_grad = (saturated(x) for x in _kl(policy.kl_estimator, delta))
    loss_terms = loss_terms + policy.kl_coef * ref_kl
    g = g + policy.kl_coef * ref_kl_grad
    if policy.aggregation == "seq-mean-token-mean":
        loss_terms = loss_terms / n_or_1[ids]
        g = g / n_or_1[ids]
    loss_terms, g = saturated(loss_terms), torch.where(valid, saturated(g), 0.0)

    of_tokens = (loss_terms, is_low, is_high, _k3(new_minus_old), g != 0, ref_kl)
    totals = torch.stack([torch.where(valid, x, 0.0).sum() for x in of_tokens])
    parts = totals, per_sequence(is_clipped.double()), *_ratio_parts(ratio, valid)
    (loss, low, high, k3, active, kl), clipped_in, *ratio_parts = _parts_over_context(parts, policy)
    if not is_token_level:  # one ratio per sequence, which every rank knows
        ratio_parts = [*_ratio_parts(_capped_exp(log_ratio), n > 0)]
    denominator = _denominator(policy, n)
    tokens = n.sum().clamp(min=1)
    stats = torch.stack(
        [
            *_ratio_mean_min_max(*ratio_parts),
            (clipped_in > 0).double().sum() / (n > 0).sum().clamp(min=1),
            *(x / tokens for x in (low + high, low, high, -log_ratio_sum.sum(), k3)),
            _effective_sample_size(ratio_parts[0]),
            active / tokens,
            kl / tokens,
        ]
    )
    loss = saturated(loss / denominator)
    return tuple(x.to(dtype) for x in (loss, stats, log_ratio, g, 1.0 / denominator))


def _over_context(sums: Tensor, policy: PolicyInputs) -> Tensor:
    """Added up over the ranks that hold tokens of the same sequences."""
    if policy.context_group is None:
        return sums
    return gathered(sums, policy.context_group).sum(0)


def _parts_over_context(parts: tuple[Tensor, ...], policy: PolicyInputs) -> tuple[Tensor, ...]:
    """The same for several, of which the last holds maxima, in one exchange."""
    if policy.context_group is None:
        return parts
    everyone = gathered(torch.cat(parts), policy.context_group)
    *sums, maxima = everyone.split([len(x) for x in parts], dim=1)
    return *(x.sum(0) for x in sums), maxima.amax(0)


def _ratio_parts(ratio: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """Count and sums of ratios, of capped ones and of their squares; maxima of -ratio and ratio."""
    capped = ratio.clamp(1 / ESS_RATIO_CAP, ESS_RATIO_CAP)
    values = torch.ones_like(ratio), ratio, capped, capped.square()
    sums = torch.stack([torch.where(some, x, 0.0).sum() for x in values])
    extremes = torch.stack([-ratio, ratio]).masked_fill(~some, -math.inf)
    return sums, torch.nn.functional.pad(extremes, (0, 1), value=-math.inf).amax(1)


def _ratio_mean_min_max(sums: Tensor, maxima: Tensor) -> tuple[Tensor, ...]:
    """1 for an empty batch, as for an on-policy one."""
    values = sums[1] / sums[0].clamp(min=1), -maxima[0], maxima[1]
    return tuple(torch.where(sums[0] > 0, x, 1.0) for x in values)


def _effective_sample_size(sums: Tensor) -> Tensor:
    count, _, total, squares = sums
    return torch.where(count > 0, total / squares * (total / count.clamp(min=1)), 1.0)


def _denominator(policy: PolicyInputs, n: Tensor) -> Tensor:
    """D, from the lengths of the sequences unless it is given."""
    D = policy.denominator
    if D is None:
        return (
            {"token-mean": n.sum(), "token-sum": n.new_ones(())}.get(
                policy.aggregation, (n > 0).sum()
            )
            .clamp(min=1)
            .double()
        )
    _check_denominator(D)
    return torch.where(D > 0, D, math.nan).double()


def _check_denominator(D: Tensor) -> None:
    if D.device.type == "cpu" and not D > 0:
        raise ValueError(f"denominator must be > 0, got {D.item():g}")


def _check_values(policy: PolicyInputs) -> None:
    _checked_mask(policy)
    if policy.denominator is not None:
        _check_denominator(policy.denominator)


def _checked_mask(policy: PolicyInputs) -> Tensor:
    """(N,) bool. Values are checked on a CPU: on a GPU that takes a synchronisation."""
    device = policy.advantages.device
    cu = policy.cu_seqlens if device.type == "cpu" else None
    if cu is not None and (
        int(cu[0]) != 0 or int(cu[-1]) != policy.rows or bool((cu.diff() < 0).any())
    ):
        raise ValueError(
            f"cu_seqlens must rise from 0 to N={policy.rows} without falling, got {cu.tolist()}"
        )
    if policy.mask is None:
        return torch.ones(policy.rows, dtype=torch.bool, device=device)
    valid = policy.mask != 0
    if device.type == "cpu" and bool((valid & (policy.mask != 1)).any()):
        raise ValueError(
            "mask must hold 0 and 1 only; weights belong into advantages or rollout_weights"
        )
    return valid


def _difference(new: Tensor | None, old: Tensor | None, valid: Tensor) -> Tensor:
    if new is None or old is None:
        return torch.zeros(valid.shape, dtype=torch.float64, device=valid.device)
    return torch.where(valid, new.double() - old.double(), 0.0)


def _capped_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_CAP, LOG_RATIO_CAP).exp()


def _k3(x: Tensor) -> Tensor:
    return torch.expm1(x.clamp(-LOG_RATIO_CAP, LOG_RATIO_CAP)) - x.clamp(max=LOG_RATIO_CAP)


def _kl(estimator: KLEstimator, delta: Tensor) -> tuple[Tensor, Tensor]:
    """KL estimate and its derivative by the log-prob, from delta = log_prob - ref_log_prob."""
    if estimator == "k1":
        return delta, torch.ones_like(delta)
    if estimator == "k2":
        return 0.5 * delta.square(), delta
    return _k3(-delta), -torch.expm1((-delta).clamp(-LOG_RATIO_CAP, LOG_RATIO_CAP))


def _rollout_weights(policy: PolicyInputs, ids: Tensor, valid: Tensor) -> Tensor:
    if policy.rollout_weights is None:
        return valid.double()
    weights = policy.rollout_weights.double()
    if not policy.rollout_weight_per_token:
        weights = weights[ids]
    return _nan_if_infinite(torch.where(valid, weights, 0.0))


def _nan_if_infinite(x: Tensor) -> Tensor:
    """A factor of loss terms; an infinite one must not pass for one that has saturated."""
    return x.masked_fill(x.isinf(), math.nan)


# A user's own objective: N numbers, differentiated by autograd


def _generic(
    objective: TokenLoss,
    ref_log_probs: Tensor | None,
    context_group: ProcessGroup | None,
    return_entropy: bool,
) -> Objective:
    """The aggregation rule and the ratio stats of an objective that never clips."""
    if not callable(objective) or isinstance(objective, type):
        got = repr(objective) if isinstance(objective, type) else type(objective).__name__
        raise TypeError(
            "objective must be an Objective, as in GSPO(), or a function of (log_probs, "
            f"old_log_probs, advantages, sequence_ids), got {got}"
        )
    if context_group is not None:
        raise ValueError("context_group is not available with a function as objective")
    if ref_log_probs is not None:
        raise ValueError("ref_log_probs is not used with a function as objective: close over it")
    if return_entropy:
        raise ValueError("return_entropy is not available with a function as objective")
    return Objective(
        ratio_level="token",
        clip_low=1.0,
        clip_high=1e30,
        aggregation=getattr(objective, "aggregation", "seq-mean-token-mean"),
    )


def custom_loss(
    layout: Layout, objective: TokenLoss, log_probs: Tensor, inputs: PolicyInputs
) -> PolicyLoss:
    """Loss of a function from flat (N,) tensors to loss terms; its stats come from the ratios."""
    ids = sequence_ids(layout.batch, layout.rows, layout.cu_seqlens, layout.device)
    token_advantages = inputs.advantages
    if not inputs.advantage_per_token:
        token_advantages = token_advantages[ids]
    flat = log_probs.reshape(-1)
    valid = None if layout.mask is None else layout.mask != 0

    def where_valid(x: Tensor) -> Tensor:
        return x if valid is None else torch.where(valid, x, 0.0)

    live = where_valid(flat)
    old = live.detach() if inputs.old_log_probs is None else where_valid(inputs.old_log_probs)
    terms = objective(live, old, where_valid(token_advantages), ids)
    if not isinstance(terms, Tensor) or terms.shape != flat.shape:
        got = str(tuple(terms.shape)) if isinstance(terms, Tensor) else type(terms).__name__
        raise ValueError(
            f"objective must return one loss term per token, shape {tuple(flat.shape)}, got {got}"
        )
    weights = inputs.rollout_weights
    if weights is not None:
        terms = terms * where_valid(weights if inputs.rollout_weight_per_token else weights[ids])
    # ratio 1, advantage -1: the loss of this linear problem is the average of the terms
    _, stats, log_ratio, _, inv_denominator = policy_loss_fwd(
        flat.detach(), *inputs._replace(rollout_weights=None, rollout_weight_per_token=False)
    )
    terms = where_valid(terms)
    if inputs.aggregation == "seq-mean-token-mean":
        ones = where_valid(torch.ones_like(flat))
        counts = segment_sum(ones.detach(), layout.batch, layout.cu_seqlens).clamp(min=1)
        terms = terms / counts[ids]
    loss = (terms * inv_denominator).sum()  # the other way round, large terms would overflow
    named = dict(zip(STATS, stats.unbind(), strict=True))
    kept = ("ratio_mean", "ratio_min", "ratio_max", "approx_kl", "approx_kl_k3",
            "effective_sample_size")  # fmt: skip
    return PolicyLoss(loss, {name: named[name] for name in kept} | {"log_ratio": log_ratio})
