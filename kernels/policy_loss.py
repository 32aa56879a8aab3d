"""From log-probs [N] to the loss, its statistics and g = d loss / d log_prob, in one launch.

One program walks over one sequence twice: first for the sums that the ratio needs, then for the
loss terms and g. It walks once more in between if tokens share a gradient through the ratio. The
program that finishes last adds up the per-sequence partial sums in a fixed order, so nothing
depends on scheduling. The batch-wide denominator is not known earlier, so g does not contain it.

Numbers that may be as large as fp32 can hold are multiplied by `SUM_SCALE`, a power of two, before
they are summed: this changes no bit, and sums cannot overflow before they are divided. A token's
loss term, its g, and the loss saturate at the largest number that fp32 can hold.
"""

import triton
import triton.language as tl

from ..constants import STATS
from .common import ESS_RATIO_CAP, LOG_RATIO_CAP, expm1, sum_pairs

# columns of the table of partial sums [B, NUM_PARTIALS]
TOKENS = tl.constexpr(0)
LOSS = tl.constexpr(1)
CLIPPED_DUAL = tl.constexpr(2)
RATIO_SUM = tl.constexpr(3)
RATIO_MIN = tl.constexpr(4)
RATIO_MAX = tl.constexpr(5)
ESS_SUM = tl.constexpr(6)
ESS_SQUARE_SUM = tl.constexpr(7)
CLIPPED_LOW = tl.constexpr(8)
CLIPPED_HIGH = tl.constexpr(9)
CLIPPED_SEQUENCE = tl.constexpr(10)
OLD_MINUS_NEW = tl.constexpr(11)
K3 = tl.constexpr(12)
REF_KL = tl.constexpr(13)
ACTIVE = tl.constexpr(14)
SEQUENCES = tl.constexpr(15)
NUM_PARTIALS = tl.constexpr(16)

# columns of the statistics
RATIO_MEAN_STAT = tl.constexpr(STATS.index("ratio_mean"))
RATIO_MIN_STAT = tl.constexpr(STATS.index("ratio_min"))
RATIO_MAX_STAT = tl.constexpr(STATS.index("ratio_max"))
CLIP_FRAC_SEQUENCES_STAT = tl.constexpr(STATS.index("clip_frac_sequences"))
CLIP_FRAC_TOKENS_STAT = tl.constexpr(STATS.index("clip_frac_tokens"))
CLIP_FRAC_LOW_STAT = tl.constexpr(STATS.index("clip_frac_low"))
CLIP_FRAC_HIGH_STAT = tl.constexpr(STATS.index("clip_frac_high"))
APPROX_KL_STAT = tl.constexpr(STATS.index("approx_kl"))
APPROX_KL_K3_STAT = tl.constexpr(STATS.index("approx_kl_k3"))
ESS_STAT = tl.constexpr(STATS.index("effective_sample_size"))
ACTIVE_STAT = tl.constexpr(STATS.index("active_token_frac"))
REF_KL_STAT = tl.constexpr(STATS.index("ref_kl"))
CLIP_FRAC_DUAL_STAT = tl.constexpr(STATS.index("clip_frac_dual"))

SUM_SCALE = tl.constexpr(2.0**-24)  # for as many terms as fp32 can count
SUM_UNIT = tl.constexpr(2.0**24)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def cap_log_ratio(x):
    """Keep exp(x) finite; NaN stays NaN."""
    capped = tl.minimum(tl.maximum(x, -LOG_RATIO_CAP), LOG_RATIO_CAP)
    return tl.where(x == x, capped, x)


@triton.jit
def cap_ess_ratio(ratio):
    return tl.minimum(tl.maximum(ratio, 1.0 / ESS_RATIO_CAP), ESS_RATIO_CAP)


@triton.jit
def k3(x):
    """Return exp(x) - 1 - x, never negative in exact arithmetic, even beyond the cap."""
    return expm1(cap_log_ratio(x)) - tl.minimum(x, LOG_RATIO_CAP)


@triton.jit
def saturate(x):
    """Clamp x to the finite range of fp32; NaN stays NaN."""
    return tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))


