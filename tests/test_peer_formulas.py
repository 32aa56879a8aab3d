"""An `Objective` computes what other trainers do, written out here in float64.

These are the sources; their mathematics was read, and no code was taken:

- verl 0.9.1: verl/trainer/ppo/core_algos.py and rollout_corr_helper.py; their functions are
  oracles too where verl is installed
- OpenRLHF at 3e57e80: openrlhf/models/loss.py; openrlhf/models/utils.py at 473f61b
- slime at 00c2d6d: slime/backends/megatron_utils/loss.py; slime/utils/ppo_utils.py at 501dae9
- NeMo-RL at 006907a: nemo_rl/algorithms/loss/loss_functions.py, with calculate_kl of utils.py as
  it calls it; the version before at b816b57: nemo_rl/algorithms/loss_functions.py
- TRL 1.16, for one KL term: trl/trainer/grpo_trainer.py

k1, k2, k3, TIS, IcePop and dual clip are the same in all but TRL, and are named "all".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

import gspo_ops
from gspo_ops import (
    CISPO,
    GMPO,
    GRPO,
    GSPO,
    SAPO,
    GSPOToken,
    Objective,
    importance_weights,
    off_policy_weights,
    reference,
)

B, T = 12, 9


# Draws


@dataclass
class Batch:
    """Log-probs (B, T) of the new, old, reference and rollout policy, advantages and mask."""

    new: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    rollout: torch.Tensor
    advantages: torch.Tensor  # (B, T)
    mask: torch.Tensor
    upstream: torch.Tensor  # gradient of the loss

    def sums(self, x):
        """Return the sums over each sequence's tokens, (B, 1)."""
        return torch.where(self.mask, x, 0.0).sum(1, keepdim=True)

    def means(self, x):
        return self.sums(x) / self.mask.sum(1, keepdim=True).clamp(min=1)

    def mean_of_tokens(self, x):
        return self.sums(x).sum() / self.mask.sum()

    def mean_of_sequences(self, x):
        """Return the mean over sequences, without those that have no token."""
        return self.means(x).sum() / self.mask.any(1).sum()


@dataclass(frozen=True)
class Borders:
    """The borders of log-ratios: of a token's, or of their mean or sum in a sequence."""

    at: tuple[float, ...]
    of: str = "token"

    def draw(self, mask, generator):
        """Draw log-ratios 1e-4 to both sides of every border, and far beyond."""
        near = [border + side for border in self.at for side in (-1e-4, 1e-4)]
        far = [2.5 * border for border in self.at]
        values = torch.tensor([*near, *far, -0.02, 0.02], dtype=torch.float64)
        if self.of == "token":
            return values[torch.randint(len(values), (B, T), generator=generator)]
        noise = torch.rand(B, T, generator=generator).double() - 0.5
        lengths = mask.sum(1, keepdim=True)
        noise -= (noise * mask).sum(1, keepdim=True) / lengths
        chosen = torch.randperm(len(values), generator=generator).repeat(B)[:B]
        return noise + values[chosen, None] / (lengths if self.of == "sum" else 1)


def make_batch(formula, seed):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    mask = (torch.arange(T) < 1 + T * rand(B, 1)) & (rand(B, T) < 0.8)
    mask[:, 0] |= ~mask.any(1)
    width = T if formula.per_token else 1
    advantages = torch.where(rand(B, width) < 0.5, -1.0, 1.0) * (0.3 + rand(B, width))
    advantages[rand(B, width) < 0.1] = 0.0
    new = -4 * rand(B, T)
    old = new - formula.borders.draw(mask, generator)
    return Batch(
        new=new.clone().requires_grad_(),
        old=old,
        ref=new - formula.ref_borders.draw(mask, generator),
        rollout=old - formula.rollout_borders.draw(mask, generator),
        advantages=advantages.expand(B, T).contiguous(),
        mask=mask,
        upstream=0.5 + rand(()),
    )


