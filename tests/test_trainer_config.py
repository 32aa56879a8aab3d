"""Settings of the trainer: files, presets, overrides, and what is refused."""

import math
import re

import pytest

from gspo_ops import GSPO, GSPOToken
from gspo_ops.trainer import COMMANDS, TrainConfig, load_config
from gspo_ops.trainer.config import from_tables, presets, to_tables

BAD = {
    "unknown key": ("nonsense=1", "unknown key nonsense; the choices are out, steps"),
    "unknown key, nearly": ("step=5", "unknown key step; did you mean steps?"),
    "unknown table": ("rolout.prompts=4", "unknown key rolout; did you mean rollout?"),
    "unknown key in a table": (
        "update.learning_rat=1e-5",
        "unknown key update.learning_rat; did you mean update.learning_rate?",
    ),
    "not key=value": ("steps", "expected key=value"),
    "key in a number": ("steps.x=1", "steps: expected an integer, got {'x': 1}"),
    "table as a number": ("model=3", "model: expected a table, got 3"),
    "text for a number": ("steps=many", "steps: expected an integer, got 'many'"),
    "fraction for an integer": ("steps=1.5", "steps: expected an integer, got 1.5"),
    "truth for an integer": ("steps=true", "steps: expected an integer, got True"),
    "number for truth": (
        "update.routing_replay=1",
        "update.routing_replay: expected true or false, got 1",
    ),
    "no steps": ("steps=0", "steps: expected at least 1, got 0"),
    "no time": ("time_limit=0", "time_limit: expected a positive number, got 0"),
    "device": ("device=abacus", "device: expected 'auto', 'cpu' or a GPU of this machine, such as"),
    "device without numbers": ("device=meta", "device: expected 'auto', 'cpu' or a GPU"),
    "device of another kind": ("device=mps", "device: expected 'auto', 'cpu' or a GPU"),
    "device of another machine": ("device=cuda:99", "device: expected 'auto', 'cpu' or a GPU"),
    "seed": ("seed=-1", "seed: expected an integer from 0 to below 2**63, got -1"),
    "large seed": (f"seed={2**63}", "seed: expected an integer from 0 to below 2**63, got 9"),
    "dtype": ("dtype=float16", "dtype: expected one of 'auto', 'bfloat16', 'float32', got"),
    "rank": ("model.lora_rank=-1", "model.lora_rank: expected at least 0, got -1"),
    "no problems": ("task.train_size=0", "task.train_size: expected at least 1"),
    "too few problems": ("task.train_size=8", "task.train_size: expected at least rollout.prompts"),
    "one held-out problem": ("task.eval_size=1", "task.eval_size: expected at least 2"),
    "reward": ("task.reward=guess", "task.reward: expected 'exact', 'score' or 'package.module"),
    "relative reward": ("task.reward=.x:f", "task.reward: expected 'exact', 'score' or 'package"),
    "date": ("task.options.min_date=2000-01-01", "task.options: expected texts, finite numbers,"),
    "option that is no number": ("task.options.x=nan", "task.options: expected texts, finite"),
    "objective": ("objective.name=gsp", "objective.name: expected one of 'gspo'"),
    "objective, nearly": ("objective.name=gspo_token", "did you mean gspo-token?"),
    "clip range": ("objective.clip_low=-1", "objective.clip_low must be finite and >= 0, got -1"),
    "aggregation": ("objective.aggregation=sum", "objective.aggregation must be one of"),
    "estimator": ("objective.kl_estimator=k4", "objective.kl_estimator must be one of"),
    "group of one": ("rollout.group_size=1", "rollout.group_size: expected at least 2"),
    "temperature": ("rollout.temperature=0", "rollout.temperature: expected a finite number of"),
    "no temperature": ("rollout.temperature=nan", "rollout.temperature: expected a finite number"),
    "low temperature": ("rollout.temperature=1e-40", "rollout.temperature: expected a finite"),
    "infinite temperature": (
        "evaluation.temperature=inf",
        "evaluation.temperature: expected 0 or a finite number of at least 1e-6, got inf",
    ),
    "negative temperature": ("evaluation.temperature=-1", "evaluation.temperature: expected 0 or"),
    "weight decay": ("update.weight_decay=inf", "update.weight_decay: expected 0 or a positive"),
    "target": (
        ["evaluation.every=1", "evaluation.target=inf"],
        "evaluation.target: expected 0 or a positive number, got inf",
    ),
    "stop": ("rollout.stop=line", "rollout.stop: expected one of 'newline', 'eos'"),
    "refill": ("rollout.refill=-1", "rollout.refill: expected at least 0"),
    "mini-batches": (
        "update.mini_batches=3",
        "update.mini_batches: expected a divisor of rollout.prompts=16, got 3",
    ),
    "epochs": ("update.epochs=0", "update.epochs: expected at least 1"),
    "learning rate": ("update.learning_rate=-1e-5", "update.learning_rate: expected a positive"),
    "gradient norm": ("update.max_grad_norm=inf", "update.max_grad_norm: expected a positive"),
    "loss": ("update.loss_from=head", "update.loss_from: expected one of 'hidden', 'logits'"),
    "cap": ("update.rollout_weight_cap=-1", "update.rollout_weight_cap: expected 0 or a positive"),
    "samples": ("evaluation.samples=0", "evaluation.samples: expected at least 1"),
    "no checkpoint kept": ("checkpoint.keep=0", "checkpoint.keep: expected at least 1"),
    "weights of what has them": (
        ["update.old_log_probs=rollout", "update.rollout_weight_cap=2"],
        "update.rollout_weight_cap: expected 0 with old_log_probs='rollout'",
    ),
    "replay of nothing": (
        ["update.old_log_probs=rollout", "update.routing_replay=true"],
        "update.routing_replay: expected false with old_log_probs='rollout'",
    ),
    "turns without their advantages": (
        "task.name=two_step",
        "objective.name: expected one that takes an advantage per token, such as 'gspo-token' or "
        "'grpo', for task.name='two_step', which gives each turn its own, got 'gspo'",
    ),
    "turns with a mean of logarithms": (
        ["task.name=two_step", "objective.name=gmpo"],
        "for task.name='two_step', which gives each turn its own, got 'gmpo'",
    ),
    "grades without their advantages": (
        "task.graded=true",
        "for task.graded, which gives each token its own, got 'gspo'",
    ),
    "grades of other groups": (
        ["task.graded=true", "objective.name=grpo", "rollout.refill=1"],
        "rollout.refill: expected 0 with task.graded, got 1",
    ),
    "turns in a chat": (
        ["task.name=two_step", "objective.name=gspo-token", "task.chat=true"],
        "task.chat: expected false for task.name='two_step'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused(name):
    given, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(None, [given] if isinstance(given, str) else given)


def test_bad_settings_printed(capsys):
    with capsys.disabled():
        print()
        for given, _ in BAD.values():
            given = [given] if isinstance(given, str) else given
            with pytest.raises(ValueError, match=r"\w") as refused:
                load_config(None, given)
            print(f"{' '.join(given)}\n    {refused.value}")


LATE = {
    "task": ("task.name=poetry", "task.name: expected a task, a dataset of reasoning-gym or a"),
    "task, nearly": ("task.name=digit_sum", "did you mean digit_sums?"),
    "file": ("task.name=no/such.jsonl", "task.name: no such file"),
    "options": ("task.options.max_digits=3", "task.options: 'digit_sums' has fixed"),
    "options of a dataset": (
        ["task.name=chain_sum", "task.options.nonsense=3"],
        "task.options: chain_sum rejects them",
    ),
    "reward": ("task.reward=no.such:thing", "task.reward: can't import 'no.such:thing' with "),
    "unknown answers": (
        ["task.name=propositional_logic", "task.examples=0"],
        "task.reward: 'exact' looks for an answer in the first line of a response, without white "
        "space around it, and never finds '', as to ",
    ),
    "unknown answers of examples": (
        ["task.name=propositional_logic", "task.reward=score"],
        "task.examples: expected 0 for 'propositional_logic', some of whose problems have no",
    ),
    "model": ("model.name=no/such/model", "model.name: expected a local model directory"),
    "replay without experts": (
        ["model.name=DENSE", "update.routing_replay=true"],
        "update.routing_replay: LlamaForCausalLM has no router",
    ),
}


@pytest.mark.parametrize("name", LATE)
def test_what_only_a_run_can_know_is_refused(name, capsys, tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    transformers = pytest.importorskip("transformers")
    given, message = LATE[name]
    given = [given] if isinstance(given, str) else given
    if "model.name=DENSE" in given:
        from gspo_ops.trainer.tiny import character_tokenizer

        tokenizer = character_tokenizer()
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=1, **small)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        given = [f"model.name={tmp_path / 'model'}", *given[1:]]
    capsys.readouterr()
    assert COMMANDS["train"]([f"out={tmp_path / 'run'}", *given]) == 2
    error = capsys.readouterr().err
    assert f"gspo-ops train: error: {message}" in error or message in error.splitlines()[-1]


def test_files_presets_and_overrides(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("steps = 7\n[update]\nlearning_rate = 1\n[objective]\nname = 'gspo-token'\n")
    config = load_config(path, ["update.learning_rate=2e-5", "task.options.max_terms=3"])
    assert (config.steps, config.update.learning_rate) == (7, 2e-5)
    assert config.task.options == {"max_terms": 3}
    assert config.objective.build() == GSPOToken()
    assert load_config().objective.build() == GSPO()
    assert config.time_limit == math.inf
    assert from_tables(to_tables(config)) == config
    for name in presets():
        assert isinstance(load_config(preset=name), TrainConfig)
    with pytest.raises(ValueError, match="unknown preset 'dem'; did you mean demo"):
        load_config(preset="dem")
    with pytest.raises(ValueError, match="no such file"):
        load_config(tmp_path / "none.toml")
    path.write_text("steps = = 3")
    with pytest.raises(ValueError, match="is not TOML"):
        load_config(path)


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_where_the_device_has_it(monkeypatch, has_bf16, expected):
    monkeypatch.setattr("gspo_ops.trainer.config.has_bf16", lambda device: has_bf16)
    config = load_config(None, ["device=cpu"])
    assert (config.training_dtype, config.rollout_dtype) == (expected, expected)
    config = load_config(None, ["device=cpu", "dtype=bfloat16", "rollout.dtype=float32"])
    assert (config.training_dtype, config.rollout_dtype) == ("bfloat16", "float32")


def test_either_a_file_or_a_preset(capsys):
    assert COMMANDS["train"](["some.toml", "--preset", "demo"]) == 2
    assert "either a file or a preset" in capsys.readouterr().err


def test_every_key_is_documented():
    from dataclasses import fields
    from pathlib import Path

    text = (Path(__file__).parent.parent / "docs/trainer.md").read_text()
    for section in fields(TrainConfig):
        keys = getattr(section.default_factory, "__dataclass_fields__", {})
        for name in [f"{section.name}.{key}" for key in keys] or [section.name]:
            assert f"`{name}`" in text, name