@triton.jit
def load_finite(ptr, valid):
    """Load a factor of a loss term; NaN if it is infinite, which must not pass for saturated."""
    x = tl.load(ptr, mask=valid, other=0.0)
    return tl.where(tl.abs(x) == float("inf"), float("nan"), x)


@triton.jit
def difference(new_ptr, old_ptr, rows, valid):
    """Return new - old where valid, 0 elsewhere; 0 everywhere without old (on-policy)."""
    delta = tl.zeros(rows.shape, tl.float32)
    if old_ptr is not None:
        new = tl.load(new_ptr + rows, mask=valid, other=0.0)
        delta = new - tl.load(old_ptr + rows, mask=valid, other=0.0)
    return delta


@triton.jit
def clamp(x, low, high):
    """Clamp x to [low, high]; NaN stays NaN."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, low), high), x)


@triton.jit
def surrogate(
    ratio, decisive, advantage, valid,
    clip_low, clip_high, dual_clip, log_clip_low, log_clip_high, log_dual_clip, tau_pos, tau_neg,
    SURROGATE: tl.constexpr, CLIPS_RATIO: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr,
):  # fmt: skip
    """Return the surrogate and its derivative, and masks of where it is clipped.

    Both are per unit of advantage. The derivative is with respect to the log-ratio, or to the
    log-prob for "weighted". The masks mark where the decisive log-ratio is beyond the clip range.
    """
    is_high = valid & (advantage > 0) & (decisive > log_clip_high)
    is_low = valid & (advantage < 0) & (decisive < log_clip_low)
    is_dual = tl.zeros_like(is_high)
    value = ratio
    slope = ratio
    if SURROGATE == "weighted":
        value = clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
        slope = value
    elif SURROGATE == "soft":
        tau = tl.where(advantage > 0, tau_pos, tau_neg)
        x = tau * (ratio - 1.0)
        gate = 1.0 / (1.0 + tl.exp(-x))
        value = 4.0 * gate / tau
        slope = (4.0 * gate * (1.0 / (1.0 + tl.exp(x)))) * ratio
    elif CLIPS_RATIO:
        bound = tl.where(is_high, 1.0 + clip_high, 1.0 - clip_low)
        value = tl.where(is_high | is_low, bound, ratio)
        if HAS_DUAL_CLIP:
            is_dual = valid & (advantage < 0) & (decisive > log_dual_clip)
            value = tl.where(is_dual, dual_clip, value)
    return value, slope, is_low, is_high, is_dual


@triton.jit
def kl_terms(
    delta, ratio, kl_input_clamp, kl_output_clamp,
    KL_ESTIMATOR: tl.constexpr, KL_WEIGHT: tl.constexpr, KL_IS_CLAMPED: tl.constexpr,
):  # fmt: skip
    """Return KL estimates, and derivatives with respect to delta = log_prob - ref_log_prob."""
    d = delta
    if KL_IS_CLAMPED:
        d = clamp(delta, -kl_input_clamp, kl_input_clamp)
    if KL_ESTIMATOR == "k1" or KL_ESTIMATOR == "k1+":
        ref_kl = d
        grad = 1.0
    elif KL_ESTIMATOR == "k2":
        ref_kl = 0.5 * d * d
        grad = saturate(d)
    elif KL_ESTIMATOR == "abs":
        ref_kl = tl.abs(d)
        grad = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    else:
        ref_kl = k3(-d)
        grad = -expm1(cap_log_ratio(-d))
    if KL_IS_CLAMPED:
        is_clamped = (delta > kl_input_clamp) | (delta < -kl_input_clamp)
        is_clamped |= tl.abs(ref_kl) > kl_output_clamp
        grad = tl.where(is_clamped, 0.0, grad)
        ref_kl = clamp(ref_kl, -kl_output_clamp, kl_output_clamp)
    if KL_ESTIMATOR == "k1+" or KL_ESTIMATOR == "k3+":
        grad = saturate(delta)
    ref_kl = saturate(ref_kl)
    if KL_WEIGHT != "one":
        ref_kl = saturate(ratio * ref_kl)
        grad = saturate(ratio * grad)
    return ref_kl, grad


@triton.jit
def load_valid(mask_ptr, rows, in_range):
    valid = in_range
    if mask_ptr is not None:
        valid = in_range & (tl.load(mask_ptr + rows, mask=in_range, other=0) != 0)
    return valid


@triton.jit
def total(partials_ptr, B, BLOCK_B: tl.constexpr):
    """Sum one column of the table of partial sums, in a fixed order."""
    acc = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        at = partials_ptr + b.to(tl.int64) * NUM_PARTIALS
        # .cg: another multiprocessor has written it
        acc += tl.load(at, mask=b < B, other=0.0, cache_modifier=".cg")
    return tl.sum(acc, axis=0)


@triton.jit
def per(x, count):
    """Return x / count, exactly 1 where they are equal; 0 if there are none."""
    return tl.math.div_rn(x, tl.maximum(count, 1.0))


@triton.jit
def largest(partials_ptr, sign, B, BLOCK_B: tl.constexpr):
    """Return the maximum of sign * x over one column of the table of partial sums."""
    acc = tl.full([BLOCK_B], float("-inf"), tl.float32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        at = partials_ptr + b.to(tl.int64) * NUM_PARTIALS
        x = tl.load(at, mask=b < B, other=0.0, cache_modifier=".cg")
        acc = tl.maximum(acc, tl.where(b < B, sign * x, float("-inf")))
    return tl.max(acc, axis=0)


@triton.jit
def finish(
    partials_ptr, denominator_ptr, loss_ptr, stats_ptr, inv_denominator_ptr, B,
    RATIO_LEVEL: tl.constexpr, AGGREGATION: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Compute loss and statistics from the partial sums of the sequences."""
    tokens = total(partials_ptr + TOKENS, B, BLOCK_B)
    sequences = total(partials_ptr + SEQUENCES, B, BLOCK_B)
    if denominator_ptr is not None:
        denominator = tl.load(denominator_ptr).to(tl.float32)
        denominator = tl.where(denominator > 0, denominator, float("nan"))
    elif AGGREGATION == "token-mean":
        denominator = tl.maximum(tokens, 1.0)
    elif AGGREGATION == "token-sum":
        denominator = tokens * 0.0 + 1.0
    else:
        denominator = tl.maximum(sequences, 1.0)
    tl.store(inv_denominator_ptr, 1.0 / denominator)
    loss = total(partials_ptr + LOSS, B, BLOCK_B) / denominator * SUM_UNIT
    tl.store(loss_ptr, saturate(loss))

    ratios = tokens if RATIO_LEVEL == "token" else sequences
    ratio_sum = total(partials_ptr + RATIO_SUM, B, BLOCK_B)
    ratio_min = -largest(partials_ptr + RATIO_MIN, -1.0, B, BLOCK_B)
    ratio_max = largest(partials_ptr + RATIO_MAX, 1.0, B, BLOCK_B)
    clipped_sequences = total(partials_ptr + CLIPPED_SEQUENCE, B, BLOCK_B)
    clipped_low = total(partials_ptr + CLIPPED_LOW, B, BLOCK_B)
    clipped_high = total(partials_ptr + CLIPPED_HIGH, B, BLOCK_B)
    ess_sum = total(partials_ptr + ESS_SUM, B, BLOCK_B)
    ess_square_sum = total(partials_ptr + ESS_SQUARE_SUM, B, BLOCK_B)
    # an empty batch reports what an on-policy one would
    some = ratios > 0
    ess = per(ess_sum, ratios) * tl.math.div_rn(ess_sum, tl.where(some, ess_square_sum, 1.0))
    tl.store(stats_ptr + RATIO_MEAN_STAT, tl.where(some, per(ratio_sum, ratios) * SUM_UNIT, 1.0))
    tl.store(stats_ptr + RATIO_MIN_STAT, tl.where(some, ratio_min, 1.0))
    tl.store(stats_ptr + RATIO_MAX_STAT, tl.where(some, ratio_max, 1.0))
    tl.store(stats_ptr + CLIP_FRAC_SEQUENCES_STAT, per(clipped_sequences, sequences))
    tl.store(stats_ptr + CLIP_FRAC_TOKENS_STAT, per(clipped_low + clipped_high, tokens))
    tl.store(stats_ptr + CLIP_FRAC_LOW_STAT, per(clipped_low, tokens))
    tl.store(stats_ptr + CLIP_FRAC_HIGH_STAT, per(clipped_high, tokens))
    old_minus_new = total(partials_ptr + OLD_MINUS_NEW, B, BLOCK_B)
    tl.store(stats_ptr + APPROX_KL_STAT, per(old_minus_new, tokens) * SUM_UNIT)
    tl.store(
        stats_ptr + APPROX_KL_K3_STAT, per(total(partials_ptr + K3, B, BLOCK_B), tokens) * SUM_UNIT
    )
    tl.store(stats_ptr + ESS_STAT, tl.where(some, ess, 1.0))
    tl.store(stats_ptr + ACTIVE_STAT, per(total(partials_ptr + ACTIVE, B, BLOCK_B), tokens))
    ref_kl = per(total(partials_ptr + REF_KL, B, BLOCK_B), tokens) * SUM_UNIT
    tl.store(stats_ptr + REF_KL_STAT, saturate(ref_kl))
    if HAS_DUAL_CLIP:
        clipped_dual = total(partials_ptr + CLIPPED_DUAL, B, BLOCK_B)
        tl.store(stats_ptr + CLIP_FRAC_DUAL_STAT, per(clipped_dual, tokens))


