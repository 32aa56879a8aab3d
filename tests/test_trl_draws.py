"""GSPOTrainer's loss compared with GRPOTrainer's on inputs and settings drawn at random.

GSPO_OPS_TRL_DRAWS=4000 draws more.
"""

import importlib.util
import math
import os
import random
from functools import partial

import pytest
import torch

if importlib.util.find_spec("trl") is None:
    pytest.skip("needs trl: pip install 'gspo-ops[trl]'", allow_module_level=True)
import transformers
from trl import GRPOTrainer
from trl_inputs import trainer_of

from gspo_ops.integrations.trl import GSPOTrainer
from gspo_ops.trainer.tiny import character_tokenizer

DRAWS = int(os.environ.get("GSPO_OPS_TRL_DRAWS", "160"))
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
# closer to a border than this, the two may decide differently: their log-probs differ by less
AWAY = 1e-5


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(character_tokenizer()), hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    ))  # fmt: skip
    return trainer_of(model, tmp_path_factory.mktemp("out"), GSPOTrainer, temperature=0.9)


# Drawing


def maybe(rng, value, chance=0.3, otherwise=None):
    return value if rng.random() < chance else otherwise


def draw_settings(rng, loss_type):
    scale = rng.choice([3e-3, 0.03, 0.3])  # of log-ratios, and of the clip range
    epsilon = scale * rng.uniform(0.2, 1.5)
    epsilon_high = scale * rng.uniform(0.2, 1.5)
    delta = 1 + scale * rng.uniform(-0.5, 3) if rng.random() < 0.3 else None
    if loss_type == "cispo":
        epsilon_high += rng.choice([1.0, 1.0, 1.0, 1 - 2 * scale])
    bonus = {}
    if rng.random() < 0.3:
        bonus = {"entropy_coef": rng.choice([0.01, 0.3, -0.1])}
    elif rng.random() < 0.15:
        bonus = {
            "use_adaptive_entropy": True, "entropy_coef": rng.uniform(0, 0.5),
            "entropy_target": rng.choice([0.5, 3.0, 5.0]),
        }  # fmt: skip
    return bonus | {
        "loss_type": loss_type, "scale": scale, "epsilon": epsilon, "epsilon_high": epsilon_high,
        "importance_sampling_level": rng.choice(["token", "sequence"]), "delta": delta,
        "beta": maybe(rng, rng.choice([0.04, 0.5]), 0.4, 0.0),
        "use_bias_correction_kl": rng.random() < 0.6,
        "top_entropy_quantile": maybe(rng, rng.uniform(0.1, 0.95), 0.25, 1.0),
        "off_policy_mask_threshold": maybe(rng, scale * rng.uniform(0, 1), 0.25),
        "use_vllm": rng.random() < 0.3,
        "vllm_importance_sampling_correction": rng.random() < 0.8,
        # TRL converts these to fp32
        "sapo_temperature_pos": rng.randrange(32, 128) / 64,
        "sapo_temperature_neg": rng.randrange(32, 128) / 64,
        "vespo_k_pos": rng.uniform(1, 3), "vespo_lambda_neg": rng.uniform(1, 3),
        "max_completion_length": rng.randint(4, 16),
        "steps_per_generation": rng.choice([1, 2, 4]), "accumulation": rng.choice([1, 2, 3]),
        "is_training": rng.random() < 0.8, "syncs": rng.random() < 0.7,
        "skip": rng.choice(["auto", "none"]),
    }  # fmt: skip


def apply(trainer, settings):
    """Set what GRPOTrainer keeps of its config, as its __init__ does."""
    fixed = {"use_adaptive_entropy": False, "entropy_coef": 0.0, "entropy_target": 0.2}
    settings = fixed | settings
    for name, value in settings.items():
        for holder in (trainer, trainer.args):
            if hasattr(holder, name):
                setattr(holder, name, value)
    trainer.epsilon_low = settings["epsilon"]
    trainer._entropy_bonus_enabled = (
        settings["entropy_coef"] != 0.0 or settings["use_adaptive_entropy"]
    )
    trainer._skip = settings["skip"]
    trainer.current_gradient_accumulation_steps = settings["accumulation"]
    trainer.accelerator.gradient_state._set_sync_gradients(settings["syncs"])
    trainer.model.train(settings["is_training"])
    return settings


