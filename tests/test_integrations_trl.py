"""GSPOTrainer's loss compared with GRPOTrainer's, on the same inputs and in a real run."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import fields
from functools import partial

import pytest
import torch

if importlib.util.find_spec("trl") is None:
    pytest.skip("needs trl: pip install 'gspo-ops[trl]'", allow_module_level=True)
import transformers
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from trl_inputs import trainer_of

from gspo_ops.benchmarks import report, trl_run
from gspo_ops.integrations import trl as trl_integration
from gspo_ops.integrations.trl import GSPOTrainer
from gspo_ops.integrations.trl_settings import ROUTES, Route
from gspo_ops.trainer.tiny import character_tokenizer

LEVELS = {
    "GSPO": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "GRPO": {"importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": 0.27},
}
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
levels = pytest.mark.parametrize("level", LEVELS)


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """Save a model to a directory, from which TRL loads the reference model too."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(character_tokenizer()), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def make_trainer(directory, tmp_path):
    return partial(trainer_of, str(directory), tmp_path)


def make_lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)


def make_inputs(trainer, on_policy=False):
    """Make inputs with ratios on both sides of the clip range.

    They have padding on both sides, a tool's tokens, and a response without a trained token.
    """
    generator = torch.Generator().manual_seed(0)
    completion = torch.randint(5, 90, (6, 6), generator=generator)
    mask = torch.ones(6, 6, dtype=torch.long)
    mask[1, 4:] = 0
    tool = torch.ones_like(mask)
    tool[3, 1:3] = 0
    tool[5] = 0
    prompt_mask = torch.ones(6, 4, dtype=torch.long)
    prompt_mask[2, :2] = 0
    inputs = {
        "prompt_ids": torch.randint(5, 90, (6, 4), generator=generator),
        "prompt_mask": prompt_mask, "completion_ids": completion, "completion_mask": mask,
        "tool_mask": tool, "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 1.0]),
        "num_items_in_batch": torch.tensor(31),
    }  # fmt: skip
    with torch.no_grad():
        new = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], completion], 1), torch.cat([prompt_mask, mask], 1), 6,
        )[0]  # fmt: skip
    shift = torch.tensor([1e-4, -2e-4, 5e-2, -5e-2, 0.1, 0.0])[:, None]
    if trainer.importance_sampling_level == "token":
        shift = shift * 8
    noise = 1e-5 * torch.randn(new.shape, generator=generator)
    if not on_policy:
        inputs["old_per_token_logps"] = new - shift - noise
    inputs["ref_per_token_logps"] = new + 0.1 * torch.randn(new.shape, generator=generator)
    return inputs


def loss_and_grads(trainer, kind, inputs):
    log_probs = kind._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = partial(log_probs, trainer)
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = kind._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    return loss.detach(), grads, {k: v[0] for k, v in trainer._metrics["train"].items()}


def assert_same(trainer, inputs):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    expected, grads, metrics = loss_and_grads(trainer, GRPOTrainer, inputs)
    loss, ours, our_metrics = loss_and_grads(trainer, GSPOTrainer, inputs)
    torch.testing.assert_close(loss, expected, atol=1e-7, rtol=1e-5)
    for name, grad in ours.items():
        torch.testing.assert_close(
            grad, grads[name], atol=1e-6 * grads[name].abs().max().item(), rtol=1e-3, msg=name
        )
    # ours is the entropy of the sequences for which the model ran
    computed = our_metrics["gspo_ops/computed_frac"]
    if computed < 1:
        is_live = inputs["advantages"] != 0
        metrics["entropy"] = entropy_of(trainer, inputs, is_live)
        assert computed == (is_live & (trained_mask(inputs).sum(1) > 0)).float().mean()
    for name in metrics:
        assert our_metrics[name] == pytest.approx(metrics[name], abs=1e-5), name
    return our_metrics


def trained_mask(inputs):
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)


