import itertools
import math

import pytest
import torch

from gspo_ops import (
    GRPO,
    GSPO,
    GSPOToken,
    Objective,
    policy_loss_from_hidden,
    policy_loss_from_log_probs,
    policy_loss_from_logits,
    reference,
)
from gspo_ops.testing import OBJECTIVES, log_ratios, relative, said, worst

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:aggregation=.* weights sequences by their length"),
    pytest.mark.filterwarnings("ignore:overflow encountered in"),  # from the interpreter's numpy
]

LEVELS = {"sequence": (3e-4, 4e-4), "sequence_token": (3e-4, 4e-4), "token": (0.2, 0.27)}
AGGREGATIONS = ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "token-sum"]
CU_SEQLENS = [0, 3, 3, 12, 20, 35]  # a length of 0 among them


def make_objective(level, aggregation="seq-mean-token-mean", **options):
    low, high = LEVELS[level]
    return Objective(
        ratio_level=level, clip_low=low, clip_high=high, aggregation=aggregation, **options
    )


def make_inputs(device, objective, packed, *, old=True, ref=False, weights=None, seed=0):
    """Return tensors of 5 sequences, one fully masked when padded, one empty when packed."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    B, T = 5, 7
    mask = rand(B, T) > 0.3
    mask[2] = False
    log_probs = -5 * rand(B, T)
    inputs = {
        "log_probs": log_probs,
        "old_log_probs": (log_probs - log_ratios(objective, mask, generator)).float()
        if old
        else None,
        "advantages": normal(*(B,) if objective.ratio_level == "sequence" else (B, T)),
        "mask": mask,
        "ref_log_probs": log_probs + 0.3 * normal(B, T) if ref else None,
        "rollout_weights": {None: None, "sequence": rand(B) + 0.5, "token": rand(B, T) + 0.5}[
            weights
        ],
        "objective": objective,
    }
    if packed:
        inputs = {
            k: x.flatten() if isinstance(x, torch.Tensor) and x.ndim == 2 else x
            for k, x in inputs.items()
        }
        inputs["cu_seqlens"] = torch.tensor(CU_SEQLENS, dtype=torch.int32)
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}


def assert_matches_reference(inputs):
    exact = {
        k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in inputs.items()
    }
    log_probs = inputs.pop("log_probs").requires_grad_()
    log_probs64 = exact.pop("log_probs").requires_grad_()
    loss, stats = policy_loss_from_log_probs(log_probs, **inputs)
    loss64, stats64 = reference.policy_loss_from_log_probs(log_probs64, **exact)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-6, atol=2e-6)
    upstream = torch.tensor(-1.7)
    loss.backward(upstream.to(loss))
    loss64.backward(upstream.to(loss64))
    assert relative(log_probs.grad, log_probs64.grad) <= 1e-6
    assert torch.equal(log_probs.grad == 0, log_probs64.grad == 0)
    for name, expected in stats64.items():
        torch.testing.assert_close(
            stats[name].double(), expected, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    valid = inputs["mask"].sum() if inputs.get("mask") is not None else log_probs.numel()
    active = (log_probs64.grad != 0).sum() / valid.clamp(min=1)
    torch.testing.assert_close(stats["active_token_frac"], active.float())
    assert not any(x.requires_grad for x in stats.values())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_matrix_against_the_reference(device, level, aggregation, packed):
    options = itertools.product(
        [True, False], [None, "k1", "k2", "k3"], [None, "sequence", "token"]
    )
    for seed, (old, estimator, weights) in enumerate(options):
        kl = {"kl_coef": 0.1, "kl_estimator": estimator} if estimator else {}
        objective = make_objective(level, aggregation, **kl)
        ref = estimator is not None
        assert_matches_reference(
            make_inputs(device, objective, packed, old=old, ref=ref, weights=weights, seed=seed)
        )


def test_the_paper_s_formula_by_hand(device):
    """The gradient is g_t = -(1 / D) * (1 / |y|) * s * A where not clipped."""
    log_probs = torch.tensor([[-1.0, -2.0], [-0.5, -1.5], [-3.0, -4.0]], device=device)
    s = torch.tensor([1 + 1e-4, 1 + 6e-4, 1 - 6e-4], device=device, dtype=torch.float64)
    old = (log_probs - s.log().unsqueeze(1)).double().float()
    advantages = torch.tensor([2.0, 1.0, 0.5], device=device)
    log_probs.requires_grad_()
    loss, stats = policy_loss_from_log_probs(log_probs, old, advantages)
    loss.backward()
    expected = torch.tensor([[-2 / 6], [0.0], [-0.5 / 6]]).expand(3, 2)
    torch.testing.assert_close(log_probs.grad.cpu(), expected, rtol=1e-3, atol=0)
    value = -(2 * (1 + 1e-4) + (1 + 4e-4) + 0.5 * (1 - 6e-4)) / 3
    assert abs(loss.item() - value) < 1e-6
    assert stats["clip_frac_sequences"].item() == pytest.approx(1 / 3)
    assert stats["clip_frac_high"].item() == pytest.approx(1 / 3)
    assert stats["clip_frac_low"].item() == 0


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_clip_decisions_at_the_edges(device, objective, sign):
    """Decisions are right for log-ratios 2e-6 to either side of each edge, with one token each."""
    high, low = math.log1p(objective.clip_high), math.log1p(-objective.clip_low)
    log_ratio = torch.tensor([high - 2e-6, high + 2e-6, low + 2e-6, low - 2e-6], device=device)
    # old = 0 and new = the log-ratio itself: no rounding in between
    log_probs = log_ratio.unsqueeze(1).requires_grad_()
    shape = (4, 1) if objective.ratio_level == "sequence_token" else (4,)
    advantages = torch.full(shape, sign, device=device)
    loss, _ = policy_loss_from_log_probs(
        log_probs, torch.zeros(4, 1, device=device), advantages, objective=objective
    )
    loss.backward()
    clipped = (log_probs.grad == 0).flatten().tolist()
    assert clipped == ([False, True, False, False] if sign > 0 else [False, False, False, True])


def test_on_policy_is_exact(device):
    inputs = make_inputs(device, GSPO(), False)
    for old in (inputs["log_probs"].clone(), None):
        log_probs = inputs["log_probs"].clone().requires_grad_()
        loss, stats = policy_loss_from_log_probs(
            log_probs, old, inputs["advantages"], mask=inputs["mask"]
        )
        loss.backward()
        for name in ("ratio_mean", "ratio_min", "ratio_max", "effective_sample_size"):
            assert stats[name].item() == 1.0
        assert stats["clip_frac_tokens"].item() == stats["clip_frac_sequences"].item() == 0.0
        live = inputs["mask"] & (inputs["advantages"] != 0).unsqueeze(1)
        assert torch.equal(log_probs.grad != 0, live)


@pytest.mark.parametrize(("level", "shape"), [("sequence", (41, 1)), ("token", (1, 41))])
def test_on_policy_is_exact_for_every_count(device, level, shape):
    """Statistics are exactly 1, though 41 * (1 / 41) is not 1 in fp32."""
    log_probs = torch.full(shape, -1.0, device=device)
    advantages = torch.ones(shape[0], device=device)
    objective = make_objective(level)
    _, stats = policy_loss_from_log_probs(log_probs, None, advantages, objective=objective)
    for name in ("ratio_mean", "effective_sample_size", "active_token_frac"):
        assert stats[name].item() == 1.0


@pytest.mark.parametrize("T", [1, 1023, 1025, 131072])
@pytest.mark.parametrize("level", LEVELS)
def test_long_and_short_sequences(device, level, T):
    log_probs = -5 * torch.rand(T + 3, generator=torch.Generator().manual_seed(T))
    old = log_probs + 1e-3 * torch.randn(T + 3, generator=torch.Generator().manual_seed(T + 1))
    assert_matches_reference(
        {
            "log_probs": log_probs.to(device),
            "old_log_probs": old.to(device),
            "advantages": torch.tensor([1.3, -0.7], device=device),
            "cu_seqlens": torch.tensor([0, T, T + 3], dtype=torch.int32, device=device),
            "mask": torch.ones(T + 3, device=device),
            "objective": make_objective(level),
        }
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 1e4, -math.inf])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_log_ratios_stay_finite(device, level, log_ratio, sign):
    old = torch.full((2, 3), -1.0, device=device)
    log_probs = (old + torch.tensor([[log_ratio], [0.0]], device=device)).requires_grad_()
    advantages = torch.full((2,), sign, device=device)
    loss, stats = policy_loss_from_log_probs(
        log_probs, old, advantages, objective=make_objective(level)
    )
    loss.backward()
    assert loss.isfinite()
    assert log_probs.grad.isfinite().all()
    is_clipped = log_ratio * sign > 0
    assert torch.equal(log_probs.grad[0] == 0, torch.full((3,), is_clipped, device=device))
    assert (log_probs.grad[1] != 0).all()
    assert stats["effective_sample_size"].isfinite()


def at_the_cap(log_ratio, advantage, dtype=torch.float32, device="cpu", **options):
    """Return loss, stats and gradient of two sequences of 4096 tokens with one log-ratio."""
    log_probs = torch.full((2, 4096), -1.0, dtype=dtype, device=device, requires_grad=True)
    loss, stats = policy_loss_from_log_probs(
        log_probs, log_probs.detach() - log_ratio,
        torch.full((2,), advantage, dtype=dtype, device=device), **options,
    )  # fmt: skip
    return loss.detach(), stats, torch.autograd.grad(loss, log_probs)[0]


@pytest.mark.parametrize("log_ratio", [1e3, -1e3, 1e38])
@pytest.mark.parametrize("level", LEVELS)
def test_sums_that_fit_after_the_division_do_not_overflow(device, level, log_ratio):
    for aggregation in AGGREGATIONS:
        objective = make_objective(level, aggregation)
        loss, stats, grad = at_the_cap(log_ratio, -1.0, device=device, objective=objective)
        exact = at_the_cap(log_ratio, -1.0, torch.float64, device, objective=objective)
        largest = torch.finfo(torch.float32).max
        torch.testing.assert_close(loss, exact[0].clamp(max=largest).float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, exact[2].float(), rtol=1e-6, atol=0)
        for name, value in exact[1].items():
            torch.testing.assert_close(stats[name], value.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_what_fp32_cannot_hold_saturates(device, level):
    """A token's part of the loss, its gradient before the division by D, and the loss saturate."""
    largest, advantage = torch.finfo(torch.float32).max, 3e4
    too_large = math.exp(80) * advantage
    expected = {  # loss, and the gradient of each token
        "seq-mean-token-mean": (largest, too_large / 4096 / 2),
        "token-mean": (largest, largest / 8192),
        "seq-mean-token-sum": (largest, largest / 2),
        "token-sum": (largest, largest),
    }
    for aggregation, (value, g) in expected.items():
        objective = make_objective(level, aggregation)
        loss, _, grad = at_the_cap(100.0, -advantage, device=device, objective=objective)
        assert loss.item() == value
        torch.testing.assert_close(grad, torch.full_like(grad, g), rtol=1e-6, atol=0)
    # an infinite advantage or weight does not saturate
    weights = torch.full((2,), math.inf, device=device)
    for bad in ({"advantage": math.inf}, {"advantage": 1.0, "rollout_weights": weights}):
        loss, _, grad = at_the_cap(0.0, **bad, device=device, objective=make_objective(level))
        assert loss.isnan()
        assert grad.isnan().all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_an_infinite_kl_saturates(device, estimator):
    log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], device=device, requires_grad=True)
    ref = torch.tensor([[-1.0, -math.inf], [-3.0, torch.finfo().min]], device=device)
    inputs = log_probs, log_probs.detach() - 0.1, torch.tensor([1.0, -1.0], device=device)
    without = policy_loss_from_log_probs(*inputs, objective=GRPO())
    for coef in (0.0, 3.0):
        objective = GRPO(kl_coef=coef, kl_estimator=estimator)
        loss, stats = policy_loss_from_log_probs(*inputs, objective=objective, ref_log_probs=ref)
        assert loss.isfinite()
        assert stats["ref_kl"].isfinite()
        assert torch.autograd.grad(loss, log_probs)[0].isfinite().all()
        assert coef or torch.equal(loss, without.loss)