def draw_inputs(rng, trainer, settings):
    B, T, P = rng.randint(1, 5), rng.randint(2, 7), rng.randint(1, 4)
    scale = settings["scale"]
    completion, prompt = torch.randint(5, 90, (B, T)), torch.randint(5, 90, (B, P))
    lengths = torch.randint(0, T + 1, (B,)) if rng.random() < 0.6 else torch.full((B,), T)
    if rng.random() < 0.03:
        lengths[:] = 0
    prompt_mask = torch.ones(B, P, dtype=torch.long)
    prompt_mask[0, : rng.randint(0, P - 1)] = 0
    advantages = torch.randn(B, T) if rng.random() < 0.25 else torch.randn(B)
    advantages[torch.rand(advantages.shape) < 0.2] = 0.0
    inputs = {
        "prompt_ids": prompt, "prompt_mask": prompt_mask, "completion_ids": completion,
        "completion_mask": (torch.arange(T) < lengths[:, None]).long(), "advantages": advantages,
        "num_items_in_batch": torch.tensor(rng.randint(0, 60)),
    }  # fmt: skip
    if rng.random() < 0.4:
        inputs["tool_mask"] = (torch.rand(B, T) < 0.7).long()
    with torch.no_grad():
        new, entropy, _ = log_probs_of(trainer, GSPOTrainer, inputs, compute_entropy=True)
    shift = torch.randn(B, 1) + rng.choice([0.0, 0.3, 1.0]) * torch.randn(B, T)
    if rng.random() < 0.75:
        inputs["old_per_token_logps"] = new - scale * shift
    if settings["use_vllm"]:
        sampling = inputs.get("old_per_token_logps", new) + scale * torch.randn(B, T)
        if rng.random() < 0.3:
            sampling[0, 0] = torch.nan
        inputs["sampling_per_token_logps"] = sampling
        if settings["vllm_importance_sampling_correction"]:
            by_token = settings["loss_type"] == "vespo" or rng.random() < 0.5  # as in TRL
            weights = torch.exp(0.3 * torch.randn(B, T if by_token else 1))
            weights[torch.rand(weights.shape) < 0.15] = 0.0
            outside = (trained_mask(inputs) == 0) & by_token
            inputs["importance_sampling_ratio"] = torch.where(outside, 1.0, weights)
            inputs["importance_sampling_ratio"] = inputs["importance_sampling_ratio"][
                :, : weights.shape[1]
            ]
    if settings["beta"]:
        inputs["ref_per_token_logps"] = new + 0.3 * torch.randn(B, T)
    return inputs, new, entropy


def trained_mask(inputs):
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)


def is_near_a_border(inputs, new, entropy, settings):
    """Return whether a ratio, a KL or an entropy is so near a border that decisions may differ."""
    mask = trained_mask(inputs)
    valid, n = mask != 0, mask.sum(1).clamp(min=1)
    old = inputs.get("old_per_token_logps", new)
    log_ratio = torch.where(valid, new - old, 0.0)
    ratio, by_sequence = log_ratio[valid].exp(), (log_ratio.sum(1) / n).exp()
    if settings["importance_sampling_level"] == "sequence":
        ratio = by_sequence
    borders = [1 - settings["epsilon"], 1 + settings["epsilon_high"], settings["epsilon_high"]]
    distances = [ratio - x for x in [*borders, settings["delta"] or 0.0]]
    if settings["off_policy_mask_threshold"] is not None:
        sampling = inputs.get("sampling_per_token_logps", old)
        kl = torch.nan_to_num(sampling - new) * mask
        distances.append(kl.sum(1) / n - settings["off_policy_mask_threshold"])
    if settings["top_entropy_quantile"] < 1 and valid.any():
        values = entropy[valid]
        distances.append(values - values.quantile(1 - settings["top_entropy_quantile"]))
        if settings.get("use_adaptive_entropy"):
            distances.append(values.mean() - settings["entropy_target"])
    return any((x.abs() < AWAY).any() for x in distances)