# Surrogates: one term per token


def token_ratio(x):
    return (x.new - x.old).exp()


def sequence_ratio(x):
    return x.means(x.new - x.old).exp()


def one_with_gradient(x):
    """Return 1, with a derivative of 1 with respect to a token's log-prob."""
    return (x.new - x.new.detach()).exp()


def gspo_token_ratio(x):
    return sequence_ratio(x).detach() * one_with_gradient(x)


def clipped(x, ratio, low=0.2, high=0.2):
    return -torch.minimum(ratio * x.advantages, ratio.clamp(1 - low, 1 + high) * x.advantages)


def dual_clipped(x, terms, most):
    return torch.where(x.advantages < 0, torch.minimum(terms, -most * x.advantages), terms)


def ppo(x):
    return clipped(x, token_ratio(x))


def gspo(x, ratio=sequence_ratio):
    return clipped(x, ratio(x), 3e-3, 4e-3)


def reinforce(x):
    return -x.advantages * x.new


def cispo(x):
    return token_ratio(x).clamp(0.8, 1.28).detach() * reinforce(x)


def sapo(x):
    tau = torch.full_like(x.advantages, 1.05).masked_fill(x.advantages > 0, 1.0)
    return -4 / tau * torch.sigmoid(tau * (token_ratio(x) - 1)) * x.advantages


def gmpo(x, width=0.4):
    """Return one term per sequence; a log-ratio is clipped where that lowers the objective."""
    log_ratio, sign = x.new - x.old, x.advantages.sign()
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-width, width))
    return (-x.means(x.advantages) * x.means(pessimistic).exp()).expand(B, T)


# KL estimates, of d = log_prob - ref_log_prob


def k1(d):
    return d


def k2(d):
    return d.square() / 2


def k3(d):
    return (-d).exp() - 1 + d


def clamped(estimate, before=0.5, after=0.12):
    return lambda d: estimate(d.clamp(-before, before)).clamp(-after, after)


def straight_through(estimate):
    return lambda d: estimate(d).detach() + k2(d) - k2(d).detach()


def with_kl(estimate, weight=lambda x: 1.0, surrogate=ppo):
    return lambda x: surrogate(x) + 0.1 * weight(x) * estimate(x.new - x.ref)


# Importance weights of the trainer's policy against the rollout's


def weight(x, part=lambda log_weights: log_weights):
    return part(x.old - x.rollout).exp()


def kept(weights, low, high):
    return torch.where((weights >= low) & (weights <= high), weights, 0.0)


def ours(**options):
    """Return a function that makes `importance_weights` an argument of a loss."""
    return lambda x: {
        "rollout_weights": importance_weights(x.old, x.rollout, mask=x.mask, **options)
    }


# The table


@dataclass
class Formula:
    """A peer's loss, and the arguments that give the same loss here."""

    terms: Callable  # of a batch: (B, T)
    objective: Objective
    options: Callable = lambda x: {}  # of a batch: further arguments
    second: Callable | None = None  # of a batch: arguments of a call to add
    mean: str = "tokens"
    borders: Borders = Borders((math.log(0.8), math.log(1.2)))
    ref_borders: Borders = Borders((-0.7, 0.7))
    rollout_borders: Borders = Borders((-0.7, 0.7))
    per_token: bool = True  # advantages

    def calls(self, x):
        """Return the arguments of each call, by name."""
        arguments = {
            "log_probs": x.new,
            "old_log_probs": x.old,
            "advantages": x.advantages if self.per_token else x.advantages[:, 0].contiguous(),
            "mask": x.mask,
            "objective": self.objective,
            "ref_log_probs": x.ref if self.objective.kl_coef else None,
        } | self.options(x)
        return [arguments] + ([arguments | self.second(x)] if self.second else [])


def grpo(**options):
    return GRPO(clip_low=0.2, clip_high=0.2, aggregation="token-mean", **options)