@torch.no_grad()
def entropy_of(trainer, inputs, sequences):
    tokens, attention = (
        torch.cat([inputs[f"prompt_{of}"], inputs[f"completion_{of}"]], 1) for of in ("ids", "mask")
    )
    entropy = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer, trainer.model, tokens, attention, 6, compute_entropy=True
    )[1]
    return entropy[(trained_mask(inputs) * sequences[:, None]) != 0].mean().item()


@pytest.mark.filterwarnings("ignore:aggregation")
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@levels
def test_loss_gradient_and_metrics_are_trl_s(make_trainer, level, loss_type, beta):
    trainer = make_trainer(
        GSPOTrainer,
        loss_type=loss_type,
        beta=beta,
        temperature=0.9,
        use_bias_correction_kl=False,
        **LEVELS[level],
    )
    metrics = assert_same(trainer, make_inputs(trainer))
    assert metrics["clip_ratio/region_mean"] > 0
    assert (metrics["gspo_ops/active_token_frac"] < 1) == (beta == 0)


@levels
def test_on_policy(make_trainer, level):
    trainer = make_trainer(GSPOTrainer, loss_type="grpo", **LEVELS[level])
    metrics = assert_same(trainer, make_inputs(trainer, on_policy=True))
    assert metrics["gspo_ops/ratio_max"] == metrics["gspo_ops/ratio_min"] == 1.0


@pytest.mark.parametrize("per_token", [False, True])
@levels
def test_importance_sampling_correction(make_trainer, level, per_token):
    """Results match TRL's with the weights that it computes from vLLM's log-probs."""
    trainer = make_trainer(GSPOTrainer, loss_type="grpo", beta=0.05,
        **LEVELS[level],
    )  # fmt: skip
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    inputs = make_inputs(trainer)
    generator = torch.Generator().manual_seed(1)
    shape = (6, 6) if per_token else (6, 1)
    inputs["importance_sampling_ratio"] = 0.5 + torch.rand(shape, generator=generator)
    assert_same(trainer, inputs)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2},
        {"lora": True, "beta": 0.1},
    ],
    ids=lambda options: next(iter(options), "plain"),
)  # fmt: skip
@levels
def test_a_real_run_goes_the_same_way(make_trainer, level, options):
    assert_same_way(make_trainer, level, "grpo", **options)


def test_two_processes_go_the_same_way(directory, tmp_path):
    """Both trainers agree on two processes, where torchrun runs this file as a program."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, __file__, directory, tmp_path], env=environment, check=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_goes_the_same_way(directory, tmp_path, stage):
    """Both trainers agree under DeepSpeed's ZeRO, which shards every weight in stage 3."""
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install deepspeed")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [*command, __file__, directory, tmp_path, str(stage)], env=environment, check=True
    )


def assert_same_way(make_trainer, level, loss_type, **options):
    """Check that both trainers agree over several updates per rollout, from one seed."""
    options |= {"num_iterations": 2, "max_steps": 4, "loss_type": loss_type, **LEVELS[level]}
    if options.pop("lora", False):
        options["peft_config"] = make_lora()
    logs, weights, evaluated = [], [], []
    for kind in (GRPOTrainer, GSPOTrainer):
        trainer = make_trainer(kind, **options)
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "loss" in row])
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        evaluated.append(trainer.evaluate()["eval_loss"])
    assert len(logs[0]) == len(logs[1]) == 4
    assert "reward" in logs[0][0]
    for theirs, ours in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)
        assert ours.get("reward") == theirs.get("reward")  # logged in steps that sample responses
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        for side in ("low", "high", "region"):
            name = f"clip_ratio/{side}_mean"
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
        assert "gspo_ops/ratio_max" in ours
    torch.testing.assert_close(*weights, atol=2e-3, rtol=1e-2)
    assert evaluated[1] == pytest.approx(evaluated[0], abs=1e-3)