def draw(trainer, loss_type, seed):
    """Draw settings and inputs, again and again as long as they are near a border."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        settings = apply(trainer, draw_settings(rng, loss_type))
        inputs, new, entropy = draw_inputs(rng, trainer, settings)
        if not is_near_a_border(inputs, new, entropy, settings):
            return settings, inputs


# Comparing


def log_probs_of(trainer, kind, inputs, **options):
    ids, mask = (
        torch.cat([inputs[f"prompt_{of}"], inputs[f"completion_{of}"]], 1) for of in ("ids", "mask")
    )
    return kind._get_per_token_logps_and_entropies(
        trainer, trainer.model, ids, mask, inputs["completion_ids"].shape[1], **options
    )


def step(trainer, kind, settings, inputs, of=None):
    """Return loss, gradient, metrics and the state of the entropy's controller.

    They are those of a kind of trainer, with its own log-probs or those of the kind `of`.
    """
    trainer.entropy_coef = settings["entropy_coef"]
    trainer._last_world_entropy, trainer._entropy_window_stats = 2.0, None
    trainer._get_per_token_logps_and_entropies = partial(
        (of or kind)._get_per_token_logps_and_entropies, trainer
    )
    metrics = trainer._metrics["train" if settings["is_training"] else "eval"]
    metrics.clear()
    trainer.model.zero_grad()
    loss = kind._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    grad = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).double()
    state = [trainer.entropy_coef, trainer._last_world_entropy]
    return loss.item(), grad, {name: x[0] for name, x in metrics.items()}, state


def distance(trainer, settings, inputs, of=GRPOTrainer):
    """Check that loss and metrics are equal; return the gradients' relative L2 distance.

    Those of GRPOTrainer are from its own log-probs, or from those of the kind `of`.
    """
    expected, grad, metrics, state = step(trainer, GRPOTrainer, settings, inputs, of)
    loss, ours, our_metrics, our_state = step(trainer, GSPOTrainer, settings, inputs)
    del trainer._get_per_token_logps_and_entropies
    norm = grad.norm().item()
    # log-probs differ by about 1e-6, and the loss by as much times its gradient
    close = partial(pytest.approx, rel=1e-5, abs=2e-6 * (1 + norm), nan_ok=True)
    assert loss == close(expected)
    assert our_state == pytest.approx(state, rel=1e-5)
    assert metrics.keys() <= our_metrics.keys()
    if our_metrics.get("gspo_ops/computed_frac", 1) < 1:
        # what is left out has no entropy here, and is not clipped, whatever its ratio and weight
        weights = inputs.get("importance_sampling_ratio", torch.ones(1))
        others = ("entropy",) if (weights != 0).all() else ("entropy", "clip_", "cispo_")
        metrics = {name: x for name, x in metrics.items() if not name.startswith(others)}
    for name, value in metrics.items():
        assert our_metrics[name] == close(value), name
    difference = (ours - grad).norm().item()
    return difference / norm if norm else difference


def exact_distance(trainer, settings, inputs):
    """Do the same in float64 with the same log-probs: TRL's are in fp32 whatever the model's."""
    trainer.model.double()
    try:
        inputs = {
            name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
            for name, x in inputs.items()
        }
        return distance(trainer, settings, inputs, of=GSPOTrainer)
    finally:
        trainer.model.float()


@pytest.mark.filterwarnings("ignore:aggregation")
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_draws(trainer, loss_type):
    """Gradients agree in float64, and in fp32 except for a few that nearly cancel."""
    found = []
    for seed in range(math.ceil(DRAWS / len(LOSS_TYPES))):
        settings, inputs = draw(trainer, loss_type, seed)
        try:
            found.append(distance(trainer, settings, inputs))
            assert exact_distance(trainer, settings, inputs) <= 1e-12
        except Exception as error:
            raise AssertionError(f"{seed=}: {settings}") from error
    assert max(found) <= 1e-4
    assert sum(x > 1e-5 for x in found) <= 0.01 * len(found)


def test_metrics_of_one_token(trainer):
    """Only tokens of the mask count, where TRL averages over all sequences."""
    settings = apply(trainer, draw_settings(random.Random(0), "grpo") | {
        "beta": 0.1, "skip": "none", "top_entropy_quantile": 1.0, "delta": None,
        "off_policy_mask_threshold": None, "entropy_coef": 0.0, "use_vllm": False,
        "use_adaptive_entropy": False, "use_bias_correction_kl": False,
    })  # fmt: skip
    inputs = {
        "prompt_ids": torch.randint(5, 90, (2, 3)), "prompt_mask": torch.ones(2, 3).long(),
        "completion_ids": torch.randint(5, 90, (2, 1)),
        "completion_mask": torch.tensor([[1], [0]]), "advantages": torch.tensor([1.0, -1.0]),
        "num_items_in_batch": torch.tensor(1),
    }  # fmt: skip
    with torch.no_grad():
        new, entropy, _ = log_probs_of(trainer, GSPOTrainer, inputs, compute_entropy=True)
    inputs["ref_per_token_logps"] = new - 0.5
    metrics = step(trainer, GSPOTrainer, settings, inputs)[2]
    assert metrics["entropy"] == pytest.approx(entropy[0, 0].item())
    assert metrics["kl"] == pytest.approx(math.exp(-0.5) - 1 + 0.5, rel=1e-5)
