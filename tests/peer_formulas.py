"""Formulas of verl, OpenRLHF, slime and NeMo-RL in float64, beside objectives that say the same.

Read in, and written here from, the mathematics of:

- verl 0.9.1: verl/trainer/ppo/core_algos.py, verl/trainer/ppo/rollout_corr_helper.py
- OpenRLHF bc71bb1: openrlhf/models/loss.py; 02a2605: openrlhf/models/utils.py
- slime 00c2d6d: slime/backends/megatron_utils/loss.py; 501dae9: slime/utils/ppo_utils.py
- NeMo-RL 006907a: nemo_rl/algorithms/loss/loss_functions.py, with the `calculate_kl` of its time
  in nemo_rl/algorithms/utils.py; 3520fc0 where a KL weight is said to be detached

Means are exact here. test_peer_differences.py has what differs from us for another reason.
"""

import math
from typing import NamedTuple

import torch

from gspo_ops import (
    CISPO,
    GMPO,
    GRPO,
    SAPO,
    GSPOToken,
    Objective,
    importance_weights,
)

B, T = 7, 9
DRAWS = 6
LOW, HIGH, DUAL = 0.2, 0.28, 1.7
SEQUENCE_LOW, SEQUENCE_HIGH = 0.02, 0.03
INPUT_CLAMP, OUTPUT_CLAMP = 1.0, 0.4
WEIGHT_LOW, WEIGHT_HIGH = 0.7, 1.5
KL = 0.3
EXACT = 1e-12
BORDERS = [math.log(x) for x in (1 - LOW, 1 + HIGH, DUAL, 1.0)]
SEQUENCE_BORDERS = [math.log1p(x) for x in (-SEQUENCE_LOW, SEQUENCE_HIGH, 0.0)]


class Draw(NamedTuple):
    """(B, T) each; tokens after a sequence's length hold NaN, and so do gaps in it."""

    new: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    rollout: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor  # (B,), with gaps

    def clean(self):
        """With 0 for NaN, as peers need it, which multiply by the mask."""
        return self._replace(**{
            name: torch.where(self.mask, x, 0.0)
            for name, x in self._asdict().items() if x.is_floating_point()
        })  # fmt: skip


def make_draw(seed, of_sequences=False, per_token=True):
    """Log-ratios near the borders of the clip range, and far from them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def near(borders, *shape):
        choice = torch.randint(len(borders), shape, generator=generator)
        return torch.tensor(borders, dtype=torch.float64)[choice]

    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    mask = torch.arange(T) < lengths[:, None]
    mask &= torch.rand(B, T, generator=generator) < 0.8
    mask[0] = False  # no token at all
    mask[1] = torch.arange(T) < 1
    old = -3 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    if of_sequences:
        noise = torch.where(mask, 0.3 * normal(B, T), 0.0)
        mean = noise.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        shift = near(SEQUENCE_BORDERS, B, 1) + 0.01 * normal(B, 1)
        log_ratio = noise - mean + shift
    else:
        is_near = torch.rand(B, T, generator=generator) < 0.5
        log_ratio = torch.where(is_near, near(BORDERS, B, T) + 0.02 * normal(B, T), normal(B, T))
    advantages = normal(B, T) if per_token else normal(B, 1).expand(B, T)
    zero = torch.rand(advantages.shape if per_token else (B, 1), generator=generator) < 0.15
    advantages = torch.where(zero, 0.0, advantages)
    new = old + log_ratio
    parts = new, old, new - normal(B, T), old - 0.4 * normal(B, T), advantages
    return Draw(*(torch.where(mask, x, math.nan) for x in parts), mask, lengths)


# Averages


def token_mean(x, draw):
    return (x * draw.mask).sum() / draw.mask.sum()


def of_sequences(x, draw):
    """(B, 1) means over tokens."""
    counts = draw.mask.sum(1, keepdim=True).clamp(min=1)
    return (x * draw.mask).sum(1, keepdim=True) / counts


def sequence_mean(x, draw):
    return of_sequences(x, draw).sum() / draw.mask.any(1).sum()


# Surrogates


def ratio(draw):
    return (draw.new - draw.old).exp()


def sequence_ratio(draw):
    return of_sequences(draw.new - draw.old, draw).exp().expand(B, T)


def clipped(r, A, low, high):
    """verl, slime, NeMo-RL: the larger of two losses."""
    return torch.maximum(-A * r, -A * r.clamp(1 - low, 1 + high))


def dual(loss, A):
    """verl's clip_ratio_c, slime's eps_clip_c, NeMo-RL's ratio_clip_c."""
    return torch.where(A < 0, torch.minimum(loss, -A * DUAL), loss)