def kl(**options):
    return grpo(kl_coef=0.1, **options)


def of_log_prob(**options):
    """Return the objective of log-probs times advantages."""
    return Objective(ratio_level="token", surrogate="weighted", aggregation="token-mean", **options)


def only_kl(x, **options):
    """Return the arguments of a second call, for the KL term alone."""
    advantages = torch.zeros_like(x.advantages)
    return {"objective": kl(**options), "advantages": advantages, "ref_log_probs": x.ref}


def over_tokens(x):
    return {"denominator": x.mask.sum()}


CLIP = {"clip_low": 3e-3, "clip_high": 4e-3}
LOG_CLIP = math.log1p(-3e-3), math.log1p(4e-3)
SEQUENCES = {"mean": "sequences", "borders": Borders(LOG_CLIP, "mean")}
SHARED = Objective(ratio_level="sequence_shared", **CLIP)
SHARED_SUM = replace(SHARED, aggregation="seq-mean-token-sum")
ESTIMATES = {
    "k1": k1, "k2": k2, "k3": k3, "abs": torch.abs, "k1+": straight_through(k1),
    "k3+": straight_through(k3),
}  # fmt: skip
CLAMPS = [  # clamps of d and of the estimate, and the d at which they begin
    ("k1", 0.5, math.inf, (-0.5, 0.5)),
    ("k1", math.inf, 0.12, (-0.12, 0.12)),
    ("k2", 0.5, math.inf, (-0.5, 0.5)),
    ("k2", math.inf, 0.12, (-math.sqrt(0.24), math.sqrt(0.24))),
    ("k3", 0.5, 0.12, (-0.452958, 0.5)),
]
K3_CLAMPS = {"kl_input_clamp": 0.5, "kl_output_clamp": 0.12}
K3_BORDERS = Borders(CLAMPS[-1][-1])
CORRECT = (torch.arange(B) % 2 == 0)[:, None]