def test_benchmark_compares_one_run_of_both_trainers(directory, monkeypatch):
    small = {"max_completion_length": 6, "learning_rate": 3e-6}
    case = "GSPO, importance sampling correction"
    monkeypatch.setattr(trl_run, "CASES", {case: trl_run.CASES[case] | small})
    runs = {kind: [trl_run.run(kind, case, directory)] for kind in trl_run.KINDS}
    found = trl_run.compare(runs)
    assert found["same_responses"]
    assert len(found["lengths"]) == 16
    gradient = found["gradient"]
    assert gradient["same_clipped"]
    assert 0 < gradient["clipped"] < 1
    for error in (*gradient["errors"].values(), gradient["between"]):
        assert 0 < error["gradient"] < 1e-5
    assert gradient["weights"][0] < gradient["weights"][1], "the engine's log-probs are used"
    table = {
        "benchmark": "trl_run", "environment": [], "threads": 1, "commit": "", "date": "",
        "model": "", "rounds": 1, "settings": trl_run.SETTINGS, "results": {case: found},
    }  # fmt: skip
    assert f"| {case} | yes, {sum(found['lengths'])} |" in report.render(table)


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_a_policy_is_the_same_as_itself(make_trainer, precision):
    """Before an update, old and reference log-probs equal the loss's own bit for bit."""
    trainer = make_trainer(
        GSPOTrainer, num_iterations=2, max_steps=1, beta=0.1,
        loss_type="grpo", temperature=0.9, bf16=precision == "autocast",
        model_init_kwargs={"dtype": "bfloat16" if precision == "bfloat16" else "float32"},
        **LEVELS["GSPO"],
    )  # fmt: skip
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["gspo_ops/ratio_min"] == row["gspo_ops/ratio_max"] == 1.0
    assert row["kl"] == 0.0


# Sequences without a gradient


def rows_of(trainer, inputs):
    """Return the sequences that the first MLP sees in forward and backward, and gradients."""
    rows = []
    layer = trainer.model.get_decoder().layers[0].mlp
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    with layer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0]))):
        loss = trainer._compute_loss(trainer.model, inputs)
        forward = len(rows)
        loss.backward()
    grads = [p.grad.clone() for p in trainer.model.parameters()]
    return set(rows[:forward]), set(rows[forward:]), grads


@pytest.mark.parametrize(
    ("skip", "on_policy", "dtype", "rows"),
    [
        ("auto", False, "float32", ({4}, {2})),
        ("none", False, "float32", ({6}, {6})),
        ("auto", False, "bfloat16", ({6}, {2})),  # for the rounding of old log-probs
        ("auto", True, "bfloat16", ({4}, {4})),
        ("dead", False, "bfloat16", ({4}, {2})),
    ],
)  # fmt: skip
def test_sequences_without_a_gradient(make_trainer, skip, on_policy, dtype, rows):
    trainers = [
        make_trainer(
            partial(GSPOTrainer, skip=of), loss_type="grpo", gradient_checkpointing=True,
            model_init_kwargs={"dtype": dtype}, **LEVELS["GSPO"],
        )
        for of in (skip, "none")
    ]  # fmt: skip
    inputs = make_inputs(trainers[0], on_policy)  # one has no advantage, one no token
    for trainer in trainers:
        trainer.model.gradient_checkpointing_enable()  # as transformers does to train
    *seen, grads = rows_of(trainers[0], inputs)
    assert tuple(seen) == rows
    trainers[0].model.gradient_checkpointing_disable()  # as TRL does to sample
    trainers[0].model.gradient_checkpointing_enable()
    assert tuple(rows_of(trainers[0], inputs)[:2]) == rows
    expected = rows_of(trainers[1], inputs)[2]
    norm = torch.stack([x.norm() for x in expected]).norm()
    difference = torch.stack([(x - y).norm() for x, y in zip(grads, expected, strict=True)]).norm()
    assert norm > 0
    assert difference <= (2e-6 if dtype == "float32" else 2e-2) * norm


def test_skip_is_checked(make_trainer):
    with pytest.raises(ValueError, match="skip must be one of 'auto', 'dead', 'none', got True"):
        make_trainer(partial(GSPOTrainer, skip=True))


# Other models


def of_experts():
    """Return a mixture of experts, with its router loss on by default."""
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        vocab_size=len(character_tokenizer()), hidden_size=32, intermediate_size=64, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, router_aux_loss_coef=0.1,
    ))  # fmt: skip