def test_masked_positions_may_hold_anything(device):
    inputs = make_inputs(device, GSPO(kl_coef=0.1), False, ref=True, weights="token")
    clean = policy_loss_from_log_probs(**inputs)
    for name in ("log_probs", "old_log_probs", "ref_log_probs", "rollout_weights"):
        inputs[name] = inputs[name].masked_fill(~inputs["mask"], math.nan)
    inputs["log_probs"].requires_grad_()
    poisoned = policy_loss_from_log_probs(**inputs)
    poisoned.loss.backward()
    assert torch.equal(clean.loss, poisoned.loss)
    for name, value in clean.stats.items():
        assert torch.equal(value, poisoned.stats[name]), name
    assert (inputs["log_probs"].grad[~inputs["mask"]] == 0).all()
    assert inputs["log_probs"].grad.isfinite().all()


@pytest.mark.parametrize("per_token", [False, True])
def test_masked_positions_may_hold_anything_with_a_user_s_objective(device, per_token):
    """Masked values have no effect, though every term of this objective reads every row."""

    def coupled(log_probs, old_log_probs, advantages, sequence_ids):
        return -(log_probs - old_log_probs).mean().exp() * advantages + log_probs.square().sum()

    inputs = make_inputs(device, GSPOToken(), False, weights="token")
    inputs["objective"] = coupled
    empty = ~inputs["mask"].any(1)
    if not per_token:
        for name in ("advantages", "rollout_weights"):
            inputs[name] = inputs[name][:, 0]
    log_probs = inputs.pop("log_probs")
    results = []
    for garbage in (0.0, math.nan, math.inf):
        poisoned = {
            name: x.masked_fill(~inputs["mask"] if x.ndim == 2 else empty, garbage)
            if name in ("old_log_probs", "advantages", "rollout_weights")
            else x
            for name, x in inputs.items()
        }
        x = log_probs.masked_fill(~inputs["mask"], garbage).requires_grad_()
        loss, stats = policy_loss_from_log_probs(x, **poisoned)
        loss.backward()
        results.append((loss, x.grad, *stats.values()))
    assert results[0][1].isfinite().all()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_a_user_s_large_terms_do_not_overflow(device):
    def large(log_probs, old_log_probs, advantages, sequence_ids):
        return (log_probs - old_log_probs).exp() * -advantages

    large.aggregation = "token-mean"
    loss, _, grad = at_the_cap(80.0, -1.0, device=device, objective=large)
    assert loss.item() == pytest.approx(math.exp(80), rel=1e-5)
    torch.testing.assert_close(grad, torch.full_like(grad, math.exp(80) / 8192), rtol=1e-5, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4)])
