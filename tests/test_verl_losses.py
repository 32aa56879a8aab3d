"""Each registered loss compared with verl's own, on the same tensors."""

import importlib.util
import logging

import pytest
import torch

from gspo_ops.integrations import verl as ours
from gspo_ops.integrations import verl_losses
from gspo_ops.integrations.verl_losses import AGGREGATIONS

if importlib.util.find_spec("verl") is None:
    pytest.skip("needs verl: pip install --no-deps verl, and what it imports",
                allow_module_level=True)  # fmt: skip
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
from verl.trainer.config.algorithm import RolloutCorrectionConfig  # noqa: E402
from verl.workers.config import ActorConfig, FSDPActorConfig, PolicyLossConfig  # noqa: E402

INFOS = {
    "counted here": {},
    "global": {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9},
    "scaled": {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9,
               "loss_scale_factor": 50},
}  # fmt: skip
FUSED = ("vanilla", "gspo", "sapo", "geo_mean", "cispo", "gpg")
LEFT_TO_VERL = ("dppo_tv", "dppo_kl", "clip_cov", "kl_cov", "dro", "bypass_mode")
DUAL = 2.0


def make_config(mode="gspo", info=(), **options):
    clip = {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4} if mode == "gspo" else {
        "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": DUAL}  # fmt: skip
    config = FSDPActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, tau_pos=1.1, tau_neg=1.6,
        policy_loss=PolicyLossConfig(
            loss_mode=ours.register(), dro_beta=0.1, rollout_correction=RolloutCorrectionConfig()
        ),
        **clip | options,
    )  # fmt: skip
    assert isinstance(config, ActorConfig)
    config.global_batch_info.update(info)
    return config


