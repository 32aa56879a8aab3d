"""From log-probs (N,) to a loss, its statistics and g = d loss / d log_prob: the operators.

The kernel is in `kernels/policy_loss.py`, the CPU path in `policy_cpu.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from .backend import device_guard, loadable, use_triton
from .checks import checked_targets
from .constants import STATS
from .layout import Sequences
from .operators import operator
from .parallel import Vocabulary, agree, checksum, error_of, gathered
from .policy import LossAndGrad, ObjectiveOptions, Policy
from .policy_cpu import check_values, torch_policy_loss


def empty_loss(log_probs: Tensor | None, entropy: Tensor | None, policy: Policy) -> LossAndGrad:
    """Return buffers for the result of `policy_loss_fwd`."""
    like = policy.advantages
    return LossAndGrad(
        loss=like.new_empty(()),
        stats=like.new_empty(len(STATS)),
        log_ratio=like.new_empty(policy.sequences.batch),
        g=like.new_empty(policy.sequences.rows),
        h=like.new_empty(0 if entropy is None else policy.sequences.rows),
        inv_denominator=like.new_empty(()),
    )


@operator(empty_loss)
def policy_loss_fwd(
    log_probs: Tensor | None, entropy: Tensor | None, policy: Policy
) -> LossAndGrad:
    """Compute loss, statistics, g and h.

    Log-probs are None if the policy does not read them; entropies are None without an entropy
    bonus.
    """
    # ranks have to exchange sums in between, which does not fit into one launch
    is_alone = policy.context_group is None
    if use_triton(policy.advantages) and policy.sequences.batch and is_alone:
        return triton_policy_loss(log_probs, entropy, policy)
    return torch_policy_loss(log_probs, entropy, policy)


@operator(lambda log_probs, g, scale: torch.empty_like(g))
def policy_loss_bwd(log_probs: Tensor, g: Tensor, scale: Tensor) -> Tensor:
    """Compute d loss / d log_probs.

    The log-probs are not read: they tie the gradient to its input, so that a second derivative is
    refused, not zero.
    """
    return torch.where(g == 0, 0.0, g * scale)


@operator(lambda x, sequences, context_group: x.new_empty(()))
def token_mean(x: Tensor, sequences: Sequences, context_group: str | None) -> Tensor:
    """Return the mean over the valid tokens of all ranks, of values that are 0 elsewhere."""
    total, mask = x.sum(), sequences.mask
    if context_group is None:
        return total / sequences.tokens()
    count = x.new_full((), sequences.rows) if mask is None else (mask != 0).sum().to(x.dtype)
    total, count = gathered(torch.stack([total, count]), context_group).sum(0).unbind()
    return total / count.clamp(min=1)


# What a function as objective needs from all ranks


@operator(lambda like, sequences, context_group: like.new_empty(sequences.batch))
def sequence_lengths(like: Tensor, sequences: Sequences, context_group: str | None) -> Tensor:
    """Return the number of tokens that count, (B,), in the dtype of `like`."""
    n = sequences.sum(sequences.where_valid(like.new_ones(sequences.rows)))
    return n if context_group is None else gathered(n, context_group).sum(0)


@operator(lambda x, context_group: torch.empty_like(x))
def sum_over_context(x: Tensor, context_group: str) -> Tensor:
    """Sum x over the ranks, in their order."""
    return gathered(x, context_group).sum(0)


@operator(lambda clipped, advantages, *_: advantages.new_empty(4))
def clip_fractions(
    clipped: Tensor, advantages: Tensor, sequences: Sequences, context_group: str | None
) -> Tensor:
    """Return fractions of clipped sequences and tokens, and of tokens clipped below and above."""
    ones = torch.ones_like(advantages, dtype=torch.float64)
    counts = [clipped, clipped & (advantages < 0), clipped & (advantages > 0), ones]
    per_sequence = torch.stack([sequences.sum(sequences.where_valid(x * ones)) for x in counts])
    if context_group is not None:
        per_sequence = gathered(per_sequence, context_group).sum(0)
    in_sequence, low, high, n = per_sequence
    fractions = [
        (in_sequence > 0).sum() / (n > 0).sum().clamp(min=1),
        *[x.sum() / n.sum().clamp(min=1) for x in (in_sequence, low, high)],
    ]
    return torch.stack(fractions).to(advantages.dtype)


# Triton path


def triton_policy_loss(
    log_probs: Tensor | None, entropy: Tensor | None, policy: Policy
) -> LossAndGrad:
    """Compute the result of `policy_loss_fwd` in one launch."""
    from .kernels.policy_loss import NUM_PARTIALS, policy_loss_fwd_kernel

    out = empty_loss(log_probs, entropy, policy)
    sequences, objective = policy.sequences, policy.objective
    log_clip_low, log_clip_high = objective.log_clip_range()
    with device_guard(out.g):
        policy_loss_fwd_kernel[(sequences.batch,)](
            log_probs_ptr=log_probs,
            old_log_probs_ptr=policy.old_log_probs,
            ref_log_probs_ptr=policy.ref_log_probs,
            entropy_ptr=entropy,
            advantages_ptr=policy.advantages,
            rollout_weights_ptr=policy.rollout_weights,
            mask_ptr=None if sequences.mask is None else loadable(sequences.mask),
            cu_seqlens_ptr=sequences.cu_seqlens,
            denominator_ptr=policy.denominator,
            g_ptr=out.g,
            h_ptr=out.h,
            log_ratio_ptr=out.log_ratio,
            loss_ptr=out.loss,
            stats_ptr=out.stats,
            inv_denominator_ptr=out.inv_denominator,
            partials_ptr=out.g.new_empty(sequences.batch, NUM_PARTIALS.value),
            ticket_ptr=torch.zeros(1, dtype=torch.int32, device=out.g.device),
            N=sequences.rows,
            T=sequences.rows // sequences.batch,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            dual_clip=objective.dual_clip,
            log_clip_low=log_clip_low,
            log_clip_high=log_clip_high,
            log_dual_clip=math.log(objective.dual_clip),
            tau_pos=objective.soft_temperature_pos,
            tau_neg=objective.soft_temperature_neg,
            kl_coef=objective.kl_coef,
            kl_input_clamp=objective.kl_input_clamp,
            kl_output_clamp=objective.kl_output_clamp,
            entropy_coef=objective.entropy_coef,
            RATIO_LEVEL=objective.ratio_level,
            SURROGATE=objective.surrogate,
            AGGREGATION=objective.aggregation,
            KL_ESTIMATOR=objective.kl_estimator,
            KL_WEIGHT=objective.kl_weight,
            KL_IS_CLAMPED=min(objective.kl_input_clamp, objective.kl_output_clamp) < math.inf,
            HAS_DUAL_CLIP=objective.dual_clip < math.inf,
            SHARES_GRADIENT=objective.shares_gradient(),
            ADVANTAGE_PER_TOKEN=policy.advantage_per_token,
            ROLLOUT_WEIGHT_PER_TOKEN=policy.rollout_weight_per_token,
            BLOCK_B=512,
            num_warps=8,
            **_registers(objective),
        )
    return out


def _registers(objective: ObjectiveOptions) -> dict[str, int]:
    """Return the launch options that keep losses with several terms from spilling registers.

    ptxas spills a few of 80 registers to fit one more block per multiprocessor, unless it is told
    that it may use 128. AMD's compiler runs out of scalar registers unless blocks are shorter.
    """
    has_bonus = objective.entropy_coef > 0
    if torch.version.hip is not None:
        is_clamped = min(objective.kl_input_clamp, objective.kl_output_clamp) < math.inf
        return {"BLOCK_T": 256 if is_clamped or has_bonus else 512}
    has_terms = has_bonus or objective.kl_weight != "one" or objective.shares_gradient()
    return {"BLOCK_T": 512, "maxnreg": 128} if has_terms else {"BLOCK_T": 512}


# What ranks agree on before they exchange anything


class Agreed(NamedTuple):
    """Operands that make later ops wait for the agreement, in compiled graphs, too."""

    targets: Tensor  # local ones with a vocab_group
    advantages: Tensor


def agreed(
    policy: Policy, targets: Tensor | None = None, vocabulary: Vocabulary | None = None
) -> tuple[Policy, Tensor]:
    """Return the policy and its targets, if all ranks that exchange numbers can continue."""
    like = policy.advantages
    if targets is None:
        targets = like.new_empty(0, dtype=torch.int64)
    if vocabulary is None:
        vocabulary = Vocabulary.of(None)
    if vocabulary.group is None and (policy.context_group is None or like.device.type != "cpu"):
        return policy, targets
    targets, advantages = agree_on_policy(targets, vocabulary, policy)
    return policy.with_advantages(advantages), targets


def _agreed_fake(targets: Tensor, vocabulary: Vocabulary, policy: Policy) -> Agreed:
    return Agreed(
        targets.new_empty(targets.shape, dtype=torch.int64), torch.empty_like(policy.advantages)
    )


@operator(_agreed_fake)
def agree_on_policy(targets: Tensor, vocabulary: Vocabulary, policy: Policy) -> Agreed:
    """Raise on all ranks if one of them cannot continue."""
    sizes = None
    if targets.device.type == "cpu":
        known, objective = vocabulary.known(), policy.objective
        shared = {
            "the number of sequences": policy.sequences.batch,
            "return_entropy": known.get("return_entropy", 0),
            "return_log_probs": int(policy.returns_log_probs),
            "the checksum of the objective's options": crc32(repr(objective).encode()),
        }
        counted, of_rows = _counted(targets, policy)
        error = error_of(check_values, policy)
        if vocabulary.checks_range and vocabulary.group is None:
            error = error or error_of(checked_targets, counted, vocabulary.columns)
        rows = {"the checksum of targets, mask, advantages and the like": checksum(of_rows)}
        sizes = agree(
            {
                "vocab_group": (vocabulary.group, {**known, **shared, **rows}),
                "context_group": (policy.context_group, shared),
            },
            error,
            counted if vocabulary.checks_range else None,
            vocabulary.columns,
        )
    return Agreed(vocabulary.local(targets, sizes), policy.advantages.clone())


def _counted(targets: Tensor, policy: Policy) -> tuple[Tensor, list[Tensor | None]]:
    """Return targets, and all values per token or sequence, with 0 at tokens that do not count."""
    rows, _, cu_seqlens, mask = policy.sequences
    valid = targets.new_ones(rows, dtype=torch.bool) if mask is None else mask != 0

    def counted(x: Tensor | None) -> Tensor | None:
        return x if x is None or len(x) != rows else torch.where(valid, x, 0)

    first = targets.reshape(-1).long()
    if len(first) == rows:
        first = torch.where(valid, first, 0)
    others = policy.old_log_probs, policy.advantages, policy.ref_log_probs, policy.rollout_weights
    borders = None if cu_seqlens is None else cu_seqlens.long()
    return first, [valid, borders, first, *[counted(x) for x in others]]