def test_batches_without_a_token(device, shape, aggregation):
    log_probs = torch.full(shape, math.nan, device=device, requires_grad=True)
    loss, stats = policy_loss_from_log_probs(
        log_probs,
        torch.zeros(shape, device=device),
        torch.ones(shape[0], device=device),
        mask=torch.zeros(shape, dtype=torch.bool, device=device),
        objective=make_objective("sequence_token", aggregation),
    )
    loss.backward()
    assert loss.item() == 0
    assert (log_probs.grad == 0).all()
    assert stats["ratio_mean"].item() == 1
    assert stats["clip_frac_tokens"].item() == stats["active_token_frac"].item() == 0


def test_packed_without_a_sequence(device):
    log_probs = torch.zeros(0, device=device, requires_grad=True)
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device=device)
    loss, _ = policy_loss_from_log_probs(
        log_probs, log_probs.detach(), log_probs.detach(), cu_seqlens=cu_seqlens
    )
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_gradient_accumulation_equals_the_big_batch(device, level, as_tensor):
    objective = make_objective(level)
    inputs = make_inputs(device, objective, False)
    log_probs = inputs["log_probs"].requires_grad_()
    policy_loss_from_log_probs(**inputs).loss.backward()
    expected, log_probs.grad = log_probs.grad, None
    denominator = int(inputs["mask"].any(1).sum())
    total = 0.0
    for rows in (slice(0, 2), slice(2, 5)):
        part = {k: x[rows] if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
        D = torch.tensor(denominator, device=device) if as_tensor else denominator
        loss = policy_loss_from_log_probs(**part, denominator=D).loss
        loss.backward()
        total += loss.item()
    torch.testing.assert_close(log_probs.grad, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_user_s_objective(device, aggregation, packed):
    """GSPO-token written by a user gives the results of the built-in one."""
    built_in = make_objective("sequence_token", aggregation)
    inputs = make_inputs(device, built_in, packed, weights="token")
    B = 5

    def gspo_token(log_probs, old_log_probs, advantages, sequence_ids):
        seen = inputs["mask"].flatten().float()
        zeros = torch.zeros(B, device=log_probs.device)
        n = zeros.index_add(0, sequence_ids, seen).clamp(min=1)
        mean = zeros.index_add(0, sequence_ids, (log_probs - old_log_probs).detach() * seen) / n
        s = mean.exp()[sequence_ids] * (log_probs - log_probs.detach()).exp()
        clipped = s.clamp(1 - built_in.clip_low, 1 + built_in.clip_high)
        return -torch.minimum(s * advantages, clipped * advantages)

    gspo_token.aggregation = aggregation
    log_probs = inputs.pop("log_probs")
    results = []
    for objective in (built_in, gspo_token):
        x = log_probs.clone().requires_grad_()
        loss, stats = policy_loss_from_log_probs(x, **{**inputs, "objective": objective})
        loss.backward()
        results.append((loss, x.grad, stats))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(results[0][2]["log_ratio"], results[1][2]["log_ratio"])


@pytest.mark.parametrize("packed", [False, True])
def test_a_user_s_objective_has_all_that_built_in_ones_have(device, packed):
    """A user's GRPO with a KL term has the built-in loss, gradient and statistics."""
    built_in = make_objective("token", kl_coef=0.05)
    inputs = make_inputs(device, built_in, packed, ref=True, weights="token")

    def grpo(log_probs, old_log_probs, advantages, sequence_ids, *, ref_log_probs, mask, lengths):
        assert torch.equal(
            lengths, torch.zeros_like(lengths).index_add(0, sequence_ids, mask * 1.0)
        )
        ratio, d = (log_probs - old_log_probs).exp(), log_probs - ref_log_probs
        low, high = 1 - built_in.clip_low, 1 + built_in.clip_high
        clipped = mask & torch.where(advantages > 0, ratio > high, (advantages < 0) & (ratio < low))
        terms = -torch.where(clipped, ratio.clamp(low, high).detach(), ratio) * advantages
        # rollout weights multiply what is returned, but not the KL term of the built-in objective
        kl = 0.05 * ((-d).exp() - 1 + d) / inputs["rollout_weights"].flatten()
        return terms + kl, clipped

    log_probs = inputs.pop("log_probs")
    results = []
    for objective in (built_in, grpo):
        x = log_probs.clone().requires_grad_()
        loss, stats = policy_loss_from_log_probs(x, **{**inputs, "objective": objective})
        loss.backward()
        results.append({"loss": loss, "grad": x.grad} | stats)
    expected, ours = results
    assert expected["clip_frac_low"] > 0
    assert expected["clip_frac_high"] > 0
    assert expected.keys() - ours.keys() == {"active_token_frac"}
    for name, x in ours.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-6)


def test_entropy_beside_a_user_s_objective(device):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 8, device=device), torch.randn(129, 8, device=device)
    targets = torch.randint(129, (2, 3), device=device)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=device)
    rest = targets, None, torch.tensor([1.0, -1.0], device=device)

    def objective(log_probs, old_log_probs, advantages, sequence_ids):
        return -log_probs * advantages

    exact = reference.entropy_from_logits(hidden.double() @ weight.double().T, targets)
    for function, operands in (
        (policy_loss_from_logits, (hidden @ weight.T,)),
        (policy_loss_from_hidden, (hidden, weight)),
    ):
        grads = []
        for return_entropy in (False, True):
            first, *others = (x.detach().requires_grad_() for x in operands)
            loss, stats = function(
                first, *others, *rest, mask=mask, objective=objective, return_entropy=return_entropy
            )
            loss.backward()
            grads.append(first.grad)
        assert torch.equal(*grads)
        assert not stats["entropy"].requires_grad
        expected = exact[mask != 0].mean()
        torch.testing.assert_close(stats["entropy"].double(), expected, rtol=1e-5, atol=0)


