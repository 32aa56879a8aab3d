"""What other trainers compute, written out in float64, is what an `Objective` says.

Sources, of which the mathematics was read and no code is taken:

- verl 0.9.1, `verl/trainer/ppo/core_algos.py`; its functions are oracles too, where it is installed
- OpenRLHF 0.9, `openrlhf/models/loss.py`, `PolicyLoss`
- slime at 06787cf, `slime/utils/ppo_utils.py`
- NeMo-RL at 005a098, `nemo_rl/algorithms/loss_functions.py` and `utils.py`
"""

import math
from dataclasses import dataclass, field

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

pytestmark = pytest.mark.filterwarnings("ignore:aggregation=.* weights sequences by their length")
B, T = 8, 9


@dataclass
class Batch:
    """Log-probs (B, T) of the new, old, reference and rollout policy, advantages and mask."""

    new: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    rollout: torch.Tensor
    advantages: torch.Tensor  # (B, T)
    mask: torch.Tensor

    def mean(self, x):
        """Of tokens, (B,)."""
        return torch.where(self.mask, x, 0.0).sum(1) / self.mask.sum(1)

    def token_mean(self, x):
        return torch.where(self.mask, x, 0.0).sum() / self.mask.sum()

    def sequence_ratio(self):
        return self.mean(self.new - self.old).exp()[:, None]


def make_batch(edges, per_token, seed):
    """Sequences' and tokens' log-ratios stand 1e-4 beside the edges, and far from them."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator)
    around = [e + side for e in edges for side in (-1e-4, 1e-4)] + [2.5 * e for e in edges] + [0.02]
    around = torch.tensor(around, dtype=torch.float64)
    of_sequence = around[torch.randperm(len(around), generator=generator).repeat(B)[:B]]
    noise = torch.where(mask, rand(B, T) - 0.5, 0.0)
    noise -= noise.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    if seed % 2:  # tokens beside the edges, else sequences
        log_ratio = around[torch.randint(len(around), (B, T), generator=generator)]
    else:
        log_ratio = of_sequence[:, None] + noise
    new = -4 * rand(B, T)
    sign = torch.where(rand(B, T if per_token else 1) < 0.5, -1.0, 1.0)
    advantages = (sign * (0.3 + rand(B, T if per_token else 1))).expand(B, T).clone()
    advantages[-1] = 0.0
    return Batch(
        new=new.requires_grad_(),
        old=new.detach() - log_ratio,
        ref=new.detach() - 1.5 * (rand(B, T) - 0.5),
        rollout=new.detach() - log_ratio - 2 * (rand(B, T) - 0.5),
        advantages=advantages,
        mask=mask,
    )


# Surrogates, one loss term per token


def clipped(x, ratio, low, high):
    return -torch.minimum(ratio * x.advantages, ratio.clamp(1 - low, 1 + high) * x.advantages)


def dual_clipped(x, ratio, low, high, c):
    terms = clipped(x, ratio, low, high)
    return torch.where(x.advantages < 0, torch.minimum(terms, -c * x.advantages), terms)


def token_ratio(x):
    return (x.new - x.old).exp()


def gspo_token_ratio(x):
    """The sequence's, with the token's gradient, as in verl's gspo."""
    return x.sequence_ratio().detach() * (x.new - x.new.detach()).exp()


def cispo(x, low, high):
    weight = token_ratio(x).clamp(1 - low, 1 + high).detach()
    return -weight * x.advantages * x.new


def sapo(x, tau_pos, tau_neg):
    tau = torch.full_like(x.advantages, tau_neg).masked_fill(x.advantages > 0, tau_pos)
    return -4 / tau * torch.sigmoid(tau * (token_ratio(x) - 1)) * x.advantages


def gmpo(x, width):
    """One term per sequence: a token's log-ratio is clipped where that makes the term smaller."""
    log_ratio, sign = x.new - x.old, x.advantages.sign()
    log_ratio = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-width, width))
    return -(x.mean(x.advantages) * x.mean(log_ratio).exp())[:, None].expand(B, T)


# KL estimates, of d = log_prob - ref_log_prob


def k1(d):
    return d


def k2(d):
    return d.square() / 2


def k3(d):
    return (-d).exp() - 1 + d


def straight_through(value, d):
    return value.detach() + k2(d) - k2(d).detach()


def with_kl(x, kl):
    return clipped(x, token_ratio(x), 0.2, 0.2) + 0.1 * kl


# Names, formulas as functions of a batch, and what says the same