SURROGATES = {
    "all: clip": Formula(
        lambda x: clipped(x, token_ratio(x), 0.2, 0.28),
        GRPO(clip_low=0.2, clip_high=0.28, aggregation="token-mean"),
        borders=Borders((math.log(0.8), math.log(1.28))),
    ),
    "all: dual clip": Formula(
        lambda x: dual_clipped(x, ppo(x), 3.0), grpo(dual_clip=3.0),
        borders=Borders((math.log(0.8), math.log(1.2), math.log(3.0))),
    ),
    "OpenRLHF gspo, NeMo-RL sequence_level_importance_ratios": Formula(gspo, SHARED, **SEQUENCES),
    "OpenRLHF gspo, NeMo-RL: dual clip": Formula(
        lambda x: dual_clipped(x, gspo(x), 1.02),
        replace(SHARED, dual_clip=1.02), mean="sequences",
        borders=Borders((*LOG_CLIP, math.log(1.02)), "mean"),
    ),
    "slime gspo": Formula(gspo, GSPO(**CLIP), **SEQUENCES, per_token=False),
    "slime gspo, calculate_per_token_loss": Formula(
        gspo, SHARED_SUM, over_tokens, borders=Borders(LOG_CLIP, "mean")
    ),
    "verl gspo": Formula(lambda x: gspo(x, gspo_token_ratio), GSPOToken(**CLIP), **SEQUENCES),
    "verl, slime, NeMo-RL: cispo": Formula(
        cispo, CISPO(clip_low=0.2, clip_high=0.28),
        borders=Borders((math.log(0.8), math.log(1.28))),
    ),
    "verl sapo": Formula(sapo, SAPO(), mean="sequences"),
    "verl geo_mean": Formula(
        gmpo, GMPO(), mean="sequences", borders=Borders((-0.4, 0.4)), per_token=False
    ),
    "verl geo_mean, rollout_is": Formula(
        lambda x: gmpo(x) * weight(x, x.means), GMPO(), ours(level="geometric"),
        mean="sequences", borders=Borders((-0.4, 0.4)), per_token=False,
    ),
    "verl gpg, slime reinforce, NeMo-RL disable_ppo_ratio": Formula(
        reinforce, of_log_prob(), lambda x: {"old_log_probs": None}
    ),
    "verl bypass_mode, slime reinforce: tis": Formula(
        lambda x: token_ratio(x).clamp(max=2.0).detach() * reinforce(x), of_log_prob(),
        lambda x: {
            "old_log_probs": None,
            "rollout_weights": importance_weights(x.new.detach(), x.old, mask=x.mask, high=2.0),
        },
        borders=Borders((math.log(2.0),)),
    ),
    "verl dro": Formula(
        lambda x: reinforce(x) + 0.3 * k2(x.new - x.old),
        of_log_prob(kl_coef=0.3, kl_estimator="k2"),
        lambda x: {"old_log_probs": None, "ref_log_probs": x.old},
    ),
    "NeMo-RL force_on_policy_ratio": Formula(
        lambda x: -one_with_gradient(x) * x.advantages, grpo(), lambda x: {"old_log_probs": None}
    ),
    "NeMo-RL positive_example_nll_weight": Formula(
        lambda x: ppo(x) - 0.2 * x.new * CORRECT * x.mask.sum() / (x.mask & CORRECT).sum(),
        grpo(),
        second=lambda x: {
            "objective": of_log_prob(), "old_log_probs": None,
            "advantages": torch.full_like(x.advantages, 0.2),
            "mask": x.mask & CORRECT,
        },
    ),
}  # fmt: skip
KL = {
    **{
        f"{'all' if name in ('k1', 'k2', 'k3') else 'verl'}: {name}": Formula(
            with_kl(estimate), kl(kl_estimator=name), ref_borders=Borders((-0.7, 0.0, 0.7))
        )
        for name, estimate in ESTIMATES.items()
    },
    **{
        f"OpenRLHF, NeMo-RL: {name} clamped at {before} and {after}": Formula(
            with_kl(clamped(ESTIMATES[name], before, after)),
            kl(kl_estimator=name, kl_input_clamp=before, kl_output_clamp=after),
            ref_borders=Borders(borders),
        )
        for name, before, after, borders in CLAMPS
    },
    "verl: k3+, clamped": Formula(
        with_kl(straight_through(clamped(k3))), kl(kl_estimator="k3+", **K3_CLAMPS),
        ref_borders=K3_BORDERS,
    ),
    "slime use_unbiased_kl": Formula(with_kl(k3, token_ratio), kl(kl_weight="ratio")),
    "slime gspo, use_unbiased_kl": Formula(
        with_kl(k3, token_ratio, gspo), SHARED_SUM, over_tokens,
        second=lambda x: only_kl(x, kl_weight="ratio"), borders=Borders(LOG_CLIP, "mean"),
    ),
    "TRL gspo, use_bias_correction_kl": Formula(
        with_kl(k3, sequence_ratio, gspo),
        GSPO(kl_coef=0.1, kl_weight="ratio", **CLIP), **SEQUENCES, per_token=False,
    ),
    "NeMo-RL at b816b57, use_on_policy_kl_approximation": Formula(
        with_kl(clamped(k3), lambda x: (x.new - x.rollout).exp().detach()), grpo(),
        second=lambda x: only_kl(x, kl_weight="ratio_detached", **K3_CLAMPS)
        | {"old_log_probs": x.rollout},
        ref_borders=K3_BORDERS,
    ),
    "NeMo-RL: KL with the gradient of what samples": Formula(
        with_kl(k3, one_with_gradient), grpo(),
        second=lambda x: only_kl(x, kl_weight="ratio") | {"old_log_probs": None},
    ),
    "NeMo-RL use_on_policy_kl_approximation": Formula(
        with_kl(k3, lambda x: (x.new - x.rollout).exp()), grpo(),
        second=lambda x: only_kl(x, kl_weight="ratio") | {"old_log_probs": x.rollout},
    ),
}  # fmt: skip
WEIGHTS = {
    "verl: tis": Formula(
        lambda x: ppo(x) * weight(x).clamp(max=1.5), grpo(), ours(high=1.5),
        rollout_borders=Borders((math.log(1.5),)),
    ),
    "OpenRLHF, slime, NeMo-RL: tis": Formula(
        lambda x: ppo(x) * weight(x).clamp(0.5, 1.5), grpo(), ours(low=0.5, high=1.5),
        rollout_borders=Borders((math.log(0.5), math.log(1.5))),
    ),
    "all: icepop": Formula(
        lambda x: ppo(x) * kept(weight(x), 0.5, 1.5), grpo(),
        ours(low=0.5, high=1.5, outside="zero"),
        rollout_borders=Borders((math.log(0.5), math.log(1.5))),
    ),
    "verl: tis of sequences": Formula(
        lambda x: ppo(x) * weight(x, x.sums).clamp(max=2.0), grpo(),
        ours(level="sequence", high=2.0), rollout_borders=Borders((math.log(2.0),), "sum"),
    ),
    "verl: icepop of sequences": Formula(
        lambda x: ppo(x) * kept(weight(x, x.sums), 0.5, 2.0), grpo(),
        ours(level="sequence", low=0.5, high=2.0, outside="zero"),
        rollout_borders=Borders((math.log(0.5), math.log(2.0)), "sum"),
    ),
    "NeMo-RL sequence_level_importance_ratios, tis": Formula(
        lambda x: gspo(x) * weight(x, x.sums).clamp(max=2.0), SHARED,
        ours(level="sequence", high=2.0), rollout_borders=Borders((math.log(2.0),), "sum"),
        **SEQUENCES,
    ),
    "OpenRLHF, NeMo-RL: seq-mask-tis": Formula(
        lambda x: ppo(x) * weight(x) * (kept(weight(x, x.means), 0.9, 1.1) > 0), grpo(),
        lambda x: {
            "rollout_weights": importance_weights(x.old, x.rollout, mask=x.mask)
            * (importance_weights(
                x.old, x.rollout, mask=x.mask, level="geometric", low=0.9, high=1.1, outside="zero",
            ) > 0)[:, None]
        },
        rollout_borders=Borders((math.log(0.9), math.log(1.1)), "mean"),
    ),
    "slime use_opsm": Formula(
        lambda x: ppo(x) * ~((x.advantages < 0) & (x.means(x.old - x.new.detach()) > 0.05)),
        grpo(),
        lambda x: {
            "rollout_weights": off_policy_weights(
                x.new, x.old, x.advantages, threshold=0.05, mask=x.mask
            )
        },
        borders=Borders((-0.05,), "mean"),
    ),
}  # fmt: skip
FORMULAS = SURROGATES | KL | WEIGHTS