def of_images():
    text = {
        "vocab_size": len(character_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        "initializer_range": 0.2,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "spatial_merge_size": 1,
        "fullatt_block_indexes": [1],
        "window_size": 8,
        "initializer_range": 0.2,
    }
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=90, vision_start_token_id=91,
    ))  # fmt: skip


@levels
def test_a_mixture_of_experts_goes_the_same_way(make_trainer, level):
    torch.manual_seed(0)
    trainer = partial(trainer_of, of_experts(), make_trainer.args[1])
    metrics = assert_same(trainer(GSPOTrainer, **LEVELS[level]), make_inputs(trainer(GSPOTrainer)))
    assert metrics["aux_loss"] > 0.1


def test_images(make_trainer):
    """The model gets its own inputs; losses match TRL's for rows with no, one and two images."""
    torch.manual_seed(0)
    trainer = trainer_of(of_images(), make_trainer.args[1], GSPOTrainer, **LEVELS["GSPO"])
    inputs = make_inputs(trainer)
    counts = [1, 0, 2, 0, 0, 1]
    inputs["num_images"], inputs["image_grid_thw"] = counts, torch.tensor([[1, 1, 1]] * 4)
    inputs["pixel_values"] = torch.randn(4, 3 * 2 * 4 * 4)
    inputs["prompt_mask"][:] = 1
    for row, count in enumerate(counts):
        inputs["prompt_ids"][row, : 2 * count : 2] = 90
    inputs["mm_token_type_ids"] = torch.cat(
        [(inputs["prompt_ids"] == 90).long(), torch.zeros(6, 6, dtype=torch.long)], 1
    )
    images = {k: inputs[k] for k in ("num_images", "image_grid_thw", "pixel_values",
                                     "mm_token_type_ids")}  # fmt: skip
    ids, mask = (
        torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")
    )
    with torch.no_grad():
        whole, parts, theirs = (
            kind._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, 6, size,
                                                    **images)[0]
            for kind, size in ((GSPOTrainer, None), (GSPOTrainer, 2), (GRPOTrainer, None))
        )  # fmt: skip
    torch.testing.assert_close(parts, whole)
    valid = inputs["completion_mask"] != 0
    torch.testing.assert_close(whole[valid], theirs[valid], atol=1e-5, rtol=1e-5)
    shift = torch.tensor([1e-4, -2e-4, 5e-2, -5e-2, 0.1, 0.0])[:, None]
    inputs["old_per_token_logps"] = whole - shift
    assert_same(trainer, inputs)
    assert trainer.model.model.visual.patch_embed.proj.weight.grad.any()


def test_the_check_of_the_model_can_be_left_out(make_trainer):
    seen = {}
    for check in (True, False):
        kind = partial(GSPOTrainer, check_model=check)
        trainer = make_trainer(kind, **LEVELS["GSPO"])
        seen[check] = []
        trainer.model.lm_head.register_forward_hook(lambda *_, to=seen[check]: to.append(1))
        make_inputs(trainer)
    assert seen == {True: [1], False: []}


def test_the_compiled_model_runs(make_trainer, monkeypatch):
    calls = []

    def backend(graph, example):
        calls.append(0)
        at = len(calls) - 1

        def run(*args):
            calls[at] += 1
            return graph(*args)

        return run

    torch._dynamo.reset()
    torch._dynamo.lookup_backend("eager")
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "eager", backend)
    trainer = make_trainer(
        GSPOTrainer, torch_compile=True, torch_compile_backend="eager", num_iterations=2,
        max_steps=4, **LEVELS["GSPO"],
    )  # fmt: skip
    losses = []
    run = trainer._compute_loss

    def counted(*args):
        before = sum(calls)
        loss = run(*args)
        losses.append(sum(calls) - before)
        return loss

    monkeypatch.setattr(trainer, "_compute_loss", counted)
    trainer.train()
    assert losses == [1] * 4, "one compiled body for each loss"


# Settings