@dataclass
class Formula:
    terms: object  # of a batch: (B, T)
    objective: Objective
    average: str = "token-mean"
    edges: tuple = (math.log(0.8), math.log(1.2))
    per_token: bool = True  # advantages
    weights: object = None  # of a batch: rollout weights by our function
    options: dict = field(default_factory=dict)  # of a batch: further arguments

    def arguments(self, x):
        """By name, all but log-probs and advantages."""
        return {
            "old_log_probs": x.old,
            "mask": x.mask,
            "objective": self.objective,
            "ref_log_probs": x.ref if self.objective.kl_coef else None,
            "rollout_weights": self.weights(x) if self.weights else None,
            **{name: value(x) for name, value in self.options.items()},
        }


def grpo(**options):
    return GRPO(clip_low=0.2, clip_high=0.2, aggregation="token-mean", **options)


def kl(**options):
    return grpo(kl_coef=0.1, **options)


GSPO_EDGES = (math.log1p(-3e-3), math.log1p(4e-3))
GSPO_CLIP = {"clip_low": 3e-3, "clip_high": 4e-3}
SHARED = Objective(ratio_level="sequence_shared", **GSPO_CLIP)
FORMULAS = {
    "verl vanilla, slime, NeMo-RL: dual clip": Formula(
        lambda x: dual_clipped(x, token_ratio(x), 0.2, 0.2, 3.0),
        grpo(dual_clip=3.0),
        edges=(math.log(0.8), math.log(1.2), math.log(3.0)),
    ),
    "OpenRLHF gspo": Formula(
        lambda x: clipped(x, x.sequence_ratio(), 3e-3, 4e-3), SHARED, "seq-mean", GSPO_EDGES
    ),
    "OpenRLHF gspo, dual clip": Formula(
        lambda x: dual_clipped(x, x.sequence_ratio(), 3e-3, 4e-3, 1.02),
        Objective(ratio_level="sequence_shared", dual_clip=1.02, **GSPO_CLIP),
        "seq-mean",
        (*GSPO_EDGES, math.log(1.02)),
    ),
    "slime gspo, one advantage": Formula(
        lambda x: clipped(x, x.sequence_ratio(), 3e-3, 4e-3),
        GSPO(**GSPO_CLIP), "seq-mean", GSPO_EDGES, per_token=False,
    ),
    "slime gspo, tokens averaged": Formula(
        lambda x: clipped(x, x.sequence_ratio(), 3e-3, 4e-3),
        Objective(ratio_level="sequence_shared", aggregation="seq-mean-token-sum", **GSPO_CLIP),
        edges=GSPO_EDGES,
        options={"denominator": lambda x: x.mask.sum()},
    ),
    "verl gspo": Formula(
        lambda x: clipped(x, gspo_token_ratio(x), 3e-3, 4e-3),
        GSPOToken(**GSPO_CLIP), "seq-mean", GSPO_EDGES,
    ),
    "verl cispo": Formula(
        lambda x: cispo(x, 0.2, 0.2), CISPO(clip_low=0.2, clip_high=0.2)
    ),
    "verl sapo": Formula(lambda x: sapo(x, 1.0, 1.05), SAPO(), "seq-mean"),
    "verl geo_mean": Formula(
        lambda x: gmpo(x, 0.4), GMPO(), "seq-mean", (-0.4, 0.4), per_token=False
    ),
    "NeMo-RL disable_ppo_ratio": Formula(
        lambda x: -x.advantages * x.new,
        Objective(ratio_level="token", surrogate="weighted", aggregation="token-mean"),
        options={"old_log_probs": lambda x: None},
    ),
    "verl, slime, NeMo-RL: k1": Formula(
        lambda x: with_kl(x, k1(x.new - x.ref)), kl(kl_estimator="k1")
    ),
    "verl, slime, NeMo-RL: k2": Formula(
        lambda x: with_kl(x, k2(x.new - x.ref)), kl(kl_estimator="k2")
    ),
    "slime, NeMo-RL: k3": Formula(lambda x: with_kl(x, k3(x.new - x.ref)), kl()),
    "verl abs": Formula(
        lambda x: with_kl(x, (x.new - x.ref).abs()), kl(kl_estimator="abs")
    ),
    "verl k1+": Formula(
        lambda x: with_kl(x, straight_through(k1(x.new - x.ref), x.new - x.ref)),
        kl(kl_estimator="k1+"),
    ),
    "verl k3+": Formula(
        lambda x: with_kl(x, straight_through(k3(x.new - x.ref), x.new - x.ref)),
        kl(kl_estimator="k3+"),
    ),
    "verl low_var_kl, NeMo-RL: clamps": Formula(
        lambda x: with_kl(x, k3((x.new - x.ref).clamp(-0.5, 0.5)).clamp(-0.1, 0.1)),
        kl(kl_input_clamp=0.5, kl_output_clamp=0.1),
    ),
    "TRL, slime: k3 times the ratio": Formula(
        lambda x: with_kl(x, token_ratio(x) * k3(x.new - x.ref)), kl(kl_weight="ratio")
    ),
    "slime gspo: k1 times the sequence's ratio": Formula(
        lambda x: clipped(x, x.sequence_ratio(), 3e-3, 4e-3)
        + 0.1 * x.sequence_ratio() * k1(x.new - x.ref),
        GSPO(kl_coef=0.1, kl_estimator="k1", kl_weight="ratio", **GSPO_CLIP),
        "seq-mean", GSPO_EDGES, per_token=False,
    ),
    "NeMo-RL use_on_policy_kl_approximation": Formula(
        lambda x: with_kl(x, token_ratio(x).detach() * k3(x.new - x.ref)),
        kl(kl_weight="ratio_detached"),
    ),
    "verl, slime, NeMo-RL, OpenRLHF: tis": Formula(
        lambda x: clipped(x, token_ratio(x), 0.2, 0.2) * (x.old - x.rollout).exp().clamp(max=1.5),
        grpo(),
        weights=lambda x: importance_weights(x.old, x.rollout, mask=x.mask, high=1.5),
    ),
    "NeMo-RL, OpenRLHF: icepop": Formula(
        lambda x: clipped(x, token_ratio(x), 0.2, 0.2)
        * torch.where(((x.old - x.rollout) - 0.1).abs() <= 0.4, (x.old - x.rollout).exp(), 0.0),
        grpo(),
        weights=lambda x: importance_weights(
            x.old, x.rollout, mask=x.mask, low=math.exp(-0.3), high=math.exp(0.5), outside="zero"
        ),
    ),
    "verl, NeMo-RL: sequence level, truncated": Formula(
        lambda x: clipped(x, token_ratio(x), 0.2, 0.2)
        * (x.mean(x.old - x.rollout) * x.mask.sum(1)).exp().clamp(max=2.0)[:, None],
        grpo(),
        weights=lambda x: importance_weights(
            x.old, x.rollout, mask=x.mask, level="sequence", high=2.0
        ),
    ),
    "NeMo-RL, OpenRLHF: seq-mask-tis": Formula(
        lambda x: clipped(x, token_ratio(x), 0.2, 0.2)
        * (x.old - x.rollout).exp()
        * (x.mean(x.old - x.rollout).abs() <= 0.1)[:, None],
        grpo(),
        weights=lambda x: importance_weights(x.old, x.rollout, mask=x.mask)
        * (
            importance_weights(
                x.old, x.rollout, mask=x.mask, level="geometric", low=math.exp(-0.1),
                high=math.exp(0.1), outside="zero",
            )
            > 0
        )[:, None],
    ),
    "slime, TRL: off-policy sequence mask": Formula(
        lambda x: clipped(x, token_ratio(x), 0.2, 0.2)
        * ~((x.advantages < 0) & (x.mean(x.old - x.new.detach()) > 0.05)[:, None]),
        grpo(),
        weights=lambda x: off_policy_weights(
            x.new, x.old, x.advantages, threshold=0.05, mask=x.mask
        ),
    ),
}  # fmt: skip
formulas = pytest.mark.parametrize("name", FORMULAS)


