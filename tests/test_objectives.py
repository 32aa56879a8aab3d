"""Objectives other than GSPO, GSPO-token and GRPO, and weights of loss terms."""

import math
from dataclasses import replace

import pytest
import torch

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
    policy_loss_from_hidden,
    policy_loss_from_log_probs,
    policy_loss_from_logits,
    reference,
    top_entropy_weights,
)
from gspo_ops.testing import (
    FURTHER_OBJECTIVES,
    make_case,
    relative,
    said,
    synthetic_head,
    synthetic_logits,
)

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:overflow encountered in"),  # from the interpreter's numpy
]
CPU = torch.device("cpu")
NO_BONUS = [x for x in FURTHER_OBJECTIVES if x.entropy_coef == 0]
objectives = pytest.mark.parametrize("objective", FURTHER_OBJECTIVES, ids=said)
of_log_probs = pytest.mark.parametrize("objective", NO_BONUS, ids=said)


def leaf(x):
    return x.detach().clone().requires_grad_()


def assert_as_expected(ours, theirs, grad, grad64):
    loss, stats = ours
    loss64, stats64 = theirs
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-6, atol=2e-6)
    assert relative(grad, grad64) <= 2e-6
    assert torch.equal(grad == 0, grad64 == 0)
    for name in stats64.keys() & stats.keys():
        torch.testing.assert_close(
            stats[name].double(), stats64[name], rtol=2e-6, atol=2e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


@of_log_probs
@pytest.mark.parametrize("packed", [False, True])
def test_against_the_reference(device, objective, packed):
    stopped = 0
    variants = [(True, "token"), (True, None), (False, "sequence")]
    for seed, (old, weights) in enumerate(variants):
        case = make_case(
            synthetic_logits(9, 6, 33, device=device), objective, packed=packed, seed=seed
        )
        exact = case.double()
        log_probs = reference.log_probs_from_logits(exact.logits, exact.targets).float()
        log_probs = log_probs.masked_fill(~case.valid, math.nan)
        options, options64 = case.options(), exact.options()
        if weights != "token":
            per_sequence = None if weights is None else torch.rand(9, device=device) + 0.5
            options["rollout_weights"] = per_sequence
            options64["rollout_weights"] = (
                per_sequence if per_sequence is None else per_sequence.double()
            )
        given = (case.old_log_probs, case.advantages) if old else (None, case.advantages)
        given64 = [None if x is None else x.double() for x in given]
        x, y = leaf(log_probs), leaf(log_probs.double().nan_to_num())
        ours = policy_loss_from_log_probs(x, *given, **options)
        theirs = reference.policy_loss_from_log_probs(y, *given64, **options64)
        (ours.loss * -1.7).backward()
        (theirs[0] * -1.7).backward()
        assert_as_expected(ours, theirs, x.grad, y.grad)
        stopped += ours.stats.get("clip_frac_dual", 0)
    assert (stopped > 0) == (objective.dual_clip < math.inf)


@pytest.mark.parametrize("objective", [x for x in FURTHER_OBJECTIVES if x.entropy_coef], ids=said)
@pytest.mark.parametrize("packed", [False, True])
def test_entropy_bonus(device, objective, packed):
    """The bonus is right from logits, and from hidden states, which need a recomputation."""
    case = make_case(synthetic_head(9, 6, 16, 33, device=device), objective, packed=packed)
    exact, valid = case.double(), case.valid.unsqueeze(-1)
    head = case.head._replace(hidden=torch.where(valid, case.head.hidden, 0.0))
    logits = torch.where(valid, case.logits, 0.0)
    given = (case.targets, case.old_log_probs, case.advantages)
    given64 = (exact.targets, exact.old_log_probs, exact.advantages)

    x, y = leaf(logits.float()), leaf(logits.float().double())
    ours = policy_loss_from_logits(x, *given, **case.options())
    theirs = reference.policy_loss_from_logits(y, *given64, **exact.options())
    (ours.loss * -1.7).backward()
    (theirs[0] * -1.7).backward()
    assert_as_expected(ours, theirs, x.grad, y.grad)
    assert "entropy" in ours.stats
    assert ours.stats["active_token_frac"] == 1  # a bonus reaches tokens without an advantage

    expected = leaf(head.hidden.double())
    exact_head = head.to(torch.float64)
    reference.policy_loss_from_hidden(
        expected, exact_head.weight, *given64, bias=exact_head.bias, **exact.options()
    )[0].backward()
    for plan in ("auto", "recompute"):
        hidden = leaf(head.hidden)
        out = policy_loss_from_hidden(
            hidden, head.weight, *given, bias=head.bias, plan=plan, **case.options()
        )
        out.loss.backward()
        assert relative(hidden.grad, expected.grad) <= 5e-6
    for plan in ("keep", "chunk"):
        with pytest.raises(ValueError, match=r"plan"):
            policy_loss_from_hidden(head.hidden, head.weight, *given, plan=plan, **case.options())
    with pytest.raises(ValueError, match=r"entropy_coef must be 0 for a loss from log_probs"):
        policy_loss_from_log_probs(case.old_log_probs, *given[1:], **case.options())


def is_derivative_of_its_value(objective):
    return (
        objective.surrogate != "weighted"
        and objective.ratio_level != "sequence_token"
        and not objective.kl_estimator.endswith("+")
        and objective.kl_weight != "ratio_detached"
    )


@pytest.mark.skipif("os.environ.get('TRITON_INTERPRET') == '1'")
@pytest.mark.parametrize(
    "objective", [x for x in NO_BONUS if is_derivative_of_its_value(x)], ids=said
)
def test_gradcheck(objective):
    """Gradients are right between borders, from which inputs are 5e-6 away."""
    case = make_case(synthetic_logits(9, 3, 17, device=CPU), objective, packed=False).double()
    log_probs = reference.log_probs_from_logits(case.logits, case.targets)

    def loss(x):
        return policy_loss_from_log_probs(
            x, case.old_log_probs, case.advantages, **case.options()
        ).loss

    assert torch.autograd.gradcheck(loss, (leaf(log_probs),), eps=1e-7, atol=1e-7)


# By hand


def of_one(objective, log_ratio, advantage, log_prob=-1.0, device=CPU, **options):
    """Return the result for one sequence, and the gradients of its tokens."""
    log_ratio = torch.tensor(log_ratio, device=device)
    log_probs = torch.full_like(log_ratio, log_prob)
    old = (log_probs - log_ratio)[None]
    x = leaf(log_probs[None])
    advantages = torch.tensor(advantage, device=device)
    advantages = advantages[None] if advantages.ndim else advantages.reshape(1)
    out = policy_loss_from_log_probs(x, old, advantages, objective=objective, **options)
    out.loss.backward()
    return out, x.grad[0]


def test_dual_clip_by_hand(device):
    """At A < 0, a ratio of 4 counts as 3 and has no gradient; at A > 0, it is clipped as usual."""
    objective = GRPO(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    out, g = of_one(objective, [math.log(4.0), math.log(2.0)], -1.0, device=device)
    torch.testing.assert_close(out.loss, torch.tensor((3.0 + 2.0) / 2, device=device))
    torch.testing.assert_close(g, torch.tensor([0.0, 1.0], device=device))
    assert out.stats["clip_frac_dual"] == 0.5
    assert out.stats["clip_frac_tokens"] == 0
    out, g = of_one(objective, [math.log(4.0), math.log(1.1)], 1.0, device=device)
    torch.testing.assert_close(out.loss, torch.tensor(-(1.2 + 1.1) / 2, device=device))
    assert g[0] == 0


def test_cispo_by_hand(device):
    """Weights are clipped, and every token keeps its gradient."""
    out, g = of_one(CISPO(clip_high=0.5), [math.log(4.0), math.log(0.1)], 2.0, device=device)
    torch.testing.assert_close(g, -2.0 * torch.tensor([1.5, 0.1], device=device) / 2)
    torch.testing.assert_close(out.loss, -torch.tensor(2.0 * (1.5 + 0.1) / 2 * -1, device=device))
    assert out.stats["clip_frac_high"] == 0.5


def test_reinforce_needs_no_old_log_probs(device):
    objective = Objective(ratio_level="token", surrogate="weighted", aggregation="token-sum")
    x = torch.tensor([[-0.5, -2.0]], device=device, requires_grad=True)
    out = policy_loss_from_log_probs(
        x, None, torch.tensor([3.0], device=device), objective=objective
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), torch.tensor(7.5, device=device))
    torch.testing.assert_close(x.grad, torch.full_like(x, -3.0))


def test_sapo_by_hand(device):
    """On-policy, the gate is half open: its value is 2 / tau, and its slope is the ratio's."""
    out, g = of_one(SAPO(), [0.0, 0.0], 1.0, device=device)
    torch.testing.assert_close(out.loss, torch.tensor(-2.0, device=device), rtol=0, atol=0)
    torch.testing.assert_close(g, torch.full((2,), -0.5, device=device), rtol=0, atol=0)
    ratio, tau = 3.0, 1.05
    out, g = of_one(SAPO(), [math.log(ratio)], -1.0, device=device)
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    torch.testing.assert_close(out.loss, torch.tensor(4 / tau * gate, device=device))
    torch.testing.assert_close(g, torch.tensor([4 * gate * (1 - gate) * ratio], device=device))


def test_gmpo_by_hand(device):
    """The ratio is exp of the mean of clipped log-ratios; a clipped token has no gradient."""
    out, g = of_one(GMPO(), [1.0, 0.2], 1.0, device=device)
    s = math.exp((0.4 + 0.2) / 2)
    torch.testing.assert_close(out.loss, torch.tensor(-s, device=device))
    torch.testing.assert_close(g, torch.tensor([0.0, -s / 2], device=device))
    out, g = of_one(GMPO(), [1.0, -1.0], -1.0, device=device)
    s = math.exp((1.0 - 0.4) / 2)
    torch.testing.assert_close(out.loss, torch.tensor(s, device=device))
    torch.testing.assert_close(g, torch.tensor([s / 2, 0.0], device=device))


def test_a_shared_ratio_by_hand(device):
    """Every token's gradient is the mean of what unclipped tokens contribute."""
    objective = Objective(ratio_level="sequence_shared", clip_low=0.1, clip_high=0.1)
    out, g = of_one(objective, [math.log(1.2)] * 3, [1.0, -2.0, -3.0], device=device)
    torch.testing.assert_close(out.loss, torch.tensor((-1.1 + 2.4 + 3.6) / 3, device=device))
    torch.testing.assert_close(g, torch.full((3,), (2.4 + 3.6) / 3 / 3, device=device))


def test_with_one_advantage_a_shared_ratio_is_gspo(device):
    given = [math.log(1 + 2e-4), 1e-4, -5e-5], 0.7
    shared = Objective(ratio_level="sequence_shared", clip_low=3e-4, clip_high=4e-4)
    for a, b in zip(of_one(GSPO(), *given)[1], of_one(shared, *given)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_kl_with_the_ratio_by_hand(device, level):
    """d (r * kl) = kl dr + r dkl; a sequence's ratio carries every token's kl to every token."""
    objective = Objective(
        ratio_level=level, kl_coef=1.0, kl_estimator="k1", kl_weight="ratio",
        aggregation="seq-mean-token-sum",
    )  # fmt: skip
    ref = torch.tensor([[-1.5, -0.8]], device=device)
    out, g = of_one(objective, [0.3, 0.1], 0.0, ref_log_probs=ref, device=device)
    d = torch.tensor([0.5, -0.2], dtype=torch.float64)
    r = torch.tensor([0.3, 0.1], dtype=torch.float64)
    if level == "sequence":
        r = r.mean().expand(2)
    expected = r.exp() * (1 + (d.mean() if level == "sequence" else d))
    torch.testing.assert_close(g.cpu().double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out.loss.cpu().double(), (r.exp() * d).sum(), rtol=1e-6, atol=1e-7)


# Edges


@of_log_probs
@pytest.mark.parametrize("log_ratio", [100.0, -100.0])
def test_huge_log_ratios_stay_finite(device, objective, log_ratio):
    for sign in (1.0, -1.0):
        ref = None if objective.kl_coef == 0 else torch.full((1, 3), -2.0, device=device)
        out, g = of_one(objective, [log_ratio] * 3, sign, ref_log_probs=ref, device=device)
        assert out.loss.isfinite()
        assert g.isfinite().all()
        assert all(x.isfinite().all() for x in out.stats.values())


@objectives
def test_masked_positions_may_hold_anything(device, objective):
    case = make_case(synthetic_logits(9, 6, 17, device=device), objective, packed=False)
    spoiled = replace(
        case,
        old_log_probs=case.old_log_probs.masked_fill(~case.valid, math.nan),
        ref_log_probs=None
        if case.ref_log_probs is None
        else case.ref_log_probs.masked_fill(~case.valid, math.inf),
        rollout_weights=case.rollout_weights.masked_fill(~case.valid, math.nan),
    )

    def result(case):
        x = leaf(case.logits)
        out = policy_loss_from_logits(
            x, case.targets, case.old_log_probs, case.advantages, **case.options()
        )
        out.loss.backward()
        return out.loss.detach(), x.grad

    for a, b in zip(result(case), result(spoiled), strict=True):
        assert torch.equal(a, b)


def test_without_a_token(device):
    empty = torch.zeros(2, 3, device=device, requires_grad=True)
    for objective in NO_BONUS:
        out = policy_loss_from_log_probs(
            empty, None, torch.ones(2, device=device), objective=objective,
            mask=torch.zeros(2, 3, device=device), ref_log_probs=torch.zeros(2, 3, device=device),
        )  # fmt: skip
        out.loss.backward()
        assert out.loss == 0
        assert not empty.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_level": "seq"}, r"ratio_level must be one of .*'sequence_shared'"),
        ({"surrogate": "hard"}, "surrogate must be one of 'clipped', 'weighted', 'soft'"),
        ({"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.2}, r"dual_clip must be >= 1\.3"),
        ({"clip_high": 0.3, "dual_clip": math.nan}, "dual_clip must be"),
        ({"surrogate": "weighted", "clip_high": 1.0, "dual_clip": 3.0}, "dual_clip has no meaning"),
        ({"surrogate": "soft", "clip_high": 0.2}, "clip_low and clip_high have no meaning"),
        ({"surrogate": "soft", "soft_temperature_neg": 0.0}, "soft_temperature_neg must be"),
        ({"ratio_level": "geometric", "surrogate": "soft"}, "ratio_level='geometric' clips each"),
        ({"ratio_level": "geometric", "kl_weight": "ratio"}, "kl_weight must be 'one' for"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of"),
        ({"kl_weight": "both"}, "kl_weight must be one of"),
        ({"kl_input_clamp": 0.0}, "kl_input_clamp must be > 0"),
        ({"kl_output_clamp": -1.0}, "kl_output_clamp must be > 0"),
        ({"entropy_coef": -0.1}, "entropy_coef must be finite and >= 0"),
        ({"clip_high": math.nan}, "clip_high must be >= 0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**{"ratio_level": "token", **options})


def test_a_geometric_mean_takes_advantages_of_sequences():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"advantages must have shape \(2,\).*sequence_shared"):
        policy_loss_from_log_probs(x, x, x, objective=GMPO())


# Weights


@pytest.fixture
def log_ratio():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 7, generator=generator) < 0.8
    mask[2] = False
    new = -3 * torch.rand(4, 7, generator=generator)
    rollout = new - torch.randn(4, 7, generator=generator)
    return new, rollout.masked_fill(~mask, math.nan), mask


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("outside", ["clip", "zero"])
def test_importance_weights(log_ratio, level, outside, packed):
    new, rollout, mask = log_ratio
    d = torch.where(mask, new.double() - rollout.double(), 0.0)
    per_sequence = d.sum(1) / (mask.sum(1).clamp(min=1) if level == "geometric" else 1)
    expected = (d if level == "token" else per_sequence).exp()
    inside = (expected >= 0.9) & (expected <= 1.2)
    expected = expected.clamp(0.9, 1.2) if outside == "clip" else expected * inside
    assert 0 < inside.sum() < inside.numel()
    arguments = (new, rollout)
    where = {"mask": mask}
    if packed:
        arguments = [x.flatten() for x in arguments]
        where = {"mask": mask.flatten(), "cu_seqlens": torch.arange(0, 29, 7, dtype=torch.int32)}
    weights = importance_weights(
        *arguments, **where, level=level, low=0.9, high=1.2, outside=outside
    )
    assert weights.dtype == torch.float32
    if level == "token":
        expected = torch.where(mask, expected, 0.0)
        assert weights.shape == arguments[0].shape
        weights = weights.view(4, 7)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-7)


def test_importance_weights_of_what_is_not_known_are_not_1(log_ratio):
    new, rollout, mask = log_ratio
    rollout[0, mask[0].nonzero()[0]] = math.nan
    assert importance_weights(new, rollout, mask=mask, low=0.5, outside="zero").isnan().any()


def test_importance_weights_refuse_what_does_not_fit():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="low"):
        importance_weights(x, x, low=-1.0)
    with pytest.raises(ValueError, match="high must be >= 2"):
        importance_weights(x, x, low=2.0, high=1.0)
    with pytest.raises(ValueError, match="level must be one of"):
        importance_weights(x, x, level="batch")
    with pytest.raises(TypeError, match="rollout_log_probs must be float32 or float64"):
        importance_weights(x, x.bfloat16())


@pytest.mark.parametrize("per_token", [False, True])
def test_off_policy_weights(log_ratio, per_token):
    new, old, mask = log_ratio
    advantages = torch.tensor([1.0, -1.0, -1.0, -1.0])
    kl = torch.where(mask, old - new, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    threshold = float(kl[[1, 3]].clamp(min=0).mean())
    expected = (advantages >= 0) | (kl <= threshold)
    given = advantages[:, None].expand(4, 7) if per_token else advantages
    found = off_policy_weights(new, old, given, threshold=threshold, mask=mask)
    assert torch.equal(found, (expected[:, None].expand(4, 7) if per_token else expected).float())


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 1.0])
def test_top_entropy_weights(fraction):
    generator = torch.Generator().manual_seed(1)
    entropy = torch.rand(5, 8, generator=generator)
    mask = torch.rand(5, 8, generator=generator) < 0.7
    weights = top_entropy_weights(entropy.masked_fill(~mask, math.nan), fraction, mask=mask)
    threshold = entropy[mask].double().quantile(1 - fraction)
    assert torch.equal(weights.bool(), mask & (entropy.double() >= threshold))
    assert not top_entropy_weights(entropy, fraction, mask=torch.zeros(5, 8)).any()


def test_weights_leave_out_terms_and_not_the_denominator(device):
    """A weight of 0 is not a mask: a GSPO-token batch keeps its average."""
    x = torch.zeros(1, 4, device=device, requires_grad=True)
    keep = torch.tensor([[1.0, 0.0, 0.0, 0.0]], device=device)
    loss = policy_loss_from_log_probs(
        x, None, torch.ones(1, device=device), rollout_weights=keep, objective=GSPOToken()
    ).loss
    loss.backward()
    torch.testing.assert_close(x.grad, -keep / 4)
