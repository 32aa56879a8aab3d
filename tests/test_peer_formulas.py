"""Objectives beside the formulas of peers, in float64, padded and packed."""

from typing import NamedTuple

import pytest
import torch
from peer_formulas import (
    BORDERS,
    BOUNDS,
    DRAWS,
    DUAL,
    ESTIMATES,
    EXACT,
    HIGH,
    INPUT_CLAMP,
    KL,
    KL_WEIGHTS,
    LOW,
    OUTPUT_CLAMP,
    SEQUENCE_BORDERS,
    SEQUENCE_CLIP,
    SEQUENCE_HIGH,
    SEQUENCE_LOW,
    SURROGATES,
    TOKEN_CLIP,
    WEIGHT_HIGH,
    WEIGHT_LOW,
    WEIGHTS,
    B,
    T,
    clipped,
    geometric,
    k3,
    low_var_kl,
    make_draw,
    of_sequences,
    ppo,
    ratio,
    seq_mask_tis,
    sequence_mean,
    sequence_ratio,
    token_mean,
    value_and_grad,
    with_gradient_of_k2,
)

import gspo_ops
from gspo_ops import GRPO, Objective, importance_weights, off_policy_weights, reference

# Comparison


class Layout(NamedTuple):
    """Padded, or packed with gaps."""

    options: dict
    of_tokens: object  # from (B, T)


def layouts(draw):
    is_token = torch.arange(T) < draw.lengths[:, None]
    ends = torch.nn.functional.pad(draw.lengths.cumsum(0), (1, 0)).int()
    packed = {"mask": draw.mask[is_token], "cu_seqlens": ends}
    yield Layout({"mask": draw.mask}, lambda x: x)
    yield Layout(packed, lambda x: x[is_token])


def assert_equal(formula, objective, make_weights=None, *, on_policy=False, **kind):
    """formula(draw), and its gradient, are the loss of the objective in all layouts."""
    for seed in range(DRAWS):
        draw = make_draw(seed, **kind)
        value, grad = value_and_grad(formula, draw.clean())
        grad = torch.where(draw.mask, grad, 0.0)
        assert grad.any()
        for layout in layouts(draw):
            new, old, ref, rollout, advantages = map(layout.of_tokens, draw[:5])
            if objective.ratio_level == "geometric":
                advantages = of_sequences(draw.clean().advantages, draw)[:, 0]
            options = {"objective": objective, **layout.options}
            if objective.kl_coef:
                options["ref_log_probs"] = ref
            if make_weights is not None:
                options["rollout_weights"] = make_weights(old, rollout, **layout.options)
            for loss_of in (reference, gspo_ops):
                x = new.clone().requires_grad_()
                loss, _ = loss_of.policy_loss_from_log_probs(
                    x, None if on_policy else old, advantages, **options
                )
                (found,) = torch.autograd.grad(-1.7 * loss, x)
                found = torch.where(layout.options["mask"], found, 0.0)
                assert loss.item() == pytest.approx(value, rel=EXACT, abs=EXACT)
                error = (found - layout.of_tokens(grad)).abs().max()
                assert error <= EXACT * grad.abs().max()


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates(name):
    formula, objective, kind = SURROGATES[name]
    assert_equal(formula, objective, **kind)


@pytest.mark.parametrize("weight", KL_WEIGHTS)
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_kl(estimate, weight):
    """Beside a surrogate, and clamped before it is weighted."""
    kl, options = ESTIMATES[estimate]
    weight_of, kl_weight, kind = KL_WEIGHTS[weight]
    objective = GRPO(**TOKEN_CLIP, kl_coef=KL, **options, **kl_weight)

    def formula(draw):
        surrogate = on_policy if kind else ppo
        return surrogate(draw) + KL * token_mean(weight_of(draw) * kl(draw.new - draw.ref), draw)

    on_policy, *_ = SURROGATES["on-policy: NeMo-RL's force_on_policy_ratio"]
    assert_equal(formula, objective, **kind)


