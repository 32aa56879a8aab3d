"""Where peers differ from an objective of the same name: their value, and ours."""

import math

import pytest
import torch
from peer_formulas import (
    CLAMPS,
    HIGH,
    LOW,
    OUTPUT_CLAMP,
    TOKEN_CLIP,
    B,
    Draw,
    clipped,
    differentiated_weight,
    k2,
    make_draw,
    ratio,
    score_weight,
    value_and_grad,
)

import gspo_ops
from gspo_ops import GRPO, Objective


def one_sequence(log_ratio, advantage, tokens=1):
    """A draw of one sequence whose tokens are alike."""
    x = torch.full((1, tokens), -1.0, dtype=torch.float64)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    return Draw(x, x - log_ratio, x, x, advantage * torch.ones_like(x), mask, mask.sum(1))


def ours(draw, objective, **options):
    return value_and_grad(
        lambda x: (
            gspo_ops.policy_loss_from_log_probs(
                x.new, x.old, x.advantages, mask=x.mask, objective=objective, **options
            ).loss
        ),
        draw,
    )


@pytest.mark.parametrize(("level", "clamp"), [("token", 20.0), ("sequence_token", 10.0)])
def test_a_clamped_log_ratio_loses_its_gradient(level, clamp):
    """verl's vanilla, sapo and cispo, and OpenRLHF's ppo, clamp it to 20; verl's gspo to 10."""
    draw = one_sequence(clamp + 5, -1.0)
    theirs = value_and_grad(lambda x: (x.new - x.old).clamp(max=clamp).exp().mean(), draw)
    value, grad = ours(draw, Objective(ratio_level=level))
    assert theirs == (pytest.approx(math.exp(clamp)), torch.zeros(1, 1))
    assert value == pytest.approx(math.exp(clamp + 5))
    assert grad.item() == pytest.approx(-1.7 * value)


def test_a_clipped_ratio_that_overflows_has_no_gradient():
    """slime, NeMo-RL: 0 * inf."""
    draw = one_sequence(800.0, 1.0)
    _, grad = value_and_grad(lambda x: clipped(ratio(x), x.advantages, LOW, HIGH).mean(), draw)
    assert grad.isnan().all()
    value, grad = ours(draw, GRPO(**TOKEN_CLIP))
    assert (value, grad.item()) == (pytest.approx(-(1 + HIGH)), 0.0)


def test_an_empty_sequence_counts_for_nobody():
    """slime and NeMo-RL divide by all samples, verl's geo_mean by all rows."""
    draw = make_draw(0).clean()
    assert not draw.mask[0].any()
    objective = GRPO(clip_low=LOW, clip_high=HIGH)
    value, _ = ours(draw, objective)
    assert value == pytest.approx(ours(draw, objective, denominator=float(B))[0] * B / (B - 1))


def test_means_are_exact():
    """verl, OpenRLHF and NeMo-RL add 1e-8 to a length, which shortens a mean by as much."""
    draw = one_sequence(0.0, -1.0)
    assert ours(draw, GRPO())[0] == 1.0


@pytest.mark.parametrize("weight", [differentiated_weight, score_weight])
def test_an_estimate_is_clamped_before_it_is_weighted(weight):
    """slime's low_var_kl with use_unbiased_kl, and NeMo-RL, clamp the product, and neither factor
    has a gradient beyond; here the weight has its own."""
    draw = one_sequence(math.log(2.0), 0.0)._replace(ref=torch.full((1, 1), -3.0).double())
    on_policy = weight is score_weight
    w = 1.0 if on_policy else 2.0

    def product(x):
        return (weight(x) * k2(x.new - x.ref)).clamp(max=OUTPUT_CLAMP).mean()

    assert value_and_grad(product, draw) == (pytest.approx(OUTPUT_CLAMP), torch.zeros(1, 1))
    objective = GRPO(kl_coef=1.0, kl_estimator="k2", kl_weight="ratio", **CLAMPS)
    x = draw._replace(old=draw.new) if on_policy else draw
    value, grad = ours(x, objective, ref_log_probs=draw.ref)
    assert value == pytest.approx(w * OUTPUT_CLAMP)
    assert grad.item() == pytest.approx(-1.7 * w * OUTPUT_CLAMP)


def test_a_dual_clip_stands_above_the_clip_range():
    """verl, OpenRLHF, slime and NeMo-RL take any above 1."""
    with pytest.raises(ValueError, match="dual_clip must be"):
        GRPO(clip_low=LOW, clip_high=HIGH, dual_clip=1 + HIGH / 2)