def make_batch(dtype, per_token, mode="gspo"):
    """Make ratios on both sides of every border, a short sequence, an empty one, and gaps."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    mask = torch.ones(6, 8, dtype=torch.long)
    mask[1, 3:] = 0
    mask[2] = 0  # no token at all
    mask[4, ::2] = 0
    old = -5 * random(6, 8)
    if mode == "gspo":
        shift = torch.tensor([1e-4, 3.5e-4, 0.1, -2e-4, -5e-4, 5e-4], dtype=torch.float64)
        new = old + shift[:, None] + 1e-4 * (random(6, 8) - 0.5)
    else:
        new = old + 3 * (random(6, 8) - 0.5)
    advantages = random(6, 8 if per_token else 1) - 0.5
    advantages[5] = 0.0
    weights = 0.5 + random(6, 8)
    batch = (old, new, advantages.expand(6, 8).contiguous(), weights)
    return [x.to(dtype) for x in batch] + [mask]


def run(function, config, average, batch, weighted):
    old, new, advantages, weights, mask = batch
    new = new.clone().requires_grad_()
    torch.manual_seed(0)  # for clip_cov
    loss, metrics = function(
        old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask,
        loss_agg_mode=average, config=config, rollout_is_weights=weights if weighted else None,
    )  # fmt: skip
    (3.0 * loss).backward()
    return loss.detach(), new.grad, metrics


def both(mode, config, average, batch, weighted):
    """Run a loss by verl and by us."""
    names = (mode, "gspo_ops" if mode == "gspo" else f"gspo_ops_{mode}")
    return (run(core_algos.get_policy_loss_fn(name), config, average, batch, weighted)
            for name in names)  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("average", AGGREGATIONS)
@pytest.mark.parametrize("mode", FUSED)
def test_equals_verl_s_own(mode, average, info, per_token, weighted):
    config = make_config(mode, INFOS[info])
    is_fused = mode != "geo_mean" or not per_token
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 5e-6)):
        batch = make_batch(dtype, per_token, mode)
        theirs, mine = both(mode, config, average, batch, weighted)
        # verl divides by a length plus 1e-8
        torch.testing.assert_close(mine[0], theirs[0], atol=0, rtol=tolerance)
        largest = theirs[1].abs().max().item()
        torch.testing.assert_close(
            mine[1], theirs[1], atol=0.1 * tolerance * largest, rtol=tolerance
        )
        assert torch.equal(mine[1] == 0, theirs[1] == 0)
        assert 0 < (mine[1] != 0).sum() < mine[1].numel()
        for key, value in theirs[2].items():
            assert mine[2][key] == pytest.approx(value, abs=2e-7), key
        assert ("gspo_ops/active_token_frac" in mine[2]) == is_fused


@pytest.mark.parametrize(("mode", "count"), [("vanilla", 3), ("geo_mean", 3), ("cispo", 2)])
def test_borders_are_met(mode, count):
    """Clip metrics are not all 0, as otherwise their equality would show nothing."""
    *_, metrics = run(core_algos.get_policy_loss_fn(f"gspo_ops_{mode}"), make_config(mode),
                      "token-mean", make_batch(torch.float64, False, mode), False)  # fmt: skip
    names = ("actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_clipfrac_lower")
    assert sum(metrics[name] != 0 for name in names) == count


@pytest.fixture
def logged(caplog):
    """Record warnings about losses; each is given only once, so earlier ones are forgotten."""
    verl_losses.say_once.cache_clear()
    caplog.set_level(logging.WARNING, logger=verl_losses.__name__)
    return caplog


@pytest.mark.parametrize("mode", LEFT_TO_VERL)
def test_what_no_objective_says_is_verl_s_own(mode, logged):
    config, batch = make_config(mode), make_batch(torch.float64, True, mode)
    for _ in range(2):
        theirs, mine = both(mode, config, "token-mean", batch, True)
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
        assert mine[2] == theirs[2]
    (said,) = logged.messages
    assert said == f"loss_mode=gspo_ops_{mode} is verl's own {mode}: no objective expresses it"


@pytest.mark.parametrize(
    ("mode", "per_token", "options", "reason"),
    [
        ("vanilla", False, {"clip_ratio_c": 1.1}, "dual_clip must be"),
        ("geo_mean", True, {}, "the advantages differ within a sequence"),
    ],
)
def test_settings_that_no_objective_has_are_verl_s_own(mode, per_token, options, reason, logged):
    config, batch = make_config(mode, **options), make_batch(torch.float64, per_token, mode)
    theirs, mine = both(mode, config, "token-mean", batch, False)
    assert torch.equal(mine[1], theirs[1])
    assert mine[2] == theirs[2]
    (said,) = logged.messages
    assert reason in said


def test_every_loss_of_verl_has_a_counterpart():
    ours.register()
    assert ours.register() == "gspo_ops"  # twice is fine
    names = {name for name in core_algos.POLICY_LOSS_REGISTRY if not name.startswith("gspo_ops")}
    assert names == {*FUSED, *LEFT_TO_VERL}
    for name in names:
        assert f"gspo_ops_{name}" in core_algos.POLICY_LOSS_REGISTRY


def test_a_loss_of_one_s_own_has_a_counterpart(monkeypatch, logged):
    def own(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
            rollout_is_weights):  # fmt: skip
        return (old_log_prob * advantages * log_prob).sum(), {"own": 1.0}

    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", {"own": own})
    ours.register()
    batch = make_batch(torch.float64, True)
    theirs, mine = (
        run(core_algos.get_policy_loss_fn(name), make_config(), "of its own", batch, True)
        for name in ("own", "gspo_ops_own")
    )
    assert torch.equal(mine[1], theirs[1])
    assert mine[2] == {"own": 1.0}
    assert len(logged.messages) == 1


@pytest.mark.parametrize("mode", FUSED)
def test_padding_may_hold_anything(mode):
    config = make_config(mode)
    old, new, advantages, weights, mask = make_batch(torch.float32, False, mode)
    function = core_algos.get_policy_loss_fn(f"gspo_ops_{mode}")
    options = {"config": config, "loss_agg_mode": "seq-mean-token-mean"}
    expected, metrics = function(old, new, advantages, mask, rollout_is_weights=weights, **options)
    old, new, advantages, weights = (
        torch.where(mask == 0, torch.nan, x) for x in (old, new, advantages, weights)
    )
    new.requires_grad_()
    loss, found = function(old, new, advantages, mask, rollout_is_weights=weights, **options)
    loss.backward()
    assert torch.equal(loss, expected)
    assert found == metrics
    assert (new.grad[mask == 0] == 0).all()


def test_a_ratio_beyond_verl_s_clamp_has_its_gradient():
    """The gradient does not stop at +-20, where verl clamps log-ratios and loses it."""
    old, new, ones = torch.full((1, 2), -30.0), torch.tensor([[-1.0, -30.0]]), torch.ones(1, 2)
    config, batch = make_config("vanilla", clip_ratio_c=1e30), (old, new, -ones, None, ones)
    theirs, mine = both("vanilla", config, "token-mean", batch, False)
    assert theirs[1][0, 0] == 0
    assert mine[1][0, 0].item() == pytest.approx(3 * 0.5 * torch.tensor(29.0).exp().item())


def test_wrong_uses_are_refused():
    old, new, advantages, _, mask = make_batch(torch.float32, False)
    with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):  # verl's own words
        ours.policy_loss(old, new, advantages, mask, "mean", make_config())
    with pytest.raises(ValueError, match="config must be verl's ActorConfig"):
        ours.policy_loss(old, new, advantages, mask)
    with pytest.raises(ValueError, match="must have global_batch_size with dp_size=2"):
        ours.policy_loss(old, new, advantages, mask, config=make_config(info={"dp_size": 2}))
    wide = FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    with pytest.warns(UserWarning, match="clip_ratio_low=0.2 never clips"):
        ours.policy_loss(old, new, advantages, mask, config=wide)