# examples of values that the table describes in words
EXAMPLES = {
    "any other loss_type": {"loss_type": "of a later TRL"},
    "epsilon_high below 1 with cispo, which the default is": {
        "loss_type": "cispo",
        "epsilon_high": None,
    },
    "any other epsilon_high": {"loss_type": "cispo"},
    "delta below 1": {"delta": 0.9},
    "any other delta": {"delta": 1.1},
    "beta below 0": {"beta": -0.1},
    "any other beta": {"beta": 0.1},
    "entropy_coef 0": {"entropy_coef": 0.0},
    "any other entropy_coef": {"entropy_coef": -0.1},
    "use_adaptive_entropy False": {},
    "use_adaptive_entropy True": {"use_adaptive_entropy": True},
    "top_entropy_quantile 1": {},
    "top_entropy_quantile below 1": {"top_entropy_quantile": 0.5},
    "off_policy_mask_threshold None": {},
    "any other off_policy_mask_threshold": {"off_policy_mask_threshold": 0.5},
}


def routes_by_value():
    for setting, routes in ROUTES.items():
        for value, route in routes.items():
            other = value == "any other"
            example = EXAMPLES.get(f"{value} {setting}" if other else f"{setting} {value}")
            alone = [{setting: x} for x in value.split(", ") if value != "any"]
            yield from ((x, route) for x in ([example] if example is not None else alone))


def test_every_setting_is_in_the_table():
    of_transformers = {field.name for field in fields(TrainingArguments)}
    of_trl = {field.name for field in fields(GRPOConfig)} - of_transformers
    assert of_trl - ROUTES.keys() == set(), "describe in ROUTES what GSPOTrainer does with them"
    assert ROUTES.keys() - of_trl <= of_transformers


@pytest.mark.filterwarnings("ignore:aggregation")
@pytest.mark.parametrize(("options", "route"), list(routes_by_value()), ids=str)
def test_each_value_goes_its_route(make_trainer, monkeypatch, options, route):
    trainer = make_trainer(GSPOTrainer, **{"epsilon_high": 5.0} | options)
    inputs = make_inputs(trainer)
    taken = []

    def own(_, *args):
        taken.append(Route.TRL)
        return torch.zeros(())

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", own)
    for name, of_method in (("_loss_of_model", Route.OP), ("_loss_of_log_probs", Route.LOG_PROBS)):
        method = getattr(trainer, name)

        def spy(*args, method=method, of_method=of_method):
            taken.append(of_method)
            return method(*args)

        monkeypatch.setattr(trainer, name, spy)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, inputs)
    assert taken == [route]


def test_the_log_says_once_that_the_loss_is_trl_s(make_trainer, monkeypatch):
    said = []
    monkeypatch.setattr(trl_integration._logger, "warning", lambda text, *_: said.append(text))
    trainer = make_trainer(GSPOTrainer, loss_type="dapo", delta=0.875)
    trainer.current_gradient_accumulation_steps = 1
    for _ in range(2):
        trainer._compute_loss(trainer.model, make_inputs(trainer))
    assert len(said) == 1
    assert "the loss is TRL's own: delta=0.875 is below 1" in said[0]


def under_zero(model, out, stage):
    """Check that both trainers agree under ZeRO, with two steps for each rollout."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    settings = {
        "zero_optimization": {"stage": int(stage), "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto", "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    logs = []
    for kind in (GRPOTrainer, GSPOTrainer):
        trainer = trainer_of(
            model, out, kind, num_iterations=2, max_steps=4, loss_type="grpo",
            deepspeed=settings, max_grad_norm=0.0, **LEVELS["GSPO"],
        )  # fmt: skip
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "loss" in row])
    assert len(logs[0]) == len(logs[1]) == 4
    assert any(row["grad_norm"] > 0 for row in logs[0])
    for theirs, ours in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "clip_ratio/region_mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    torch.distributed.barrier()
    os._exit(0)  # DeepSpeed's threads abort on a normal exit


if __name__ == "__main__":
    assert int(os.environ["WORLD_SIZE"]) == 2
    if len(sys.argv) > 3:
        under_zero(*sys.argv[1:])
    for level in LEVELS:
        for loss_type in ("grpo", "dapo"):
            assert_same_way(partial(trainer_of, *sys.argv[1:]), level, loss_type)