def test_a_user_s_objective_from_logits(device):
    """A user's CISPO (detached, clipped token ratios) has the right loss and gradient."""

    def cispo(log_probs, old_log_probs, advantages, sequence_ids):
        ratio = (log_probs - old_log_probs).exp().clamp(max=1.2).detach()
        return -ratio * advantages * log_probs

    torch.manual_seed(0)
    logits = torch.randn(2, 3, 129, device=device, requires_grad=True)
    targets = torch.randint(129, (2, 3), device=device)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=device)
    old = torch.full((2, 3), -4.8, device=device)
    advantages = torch.tensor([1.0, -2.0], device=device)
    loss, _ = policy_loss_from_logits(logits, targets, old, advantages, mask=mask, objective=cispo)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    log_probs = reference.log_probs_from_logits(exact, targets)
    terms = cispo(log_probs, old.double(), advantages.double().unsqueeze(1), None)
    expected = (terms[0, :2].mean() + terms[1, 0]) / 2
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert relative(logits.grad, exact.grad) <= 2e-6
    assert (logits.grad[mask == 0] == 0).all()


@pytest.mark.parametrize("objective", [GSPO(kl_coef=0.05), GSPOToken(), GRPO()], ids=said)
def test_entropy_and_options_from_logits(device, objective):
    """Temperature, soft cap, KL and entropy reach the op that takes logits."""
    torch.manual_seed(1)
    logits = 3 * torch.randn(3, 5, 257, device=device)
    targets = torch.randint(257, (3, 5), device=device)
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]], device=device)
    options = {"temperature": 0.8, "softcap": 20.0}
    new = reference.log_probs_from_logits(logits.double(), targets, **options)
    old = new - log_ratios(objective, mask.cpu(), torch.Generator().manual_seed(0)).to(device)
    ref = (new + 0.2 * torch.randn(3, 5, device=device)).float() if objective.kl_coef else None
    advantages = torch.tensor([0.7, -1.1, 0.4], device=device)

    def arguments(dtype):
        return {
            "targets": targets,
            "old_log_probs": old.float().to(dtype),
            "advantages": advantages.to(dtype),
            "mask": mask,
            "objective": objective,
            "ref_log_probs": ref.to(dtype) if ref is not None else None,
            "return_entropy": True,
            **options,
        }

    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, stats = policy_loss_from_logits(ours, **arguments(torch.float32))
    loss64, stats64 = reference.policy_loss_from_logits(exact, **arguments(torch.float64))
    loss.backward()
    loss64.backward()
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-6, atol=4e-6)
    assert relative(ours.grad, exact.grad) <= 4e-6
    for name in stats64:
        assert worst(stats[name] - stats64[name]) <= 1e-5, name


def test_warns_once_about_length_weighting():
    with pytest.warns(UserWarning, match="weights sequences by their length"):
        GSPO(aggregation="token-mean")