def loss_and_grad(loss, x):
    (grad,) = torch.autograd.grad(loss * -1.7, x.new)
    return loss.detach(), torch.where(x.mask, grad, 0.0)


def by_formula(formula, x):
    terms = formula.terms(x)
    loss = x.token_mean(terms) if formula.average == "token-mean" else x.mean(terms).mean()
    return loss_and_grad(loss, x)


def by_objective(function, formula, x):
    advantages = x.advantages if formula.per_token else x.advantages[:, 0].contiguous()
    return loss_and_grad(function(x.new, advantages=advantages, **formula.arguments(x))[0], x)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@formulas
@pytest.mark.parametrize("seed", range(4))
def test_formulas(name, seed):
    formula = FORMULAS[name]
    x = make_batch(formula.edges, formula.per_token, seed)
    expected = by_formula(formula, x)
    assert expected[1].any()
    for function in (reference.policy_loss_from_log_probs, gspo_ops.policy_loss_from_log_probs):
        assert_same(by_objective(function, formula, x), expected)


@formulas
def test_packed(name):
    formula = FORMULAS[name]
    x = make_batch(formula.edges, formula.per_token, 1)
    loss, grad = by_objective(gspo_ops.policy_loss_from_log_probs, formula, x)
    advantages = x.advantages if formula.per_token else x.advantages[:, 0].contiguous()
    arguments = {
        k: y[x.mask] if torch.is_tensor(y) and y.shape == (B, T) else y
        for k, y in ({"advantages": advantages} | formula.arguments(x)).items()
    }
    packed = x.new.detach()[x.mask].requires_grad_()
    borders = torch.nn.functional.pad(x.mask.sum(1).cumsum(0), (1, 0)).int()
    out = gspo_ops.policy_loss_from_log_probs(
        packed, **(arguments | {"mask": None}), cu_seqlens=borders
    )
    (out.loss * -1.7).backward()
    assert_same((out.loss.detach(), packed.grad), (loss, grad[x.mask]))