def dual_of_openrlhf(r, A, low, high):
    smaller = torch.minimum(r * A, r.clamp(1 - low, 1 + high) * A)
    return -torch.where(A < 0, torch.maximum(smaller, DUAL * A), smaller)


def cispo(draw):
    """verl, slime, NeMo-RL."""
    weight = ratio(draw).detach().clamp(1 - LOW, 1 + HIGH)
    return token_mean(-weight * draw.advantages * draw.new, draw)


def sapo(draw):
    """verl."""
    tau = torch.full_like(draw.advantages, 1.6).masked_fill(draw.advantages > 0, 1.1)
    gate = torch.sigmoid(tau * (ratio(draw) - 1)) * 4 / tau
    return sequence_mean(-gate * draw.advantages, draw)


def gmpo(draw):
    """verl's geo_mean: log-ratios are clipped to [-LOW, HIGH], by the sign of the advantage."""
    log_ratio, sign = draw.new - draw.old, draw.advantages.sign()
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-LOW, HIGH))
    s, A = of_sequences(pessimistic, draw).exp(), of_sequences(draw.advantages, draw)
    return (-s * A).sum() / draw.mask.any(1).sum()


def gspo_token(draw):
    """verl's gspo."""
    s = of_sequences(draw.new - draw.old, draw).detach() + draw.new - draw.new.detach()
    return sequence_mean(clipped(s.exp(), draw.advantages, SEQUENCE_LOW, SEQUENCE_HIGH), draw)


def gspo_shared(draw):
    """OpenRLHF, slime, NeMo-RL: the gradient goes through the one ratio."""
    return sequence_mean(
        clipped(sequence_ratio(draw), draw.advantages, SEQUENCE_LOW, SEQUENCE_HIGH), draw
    )


def ppo(draw):
    return token_mean(clipped(ratio(draw), draw.advantages, LOW, HIGH), draw)


SEQUENCE_CLIP = {"clip_low": SEQUENCE_LOW, "clip_high": SEQUENCE_HIGH}
TOKEN_CLIP = {"clip_low": LOW, "clip_high": HIGH, "aggregation": "token-mean"}
SURROGATES = {
    "clipped, token mean": (ppo, GRPO(**TOKEN_CLIP), {}),
    "clipped, sequence mean": (
        lambda draw: sequence_mean(clipped(ratio(draw), draw.advantages, LOW, HIGH), draw),
        GRPO(clip_low=LOW, clip_high=HIGH), {},
    ),
    "dual clip: verl, slime, NeMo-RL": (
        lambda draw: token_mean(
            dual(clipped(ratio(draw), draw.advantages, LOW, HIGH), draw.advantages), draw
        ),
        GRPO(dual_clip=DUAL, **TOKEN_CLIP), {},
    ),
    "dual clip: OpenRLHF": (
        lambda draw: token_mean(dual_of_openrlhf(ratio(draw), draw.advantages, LOW, HIGH), draw),
        GRPO(dual_clip=DUAL, **TOKEN_CLIP), {},
    ),
    "CISPO": (cispo, CISPO(**TOKEN_CLIP), {}),
    "REINFORCE: verl's gpg, slime, NeMo-RL's disable_ppo_ratio": (
        lambda draw: token_mean(-draw.advantages * draw.new, draw),
        CISPO(clip_low=0.0, clip_high=0.0), {},
    ),
    "on-policy: NeMo-RL's force_on_policy_ratio": (
        lambda draw: token_mean(-draw.advantages * (draw.new - draw.new.detach()).exp(), draw),
        GRPO(**TOKEN_CLIP), {"on_policy": True},
    ),
    "SAPO": (sapo, SAPO(soft_temperature_pos=1.1, soft_temperature_neg=1.6), {}),
    "GMPO": (
        gmpo, GMPO(clip_low=-math.expm1(-LOW), clip_high=math.expm1(HIGH)), {"per_token": False},
    ),
    "GSPO-token: verl": (gspo_token, GSPOToken(**SEQUENCE_CLIP), {"of_sequences": True}),
    "GSPO of a shared ratio: OpenRLHF, slime, NeMo-RL": (
        gspo_shared, Objective(ratio_level="sequence_shared", **SEQUENCE_CLIP),
        {"of_sequences": True},
    ),
}  # fmt: skip


# KL


def k1(d):
    return d


def k2(d):
    return d.square() / 2


def k3(d):
    return (-d).exp() - 1 + d


def with_gradient_of_k2(estimate):
    """verl's "+"."""
    return lambda d: k2(d) - k2(d).detach() + estimate(d).detach()


