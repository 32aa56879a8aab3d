"""Log-probs returned with a loss, and the rows that a ratio shared by tokens needs."""

import pytest
import torch

from gspo_ops import (
    GSPO,
    Objective,
    log_probs_from_hidden,
    policy_loss_from_hidden,
    policy_loss_from_logits,
    reference,
)
from gspo_ops.testing import relative

B, T, H, V = 3, 5, 8, 40


def make(per_token=False):
    hidden, weight = torch.randn(B, T, H), torch.randn(V, H)
    targets, mask = torch.randint(V, (B, T)), torch.ones(B, T)
    mask[1, 3:] = 0
    old = log_probs_from_hidden(hidden, weight, targets) + 1e-3 * torch.randn(B, T)
    advantages = torch.randn(B, T) if per_token else torch.randn(B)
    return hidden, weight, targets, old, advantages, mask


def of_logits(hidden, weight, targets, *given, **options):
    return policy_loss_from_logits(hidden @ weight.mT, targets, *given, **options)


WAYS = {
    "logits": of_logits,
    **{
        plan: lambda *given, plan=plan, **options: policy_loss_from_hidden(
            *given, plan=plan, **options
        )
        for plan in ("keep", "recompute", "chunk")
    },
}
ways = pytest.mark.parametrize("way", WAYS)


def grouped(log_probs, old, advantages, ids):
    return -(log_probs - old).exp() * advantages


@ways
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("objective", [GSPO(), grouped], ids=["GSPO", "function"])
def test_log_probs_are_those_of_the_loss(way, on_policy, objective):
    if way == "chunk" and objective is grouped:
        pytest.skip("plan='chunk' takes no function")
    hidden, weight, targets, old, advantages, mask = make()
    given = (hidden, weight, targets, None if on_policy else old, advantages)
    options = {"mask": mask, "objective": objective}
    loss, stats = WAYS[way](*given, **options, return_log_probs=True)
    assert "log_probs" not in WAYS[way](*given, **options).stats
    torch.testing.assert_close(loss, WAYS[way](*given, **options).loss)
    expected = log_probs_from_hidden(hidden, weight, targets)
    assert stats["log_probs"].shape == targets.shape
    assert not stats["log_probs"].requires_grad
    valid = mask != 0
    torch.testing.assert_close(stats["log_probs"][valid], expected[valid], atol=4e-6, rtol=0.0)


@ways
def test_a_token_without_an_advantage_has_the_shared_ratio_s_gradient(way):
    hidden, weight, targets, old, advantages, mask = make(per_token=True)
    advantages[:, ::2] = 0
    objective = Objective(ratio_level="sequence_shared", clip_low=0.2, clip_high=0.2)
    options = {"mask": mask, "objective": objective}

    def grads(function, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        floats = old.to(dtype), advantages.to(dtype)
        function(*leaves, targets, *floats, **options)[0].backward()
        return [x.grad for x in leaves]

    expected = grads(reference.policy_loss_from_hidden, torch.float64)
    for found, exact in zip(grads(WAYS[way], torch.float32), expected, strict=True):
        assert relative(found, exact) <= 2e-6