# Loss and gradient by the log-probs


def loss_and_grad(loss, x):
    (grad,) = torch.autograd.grad(loss, x.new, x.upstream)
    return loss.detach(), torch.where(x.mask, grad, 0.0)


def by_formula(formula, x):
    mean = x.mean_of_tokens if formula.mean == "tokens" else x.mean_of_sequences
    return loss_and_grad(mean(formula.terms(x)), x)


def pack(arguments):
    mask = arguments["mask"]
    lengths = mask.sum(1).cumsum(0)
    packed = {
        name: value[mask] if torch.is_tensor(value) and value.shape == (B, T) else value
        for name, value in arguments.items()
    }
    return packed | {"mask": None, "cu_seqlens": torch.nn.functional.pad(lengths, (1, 0)).int()}


def by_objective(function, formula, x, packed=False):
    calls = formula.calls(x)
    if packed:
        calls = [pack(arguments) for arguments in calls]
    return loss_and_grad(sum(function(**arguments)[0] for arguments in calls), x)


def assert_same(found, expected, rtol=1e-12):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-2 * rtol)


@pytest.mark.parametrize(("seed", "packed"), [(0, False), (1, False), (2, False), (3, True)])
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name, seed, packed):
    formula = FORMULAS[name]
    x = make_batch(formula, seed)
    expected = by_formula(formula, x)
    for function in (reference.policy_loss_from_log_probs, gspo_ops.policy_loss_from_log_probs):
        assert_same(by_objective(function, formula, x, packed), expected)