def clamped(estimate, of_input=INPUT_CLAMP, of_output=OUTPUT_CLAMP):
    """NeMo-RL."""

    def kl(d):
        return estimate(d.clamp(-of_input, of_input)).clamp(-of_output, of_output)

    return kl


low_var_kl = clamped(k3, 20.0, 10.0)  # verl's, with k3 as another name
CLAMPS = {"kl_input_clamp": INPUT_CLAMP, "kl_output_clamp": OUTPUT_CLAMP}
ESTIMATES = {
    "k1": (k1, {"kl_estimator": "k1"}),
    "k2": (k2, {"kl_estimator": "k2"}),
    "k3": (k3, {"kl_estimator": "k3"}),
    "abs": (torch.abs, {"kl_estimator": "abs"}),
    "k1+": (with_gradient_of_k2(k1), {"kl_estimator": "k1+"}),
    "k3+": (with_gradient_of_k2(k3), {"kl_estimator": "k3+"}),
    "low_var_kl": (
        low_var_kl,
        {"kl_estimator": "k3", "kl_input_clamp": 20.0, "kl_output_clamp": 10.0},
    ),
    "k1, clamped": (clamped(k1), {"kl_estimator": "k1", **CLAMPS}),
    "k2, clamped": (clamped(k2), {"kl_estimator": "k2", **CLAMPS}),
    "k3, clamped": (clamped(k3), {"kl_estimator": "k3", **CLAMPS}),
}


def no_weight(draw):
    return 1.0


def differentiated_weight(draw):
    """slime's use_unbiased_kl; NeMo-RL's use_on_policy_kl_approximation."""
    return ratio(draw)


def detached_weight(draw):
    """NeMo-RL 3520fc0."""
    return ratio(draw).detach()


def score_weight(draw):
    """NeMo-RL without use_on_policy_kl_approximation: 1, with the gradient of the log-prob."""
    return (draw.new - draw.new.detach()).exp()


KL_WEIGHTS = {
    "one": (no_weight, {"kl_weight": "one"}, {}),
    "differentiated": (differentiated_weight, {"kl_weight": "ratio"}, {}),
    "detached": (detached_weight, {"kl_weight": "ratio_detached"}, {}),
    "score": (score_weight, {"kl_weight": "ratio"}, {"on_policy": True}),
}


# Importance weights of rollouts


def token_weight(draw):
    return (draw.old - draw.rollout).exp()


def truncated(draw):
    """verl and slime with a lower bound of 0 or more, OpenRLHF's tis, NeMo-RL's tis."""
    return token_weight(draw).clamp(WEIGHT_LOW, WEIGHT_HIGH)


def kept(w):
    return w * ((w >= WEIGHT_LOW) & (w <= WEIGHT_HIGH))


def icepop(draw):
    """OpenRLHF, slime, NeMo-RL."""
    return kept(token_weight(draw))


def of_whole(draw):
    """(B, 1): NeMo-RL with sequence-level ratios; verl with rollout_is=sequence."""
    return ((draw.old - draw.rollout) * draw.mask).sum(1, keepdim=True).exp()


def geometric(draw):
    return of_sequences(draw.old - draw.rollout, draw).exp()


def seq_mask_tis(draw):
    """OpenRLHF, NeMo-RL: the geometric mean decides, tokens keep their own weights."""
    return token_weight(draw) * (kept(geometric(draw)) > 0)


BOUNDS = {"low": WEIGHT_LOW, "high": WEIGHT_HIGH}
WEIGHTS = {
    "TIS": (truncated, lambda *x, **on: importance_weights(*x, **BOUNDS, **on)),
    "IcePop": (icepop, lambda *x, **on: importance_weights(*x, outside="zero", **BOUNDS, **on)),
    "of sequences": (of_whole, lambda *x, **on: importance_weights(*x, level="sequence", **on)),
    "of sequences, truncated": (
        lambda draw: of_whole(draw).clamp(max=WEIGHT_HIGH),
        lambda *x, **on: importance_weights(*x, level="sequence", high=WEIGHT_HIGH, **on),
    ),
    "of sequences, masked": (
        lambda draw: kept(of_whole(draw)),
        lambda *x, **on: importance_weights(*x, level="sequence", outside="zero", **BOUNDS, **on),
    ),
    "geometric": (
        lambda draw: kept(geometric(draw)),
        lambda *x, **on: importance_weights(*x, level="geometric", outside="zero", **BOUNDS, **on),
    ),
}  # fmt: skip


def value_and_grad(function, draw):
    """Of a scalar of a draw, by its new log-probs (B, T)."""
    new = draw.new.clone().requires_grad_()
    loss = function(draw._replace(new=new))
    (grad,) = torch.autograd.grad(-1.7 * loss, new)
    return loss.item(), grad