@pytest.mark.parametrize("average", ["token mean", "sequence mean"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_importance_weights(name, average):
    weight_of, make = WEIGHTS[name]
    mean = token_mean if average == "token mean" else sequence_mean
    aggregation = "token-mean" if average == "token mean" else "seq-mean-token-mean"

    def formula(draw):
        terms = clipped(ratio(draw), draw.advantages, LOW, HIGH)
        return mean(weight_of(draw) * terms, draw)

    assert_equal(formula, GRPO(clip_low=LOW, clip_high=HIGH, aggregation=aggregation), make)


@pytest.mark.parametrize("name", WEIGHTS)
def test_importance_weights_of_a_shared_ratio(name):
    """NeMo-RL's GSPO: each token's weight reaches all through the ratio."""
    weight_of, make = WEIGHTS[name]

    def formula(draw):
        r = sequence_ratio(draw)
        terms = clipped(r, draw.advantages, SEQUENCE_LOW, SEQUENCE_HIGH)
        return sequence_mean(weight_of(draw) * terms, draw)

    objective = Objective(ratio_level="sequence_shared", **SEQUENCE_CLIP)
    assert_equal(formula, objective, make, of_sequences=True)


def test_seq_mask_tis():
    """Two weights of ours: one of tokens, and one of sequences that is not 0."""

    def make(old, rollout, **on):
        of_tokens = importance_weights(old, rollout, **on)
        near = importance_weights(old, rollout, level="geometric", outside="zero", **BOUNDS, **on)
        lengths = on["cu_seqlens"].diff() if "cu_seqlens" in on else torch.full((B,), T)
        return of_tokens * (near > 0).repeat_interleave(lengths).view(of_tokens.shape)

    def formula(draw):
        return token_mean(
            seq_mask_tis(draw) * clipped(ratio(draw), draw.advantages, LOW, HIGH), draw
        )

    assert_equal(formula, GRPO(**TOKEN_CLIP), make)


def test_off_policy_sequences():
    """slime's use_opsm: tokens with a negative advantage in sequences that have become unlikely."""
    threshold = 0.1
    for seed in range(DRAWS):
        draw = make_draw(seed)
        clean = draw.clean()
        far = of_sequences(clean.old - clean.new, draw) > threshold
        expected = 1.0 - ((clean.advantages < 0) & far).double()
        for layout in layouts(draw):
            new, old, _, _, advantages = map(layout.of_tokens, draw[:5])
            found = off_policy_weights(new, old, advantages, threshold=threshold, **layout.options)
            mask = layout.options["mask"]
            assert torch.equal(found[mask], layout.of_tokens(expected)[mask])


def test_draws_meet_every_border():
    """Both sides of each, with advantages of both signs."""
    draws = [make_draw(seed).clean() for seed in range(DRAWS)]
    log_ratio = torch.cat([(draw.new - draw.old)[draw.mask] for draw in draws])
    advantages = torch.cat([draw.advantages[draw.mask] for draw in draws])
    d = torch.cat([(draw.new - draw.ref)[draw.mask] for draw in draws])
    w = torch.cat([(draw.old - draw.rollout)[draw.mask] for draw in draws]).exp()
    whole = torch.cat([geometric(draw)[draw.mask.any(1)] for draw in draws])
    for value, borders in (
        (log_ratio, BORDERS), (d, (INPUT_CLAMP, -INPUT_CLAMP)), (k3(d), (OUTPUT_CLAMP,)),
        (w, (WEIGHT_LOW, WEIGHT_HIGH)), (whole, (WEIGHT_LOW, WEIGHT_HIGH)),
    ):  # fmt: skip
        for border in borders:
            assert (value < border).any()
            assert (value > border).any()
    for border in BORDERS:
        is_near = (log_ratio - border).abs() < 0.05
        for side in (log_ratio < border, log_ratio > border):
            assert (advantages[is_near & side] > 0).any()
            assert (advantages[is_near & side] < 0).any()
    assert (advantages == 0).any()
    s = torch.cat([
        of_sequences(draw.new - draw.old, draw)[draw.mask.any(1)]
        for draw in (make_draw(seed, of_sequences=True).clean() for seed in range(DRAWS))
    ])  # fmt: skip
    for border in SEQUENCE_BORDERS:
        assert (s < border).any()
        assert (s > border).any()


# Where verl is installed: what is written here is what it does, up to its 1e-8 in means


@pytest.mark.parametrize(
    ("mode", "name", "tolerance"),
    [
        ("vanilla", "dual clip: verl, slime, NeMo-RL", EXACT), ("cispo", "CISPO", EXACT),
        ("gpg", "REINFORCE: verl's gpg, slime, NeMo-RL's disable_ppo_ratio", EXACT),
        ("sapo", "SAPO", 1e-7), ("gspo", "GSPO-token: verl", 1e-7), ("geo_mean", "GMPO", 1e-7),
    ],
)  # fmt: skip
def test_formulas_are_verl_s(mode, name, tolerance):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    configs = pytest.importorskip("verl.workers.config")
    is_gspo = mode == "gspo"
    config = configs.FSDPActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, tau_pos=1.1, tau_neg=1.6,
        clip_ratio_low=SEQUENCE_LOW if is_gspo else LOW, clip_ratio_c=DUAL,
        clip_ratio_high=SEQUENCE_HIGH if is_gspo else HIGH,
    )  # fmt: skip
    formula, _, kind = SURROGATES[name]

    def verl_s(draw):
        loss, _ = core_algos.get_policy_loss_fn(mode)(
            draw.old, draw.new, draw.advantages, draw.mask,
            "seq-mean-token-mean" if is_gspo else "token-mean", config,
        )  # fmt: skip
        rows = B / draw.mask.any(1).sum()  # geo_mean counts empty ones
        return loss * rows if mode == "geo_mean" else loss

    for seed in range(DRAWS):
        draw = make_draw(seed, **kind).clean()
        (value, grad), (theirs, their_grad) = (value_and_grad(f, draw) for f in (formula, verl_s))
        assert theirs == pytest.approx(value, rel=tolerance, abs=EXACT)
        assert (their_grad - grad).abs().max() <= tolerance * grad.abs().max()


@pytest.mark.parametrize("estimate", ["k1", "k2", "k3", "abs", "k1+", "k3+"])
def test_estimates_are_verl_s(estimate):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    kl = {"k3": low_var_kl, "k3+": with_gradient_of_k2(low_var_kl)}.get(estimate)
    kl = kl or ESTIMATES[estimate][0]
    for seed in range(DRAWS):
        draw = make_draw(seed).clean()
        results = [
            value_and_grad(lambda x, f=f: token_mean(f(x), x), draw)
            for f in (
                lambda x: kl(x.new - x.ref),
                lambda x: core_algos.kl_penalty(x.new, x.ref, estimate),
            )
        ]
        (value, grad), (theirs, their_grad) = results
        assert theirs == pytest.approx(value, rel=EXACT)
        assert (their_grad - grad).abs().max() <= EXACT * grad.abs().max()