@triton.jit
def policy_loss_fwd_kernel(
    # inputs; log_probs, old, ref, entropy [N]; advantages, rollout weights [B] or [N]; each may be
    # None
    log_probs_ptr, old_log_probs_ptr, ref_log_probs_ptr, entropy_ptr, advantages_ptr,
    rollout_weights_ptr, mask_ptr, cu_seqlens_ptr, denominator_ptr,
    # outputs: g, h [N], log_ratio [B], loss, stats as `finish` writes them, 1 / denominator
    g_ptr, h_ptr, log_ratio_ptr, loss_ptr, stats_ptr, inv_denominator_ptr,
    # workspace: partial sums [B, NUM_PARTIALS] and a ticket that starts at 0
    partials_ptr, ticket_ptr,
    # shapes: rows of sequence b are cu_seqlens[b] .. cu_seqlens[b + 1], or b * T .. (b + 1) * T
    N, T,
    # options
    clip_low, clip_high, dual_clip, log_clip_low, log_clip_high, log_dual_clip, tau_pos, tau_neg,
    kl_coef, kl_input_clamp, kl_output_clamp, entropy_coef,
    RATIO_LEVEL: tl.constexpr, SURROGATE: tl.constexpr, AGGREGATION: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr, KL_WEIGHT: tl.constexpr, KL_IS_CLAMPED: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr, SHARES_GRADIENT: tl.constexpr,
    ADVANTAGE_PER_TOKEN: tl.constexpr, ROLLOUT_WEIGHT_PER_TOKEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    B = tl.num_programs(0)
    if cu_seqlens_ptr is not None:
        # never past the end of the rows, whatever the device tensor holds
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b).to(tl.int64), 0), N)
        last = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b + 1).to(tl.int64), first), N)
    else:
        first = b.to(tl.int64) * T
        last = first + T
    length = last - first
    t = tl.arange(0, BLOCK_T)

    # the sums that the sequence's ratio needs
    count = tl.zeros([BLOCK_T], tl.int32)
    log_ratio_sum = tl.zeros([BLOCK_T], tl.float32)
    clipped_sum = tl.zeros([BLOCK_T], tl.float32)
    rollout_sum = tl.zeros([BLOCK_T], tl.float32)
    if RATIO_LEVEL == "geometric":
        of_sequence = load_finite(advantages_ptr + b, True)
        lowest = tl.where(of_sequence < 0, log_clip_low, float("-inf"))
        highest = tl.where(of_sequence > 0, log_clip_high, float("inf"))
    for start in range(0, length, BLOCK_T):
        rows = first + start + t
        valid = load_valid(mask_ptr, rows, start + t < length)
        count += valid.to(tl.int32)
        log_ratio = difference(log_probs_ptr, old_log_probs_ptr, rows, valid)
        log_ratio_sum += SUM_SCALE * log_ratio
        if RATIO_LEVEL == "geometric":
            clipped = clamp(log_ratio, lowest, highest)
            clipped_sum += tl.where(valid, SUM_SCALE * clipped, 0.0)
        if ROLLOUT_WEIGHT_PER_TOKEN:
            rollout_sum += load_finite(rollout_weights_ptr + rows, valid)
    n = tl.sum(count, axis=0).to(tl.float32)
    log_ratio_total = sum_pairs(log_ratio_sum)
    inv_n = 1.0 / tl.maximum(n, 1.0)
    sequence_log_ratio = log_ratio_total * inv_n * SUM_UNIT
    tl.store(log_ratio_ptr + b, sequence_log_ratio)
    if RATIO_LEVEL == "geometric":
        sequence_log_ratio = sum_pairs(clipped_sum) * inv_n * SUM_UNIT
    sequence_ratio = tl.exp(cap_log_ratio(sequence_log_ratio))

    # what is known already is stored now, to keep registers free
    row_ptr = partials_ptr + b.to(tl.int64) * NUM_PARTIALS
    is_some = n > 0
    sequences = tl.where(is_some, 1.0, 0.0)
    tl.store(row_ptr + TOKENS, n)
    tl.store(row_ptr + SEQUENCES, sequences)
    tl.store(row_ptr + OLD_MINUS_NEW, -log_ratio_total)
    if RATIO_LEVEL != "token":
        ess_ratio = tl.where(is_some, cap_ess_ratio(sequence_ratio), 0.0)
        tl.store(row_ptr + RATIO_SUM, tl.where(is_some, SUM_SCALE * sequence_ratio, 0.0))
        tl.store(row_ptr + RATIO_MIN, tl.where(is_some, sequence_ratio, float("inf")))
        tl.store(row_ptr + RATIO_MAX, tl.where(is_some, sequence_ratio, float("-inf")))
        tl.store(row_ptr + ESS_SUM, ess_ratio)
        tl.store(row_ptr + ESS_SQUARE_SUM, ess_ratio * ess_ratio)

    weight = 1.0
    if AGGREGATION == "seq-mean-token-mean":
        weight = inv_n
    advantage = tl.zeros([BLOCK_T], tl.float32)
    if not ADVANTAGE_PER_TOKEN:
        advantage += load_finite(advantages_ptr + b, True)
    rollout_weight = tl.full([BLOCK_T], 1.0, tl.float32)
    rollout_mean = 1.0
    if ROLLOUT_WEIGHT_PER_TOKEN:
        rollout_mean = sum_pairs(rollout_sum) * inv_n
    elif rollout_weights_ptr is not None:
        rollout_mean = load_finite(rollout_weights_ptr + b, True)
        rollout_weight *= rollout_mean

    # d loss / d log of the ratio that tokens share, divided by their number
    CLIPS_RATIO: tl.constexpr = RATIO_LEVEL != "geometric"
    SHARES_SURROGATE: tl.constexpr = RATIO_LEVEL == "sequence_shared" and SURROGATE != "weighted"
    shared = 0.0
    if SHARES_GRADIENT:
        shared_sum = tl.zeros([BLOCK_T], tl.float32)
        for start in range(0, length, BLOCK_T):
            rows = first + start + t
            valid = load_valid(mask_ptr, rows, start + t < length)
            log_ratio = tl.where(valid, sequence_log_ratio, 0.0)
            ratio = tl.exp(cap_log_ratio(log_ratio))
            by_log_ratio = tl.zeros([BLOCK_T], tl.float32)
            if SHARES_SURROGATE:
                if ADVANTAGE_PER_TOKEN:
                    advantage = load_finite(advantages_ptr + rows, valid)
                if ROLLOUT_WEIGHT_PER_TOKEN:
                    rollout_weight = load_finite(rollout_weights_ptr + rows, valid)
                _, slope, is_low, is_high, is_dual = surrogate(
                    ratio, log_ratio, advantage, valid, clip_low, clip_high, dual_clip,
                    log_clip_low, log_clip_high, log_dual_clip, tau_pos, tau_neg, SURROGATE,
                    CLIPS_RATIO, HAS_DUAL_CLIP,
                )  # fmt: skip
                by_log_ratio = -(slope * weight) * (advantage * rollout_weight)
                by_log_ratio = tl.where(is_low | is_high | is_dual, 0.0, by_log_ratio)
            if KL_WEIGHT == "ratio":
                delta = difference(log_probs_ptr, ref_log_probs_ptr, rows, valid)
                ref_kl, _ = kl_terms(
                    delta, ratio, kl_input_clamp, kl_output_clamp, KL_ESTIMATOR, KL_WEIGHT,
                    KL_IS_CLAMPED,
                )  # fmt: skip
                by_log_ratio += (kl_coef * weight) * ref_kl
            shared_sum += tl.where(valid, SUM_SCALE * saturate(by_log_ratio), 0.0)
        shared = sum_pairs(shared_sum) * inv_n * SUM_UNIT

    # loss terms and g
    loss = tl.zeros([BLOCK_T], tl.float32)
    ratio_sum = tl.zeros([BLOCK_T], tl.float32)
    ratio_min = tl.full([BLOCK_T], float("inf"), tl.float32)
    ratio_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    ess_sum = tl.zeros([BLOCK_T], tl.float32)
    ess_square_sum = tl.zeros([BLOCK_T], tl.float32)
    clipped_low = tl.zeros([BLOCK_T], tl.int32)
    clipped_high = tl.zeros([BLOCK_T], tl.int32)
    clipped_dual = tl.zeros([BLOCK_T], tl.int32)
    k3_sum = tl.zeros([BLOCK_T], tl.float32)
    ref_kl_sum = tl.zeros([BLOCK_T], tl.float32)
    active = tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, length, BLOCK_T):
        rows = first + start + t
        in_range = start + t < length
        valid = load_valid(mask_ptr, rows, in_range)
        token_log_ratio = difference(log_probs_ptr, old_log_probs_ptr, rows, valid)
        if RATIO_LEVEL == "token":
            log_ratio = token_log_ratio
        else:
            log_ratio = tl.where(valid, sequence_log_ratio, 0.0)
        ratio = tl.exp(cap_log_ratio(log_ratio))
        if ADVANTAGE_PER_TOKEN:
            advantage = load_finite(advantages_ptr + rows, valid)
        if ROLLOUT_WEIGHT_PER_TOKEN:
            rollout_weight = load_finite(rollout_weights_ptr + rows, valid)
        value, slope, is_low, is_high, is_dual = surrogate(
            ratio, log_ratio if CLIPS_RATIO else token_log_ratio, advantage, valid,
            clip_low, clip_high, dual_clip, log_clip_low, log_clip_high, log_dual_clip, tau_pos,
            tau_neg, SURROGATE, CLIPS_RATIO, HAS_DUAL_CLIP,
        )  # fmt: skip
        # weights first: if the result fits into fp32, every step does, and no inf meets a 0
        loss_term = -(value * weight) * (advantage * rollout_weight)
        if SURROGATE == "weighted":
            log_prob = tl.load(log_probs_ptr + rows, mask=valid, other=0.0)
            loss_term = tl.where(loss_term == 0, 0.0, loss_term * log_prob)
            g = -(slope * weight) * (advantage * rollout_weight)
        elif SHARES_SURROGATE:
            g = tl.zeros([BLOCK_T], tl.float32)
        else:
            # every token's rollout weight reaches every token through the sequence's one ratio
            IS_MEAN: tl.constexpr = RATIO_LEVEL == "sequence" or RATIO_LEVEL == "geometric"
            g_weight = rollout_mean if IS_MEAN else rollout_weight
            has_stopped = is_low | is_high | is_dual
            g = tl.where(has_stopped, 0.0, -(slope * weight) * (advantage * g_weight))
        if ref_log_probs_ptr is not None:
            delta = difference(log_probs_ptr, ref_log_probs_ptr, rows, valid)
            ref_kl, ref_kl_grad = kl_terms(
                delta, ratio, kl_input_clamp, kl_output_clamp, KL_ESTIMATOR, KL_WEIGHT,
                KL_IS_CLAMPED,
            )  # fmt: skip
            ref_kl_sum += tl.where(valid, SUM_SCALE * ref_kl, 0.0)
            loss_term += (kl_coef * weight) * ref_kl
            g += (kl_coef * weight) * ref_kl_grad
            if KL_WEIGHT == "ratio" and not SHARES_GRADIENT:
                g += (kl_coef * weight) * ref_kl
        if SHARES_GRADIENT:
            g += shared
        if entropy_ptr is not None:
            h = tl.where(valid, -(entropy_coef * weight), 0.0)
            loss_term += h * tl.load(entropy_ptr + rows, mask=valid, other=0.0)
            tl.store(h_ptr + rows, h, mask=in_range)
        g = tl.where(valid, saturate(g), 0.0)
        tl.store(g_ptr + rows, g, mask=in_range)

        loss += tl.where(valid, SUM_SCALE * saturate(loss_term), 0.0)
        clipped_low += is_low.to(tl.int32)
        clipped_high += is_high.to(tl.int32)
        k3_sum += SUM_SCALE * k3(token_log_ratio)
        if entropy_ptr is not None:
            active += ((g != 0) | (h != 0)).to(tl.int32)
        else:
            active += (g != 0).to(tl.int32)
        if HAS_DUAL_CLIP:
            clipped_dual += is_dual.to(tl.int32)
        if RATIO_LEVEL == "token":
            ess_ratio = tl.where(valid, cap_ess_ratio(ratio), 0.0)
            ratio_sum += tl.where(valid, SUM_SCALE * ratio, 0.0)
            ratio_min = tl.minimum(ratio_min, tl.where(valid, ratio, float("inf")))
            ratio_max = tl.maximum(ratio_max, tl.where(valid, ratio, float("-inf")))
            ess_sum += ess_ratio
            ess_square_sum += ess_ratio * ess_ratio

    if RATIO_LEVEL == "token":
        tl.store(row_ptr + RATIO_SUM, sum_pairs(ratio_sum))
        tl.store(row_ptr + RATIO_MIN, tl.min(ratio_min, axis=0))
        tl.store(row_ptr + RATIO_MAX, tl.max(ratio_max, axis=0))
        tl.store(row_ptr + ESS_SUM, sum_pairs(ess_sum))
        tl.store(row_ptr + ESS_SQUARE_SUM, sum_pairs(ess_square_sum))
    low = tl.sum(clipped_low, axis=0)
    high = tl.sum(clipped_high, axis=0)
    tl.store(row_ptr + LOSS, sum_pairs(loss))
    tl.store(row_ptr + CLIPPED_LOW, low)
    tl.store(row_ptr + CLIPPED_HIGH, high)
    tl.store(row_ptr + CLIPPED_SEQUENCE, tl.where(low + high > 0, 1.0, 0.0))
    if HAS_DUAL_CLIP:
        tl.store(row_ptr + CLIPPED_DUAL, tl.sum(clipped_dual, axis=0))
    tl.store(row_ptr + K3, sum_pairs(k3_sum))
    tl.store(row_ptr + REF_KL, sum_pairs(ref_kl_sum))
    tl.store(row_ptr + ACTIVE, tl.sum(active, axis=0))

    if cu_seqlens_ptr is not None:
        # rows that no sequence claims must not train silently
        if b == 0:
            for start in range(0, first, BLOCK_T):
                rows = start + t
                tl.store(g_ptr + rows, float("nan"), mask=rows < first)
        if b == B - 1:
            for start in range(last, N, BLOCK_T):
                rows = start + t
                tl.store(g_ptr + rows, float("nan"), mask=rows < N)

    # one thread makes all stores through scalar pointers and also takes the ticket: its release
    # covers the partial sums, however far the stores of other threads are
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == B - 1:
        finish(
            partials_ptr, denominator_ptr, loss_ptr, stats_ptr, inv_denominator_ptr, B,
            RATIO_LEVEL, AGGREGATION, HAS_DUAL_CLIP, BLOCK_B,
        )  # fmt: skip