# Where others differ


def test_an_empty_sequence_is_no_term():
    """slime and TRL divide by it as well; verl and OpenRLHF do not count it."""
    x = make_batch(GSPO_EDGES, False, 0)
    mask = x.mask.clone()
    mask[0] = False
    loss = gspo_ops.policy_loss_from_log_probs(
        x.new, x.old, x.advantages[:, 0].contiguous(), mask=mask, objective=GSPO(**GSPO_CLIP)
    ).loss
    terms = x.mean(clipped(x, x.sequence_ratio(), 3e-3, 4e-3))
    torch.testing.assert_close(loss, terms[1:].mean(), rtol=1e-12, atol=0)


def test_the_output_clamp_comes_before_the_ratio():
    """slime's low_var_kl multiplies by the ratio first."""
    x = make_batch((math.log(0.8), math.log(1.2)), True, 1)
    objective = kl(kl_weight="ratio_detached", kl_output_clamp=0.1)
    formula = Formula(
        lambda x: with_kl(x, token_ratio(x).detach() * k3(x.new - x.ref).clamp(-0.1, 0.1)),
        objective,
    )
    expected = by_formula(formula, x)
    assert_same(by_objective(gspo_ops.policy_loss_from_log_probs, formula, x), expected)


@pytest.mark.parametrize("log_ratio", [30.0, -30.0])
def test_a_log_ratio_of_30_is_not_cut_at_20(log_ratio):
    """verl cuts log-ratios of tokens at 20, with no gradient beyond; here it is 80, with one."""
    new = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    sign = torch.tensor([-math.copysign(1.0, log_ratio)]).double()  # which nothing clips
    loss = gspo_ops.policy_loss_from_log_probs(
        new, torch.full_like(new, -log_ratio), sign, objective=GRPO()
    ).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), -sign[0] * math.exp(log_ratio), rtol=1e-12, atol=0)
    torch.testing.assert_close(new.grad[0, 0], loss.detach(), rtol=1e-12, atol=0)


# verl's own functions

VERL = {
    "verl vanilla, slime, NeMo-RL: dual clip": "vanilla",
    "verl gspo": "gspo",
    "verl cispo": "cispo",
    "verl sapo": "sapo",
    "verl geo_mean": "geo_mean",
}


@pytest.mark.parametrize("name", VERL)
@pytest.mark.parametrize("seed", range(2))
def test_formulas_are_verl_s(name, seed):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl")
    formula = FORMULAS[name]
    x = make_batch(formula.edges, formula.per_token, seed)
    low, high = (0.4, 0.4) if name == "verl geo_mean" else (0.2, 0.2)
    if name == "verl gspo":
        low, high = GSPO_CLIP.values()
    config = pytest.importorskip("verl.workers.config").FSDPActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=low,
        clip_ratio_high=high, clip_ratio_c=3.0, tau_pos=1.0, tau_neg=1.05,
    )  # fmt: skip
    modes = {"token-mean": "token-mean", "seq-mean": "seq-mean-token-mean"}
    loss, _ = core_algos.get_policy_loss_fn(VERL[name])(
        old_log_prob=x.old, log_prob=x.new, advantages=x.advantages, response_mask=x.mask.double(),
        loss_agg_mode=modes[formula.average], config=config,
    )  # fmt: skip
    # it adds 1e-8 to counts, and has SAPO's temperatures in fp32
    for a, b in zip(loss_and_grad(loss, x), by_formula(formula, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs", "k1+", "k3+"])
def test_kl_estimates_are_verl_s(kind):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl")
    d = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64, requires_grad=True)
    ours = reference._kl(Objective(ratio_level="token", kl_estimator=kind), d)
    theirs = core_algos.kl_penalty(d, torch.zeros_like(d), kind)
    grads = [torch.autograd.grad(x.sum(), d)[0] for x in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