# Where others differ


def test_an_empty_sequence_is_no_term():
    """verl and OpenRLHF agree; slime, and verl's geo_mean, divide by all sequences."""
    formula = SURROGATES["slime gspo"]
    x = make_batch(formula, 0)
    x.mask[0] = False
    expected = by_formula(formula, x)
    assert_same(by_objective(gspo_ops.policy_loss_from_log_probs, formula, x), expected)


def test_a_rejected_sequence_is_no_term():
    """verl's rollout_rs="seq_mean_k1" changes the mask, NeMo-RL's seq-mask-tis a weight."""
    formula = Formula(ppo, grpo(), rollout_borders=Borders((math.log(0.9), math.log(1.1)), "mean"))
    x = make_batch(formula, 0)
    near = importance_weights(
        x.old, x.rollout, mask=x.mask, level="geometric", low=0.9, high=1.1, outside="zero"
    )
    mean = x.means(x.old - x.rollout)
    expected = replace(x, mask=x.mask & (mean >= math.log(0.9)) & (mean <= math.log(1.1)))
    x.mask &= (near > 0)[:, None]
    assert 0 < (near == 0).sum() < B
    assert_same(
        by_objective(gspo_ops.policy_loss_from_log_probs, formula, x), by_formula(formula, expected)
    )


def test_gmpo_takes_one_advantage():
    """verl averages a sequence's advantages, but lets each one choose its token's clip."""
    formula = Formula(
        gmpo, GMPO(), lambda x: {"advantages": x.means(x.advantages)[:, 0]},
        mean="sequences", borders=Borders((-0.4, 0.4)),
    )  # fmt: skip
    x = make_batch(formula, 0)
    of_one_sign = replace(x, advantages=(x.advantages.abs() + 0.1) * x.advantages[:, :1].sign())
    expected = by_formula(formula, of_one_sign)
    assert_same(by_objective(gspo_ops.policy_loss_from_log_probs, formula, of_one_sign), expected)
    found = by_objective(gspo_ops.policy_loss_from_log_probs, formula, x)
    assert not torch.allclose(found[1], by_formula(formula, x)[1])


def test_the_output_clamp_comes_before_the_ratio():
    """slime's low_var_kl and NeMo-RL multiply by the ratio first; NeMo-RL at b816b57 agrees."""
    formula = Formula(
        with_kl(clamped(k3), token_ratio),
        kl(kl_weight="ratio", **K3_CLAMPS),
        ref_borders=K3_BORDERS,
    )
    x = make_batch(formula, 0)
    expected = by_formula(formula, x)
    assert_same(by_objective(gspo_ops.policy_loss_from_log_probs, formula, x), expected)


@pytest.mark.parametrize("log_ratio", [30.0, -30.0])
def test_a_log_ratio_of_30_is_not_cut_at_20(log_ratio):
    """verl and OpenRLHF cut at 20, with no gradient beyond; here, the cut is at 80, with one."""
    new = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    sign = torch.tensor([-math.copysign(1.0, log_ratio)]).double()  # a sign that nothing clips
    loss = gspo_ops.policy_loss_from_log_probs(
        new, torch.full_like(new, -log_ratio), sign, objective=GRPO()
    ).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), -sign[0] * math.exp(log_ratio), rtol=1e-12, atol=0)
    torch.testing.assert_close(new.grad[0, 0], loss.detach(), rtol=1e-12, atol=0)


def test_a_mean_divides_by_the_count():
    """verl, OpenRLHF and NeMo-RL add 1e-8 to a sequence's count."""
    new = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    gspo_ops.policy_loss_from_log_probs(new, None, torch.ones(1).double()).loss.backward()
    torch.testing.assert_close(new.grad, -torch.ones(1, 1).double(), rtol=1e-12, atol=0)


# verl's own functions

VERL_LOSSES = {  # by formula: name, and clip_ratio_low and high
    "all: clip": ("vanilla", 0.2, 0.28),
    "all: dual clip": ("vanilla", 0.2, 0.2),
    "verl gspo": ("gspo", 3e-3, 4e-3),
    "verl, slime, NeMo-RL: cispo": ("cispo", 0.2, 0.28),
    "verl sapo": ("sapo", 0.2, 0.2),
    "verl geo_mean": ("geo_mean", 0.4, 0.4),
    "verl geo_mean, rollout_is": ("geo_mean", 0.4, 0.4),
    "verl gpg, slime reinforce, NeMo-RL disable_ppo_ratio": ("gpg", 0.2, 0.2),
    "verl dro": ("dro", 0.2, 0.2),
}
VERL_WEIGHTS = {  # by formula: rollout_is and its threshold
    "verl: tis": ("token", 1.5),
    "all: icepop": ("token", "0.5_1.5"),
    "verl: tis of sequences": ("sequence", 2.0),
    "verl: icepop of sequences": ("sequence", "0.5_2.0"),
}


@pytest.fixture
def core_algos():
    return pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl")


def verl_config(low, high, most):
    config = pytest.importorskip("verl.workers.config")
    return config.FSDPActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=low,
        clip_ratio_high=high, clip_ratio_c=most, tau_pos=1.0, tau_neg=1.05,
        policy_loss=config.PolicyLossConfig(dro_beta=0.3),
    )  # fmt: skip


@pytest.mark.parametrize("name", VERL_LOSSES)
def test_losses_are_verl_s(core_algos, name):
    formula = FORMULAS[name]
    x = make_batch(formula, 0)
    loss_name, low, high = VERL_LOSSES[name]
    loss, _ = core_algos.get_policy_loss_fn(loss_name)(
        old_log_prob=x.old, log_prob=x.new, advantages=x.advantages, response_mask=x.mask.double(),
        loss_agg_mode={"tokens": "token-mean", "sequences": "seq-mean-token-mean"}[formula.mean],
        config=verl_config(low, high, 3.0 if "dual" in name else 100.0),
        rollout_is_weights=weight(x) if "rollout_is" in name else None,
    )  # fmt: skip
    # verl adds 1e-8 to the length of a sequence
    rtol = 1e-12 if formula.mean == "tokens" else 1e-7
    assert_same(loss_and_grad(loss, x), by_formula(formula, x), rtol)


@pytest.mark.parametrize("estimator", ESTIMATES)
def test_kl_estimates_are_verl_s(core_algos, estimator):
    formula = next(x for name, x in KL.items() if name.endswith(f": {estimator}"))
    x = make_batch(formula, 0)
    estimates = core_algos.kl_penalty(x.new, x.ref, estimator)
    found = loss_and_grad(x.mean_of_tokens(ppo(x) + 0.1 * estimates), x)
    assert_same(found, by_formula(formula, x))


@pytest.mark.parametrize("name", VERL_WEIGHTS)
def test_importance_weights_are_verl_s(core_algos, name):
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    x = make_batch(FORMULAS[name], 0)
    weights, _ = helper.compute_rollout_correction_weights(
        x.old - x.rollout, x.mask.double(), *VERL_WEIGHTS[name]
    )
    found = FORMULAS[name].options(x)["rollout_weights"].view(B, -1) * x.mask
    torch.testing.assert_close(found, weights, rtol=1e-12, atol=1e-14)
