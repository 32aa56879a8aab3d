"""Settings of a training run: a TOML file or a preset, with key=value overrides on top."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from .. import CISPO, GMPO, GRPO, GSPO, SAPO, GSPOToken, Objective
from ..backend import device_exists, has_bf16

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Dtype = Literal["auto", "bfloat16", "float32"]
OBJECTIVES: dict[str, type[Objective]] = {
    "gspo": GSPO, "gspo-token": GSPOToken, "grpo": GRPO, "gmpo": GMPO, "cispo": CISPO, "sapo": SAPO,
}  # fmt: skip

_ADVANTAGE_PER_SEQUENCE = ("gspo", "gmpo")
LARGEST_REWARD = torch.finfo(torch.float32).max
SEED_RANGE = "an integer from 0 to below 2**63"
TEMPERATURE_RANGE = "a finite number of at least 1e-6"


def is_seed(x: int) -> bool:
    """Return whether every generator of random numbers takes it."""
    return 0 <= x < 2**63


def is_temperature(x: float) -> bool:
    """Return whether it is finite, and too large for logits divided by it to overflow."""
    return 1e-6 <= x < math.inf


class _Section:
    """A table of the file; `_require` names the offending key."""

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            self._require(name, getattr(self, name) >= least, f"at least {least}")

    def _positive(self, *names: str) -> None:
        for name in names:
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive number")

    def _not_negative(self, *names: str) -> None:
        for name in names:
            holds = 0 <= getattr(self, name) < math.inf
            self._require(name, holds, "0 or a positive number")


@dataclass(frozen=True)
class ModelConfig(_Section):
    """The model to train.

    Attributes:
        name: `"smollm2"`; one of `gspo_ops.trainer.tiny.TINY`, which are built from their configs
            and taught by a short supervised warm-up; or the path of a directory or GGUF file that
            `AutoModelForCausalLM` loads.
        lora_rank: rank of low-rank adapters, which are trained in the linear layers of the body in
            place of the weights and saved in peft's format; 0 to train the weights.
    """

    name: str = "smollm2"
    lora_rank: int = 0

    def __post_init__(self) -> None:
        self._at_least(0, "lora_rank")


@dataclass(frozen=True)
class TaskConfig(_Section):
    """The problems and their rewards.

    Attributes:
        name: one of `gspo_ops.trainer.tasks.TASKS`; `"recurrence"`; any dataset of reasoning-gym;
            or the path of a `.jsonl` file of `{"prompt": ..., "answer": ...}`. A prompt is a text
            or a list of chat messages; an answer is a text, a number or a list of all accepted
            answers.
        options: options of the reasoning-gym dataset, or `digits` of `recurrence`.
        reward: `"exact"`, which compares the first line of a response, without white space around
            it, with the answers, character by character; `"score"`, which is reasoning-gym's own
            check; or `"package.module:function"`, imported also from the working directory, which
            is called with (response, problem) and returns a finite number.
        reward_seconds: time limit for one reward; 0 for no limit. Code that never releases
            Python's interpreter lock can't be interrupted.
        reward_workers: number of rewards computed at once, in threads.
        graded: give each token its own advantage, from the grades of an answer's steps (which
            `recurrence` provides); for objectives that take an advantage per token.
        failed_reward: reward of a response whose reward function raises, takes too long or does
            not return a finite number; without it, such a failure ends the run. The metric
            `failed_rewards` counts the failures.
        examples: number of solved problems shown in each prompt.
        chat: put the prompt into the model's chat template, as the user's turn.
        train_size: number of distinct problems to train on, in shuffled epochs.
        eval_size: number of held-out problems; none of them is also an example or trained on.
    """

    name: str = "digit_sums"
    options: Mapping[str, Any] = field(default_factory=dict)
    reward: str = "exact"
    reward_seconds: float = 0.0
    reward_workers: int = 1
    failed_reward: float | None = None
    graded: bool = False
    examples: int = 2
    chat: bool = False
    train_size: int = 76
    eval_size: int = 76

    def __post_init__(self) -> None:
        self._at_least(0, "examples")
        self._at_least(1, "train_size", "reward_workers")
        self._at_least(2, "eval_size")
        self._require(
            "reward", re.fullmatch(r"exact|score|[\w-]+(\.[\w-]+)*:\w+", self.reward) is not None,
            "'exact', 'score' or 'package.module:function'",
        )  # fmt: skip
        self._require(
            "options", _is_json(self.options),
            "texts, finite numbers, truth values, and lists and tables of these",
        )  # fmt: skip
        self._not_negative("reward_seconds")
        holds = abs(self.failed_reward or 0) <= LARGEST_REWARD
        self._require("failed_reward", holds, "a finite float32 number")


@dataclass(frozen=True)
class ObjectiveConfig(_Section):
    """The policy objective; settings that are not given have the values of its paper.

    Attributes:
        name: `"gspo"`, `"gspo-token"`, `"grpo"`, `"gmpo"`, `"cispo"` or `"sapo"`.
        clip_low, clip_high: clip range below and above 1; by default that of the objective's paper,
            for GRPO that of the GSPO paper.
        dual_clip: see `gspo_ops.Objective`.
        aggregation: see `gspo_ops.Objective`; by default the average over sequences, for CISPO over
            tokens.
        kl_coef: weight of the KL term with respect to the model before training. A copy of that
            model is kept; with LoRA, the adapters are switched off instead.
        kl_estimator, kl_weight: see `gspo_ops.Objective`.
        entropy_coef: weight of the entropy bonus.
    """

    name: Literal["gspo", "gspo-token", "grpo", "gmpo", "cispo", "sapo"] = "gspo"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    aggregation: str | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_weight: str = "one"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        self.build()  # the objective's own messages name these fields

    def build(self) -> Objective:
        """Return the `gspo_ops` objective with these settings."""
        given = {x.name: getattr(self, x.name) for x in fields(self) if x.name != "name"}
        return OBJECTIVES[self.name](**{k: x for k, x in given.items() if x is not None})


@dataclass(frozen=True)
class RolloutConfig(_Section):
    """How responses are sampled.

    Attributes:
        prompts: number of problems in a rollout batch.
        group_size: number of responses sampled per problem.
        max_new_tokens: maximum length of a response (or of one turn), in tokens, including its stop
            token.
        temperature: temperature of sampling and of the log-probs in training.
        stop: what ends a response besides EOS: `"newline"`, any token that contains a newline; or
            `"eos"`, nothing.
        dtype: dtype of the model's body during sampling, by autocast over fp32 weights;
            `"training"` for that of training.
        refill: maximum number of further sampling rounds, in which problems whose rewards are all
            equal are replaced by others (dynamic sampling); 0 to train on the first draw.
    """

    prompts: int = 16
    group_size: int = 8
    max_new_tokens: int = 8
    temperature: float = 1.0
    stop: Literal["newline", "eos"] = "newline"
    dtype: Literal["training", "bfloat16", "float32"] = "training"
    refill: int = 0

    def __post_init__(self) -> None:
        self._at_least(1, "prompts", "max_new_tokens")
        self._at_least(2, "group_size")
        self._at_least(0, "refill")
        self._require("temperature", is_temperature(self.temperature), TEMPERATURE_RANGE)


@dataclass(frozen=True)
class UpdateConfig(_Section):
    """How the model is updated on a rollout batch.

    Attributes:
        mini_batches: number of updates per pass over a rollout batch; must divide
            `rollout.prompts`.
        epochs: number of passes over a rollout batch.
        micro_batch: number of prompts per forward and backward pass, whose gradients are
            accumulated; 0 for a whole mini-batch at once.
        learning_rate: learning rate of AdamW.
        warmup_steps: number of updates over which the learning rate rises linearly.
        schedule: how the learning rate changes afterwards: `"constant"`; or `"linear"` or
            `"cosine"`, decaying to 0 at the last update of `steps`.
        weight_decay: weight decay of AdamW.
        beta1, beta2: decay rates of AdamW's moment estimates.
        max_grad_norm: L2 norm to which larger gradients are scaled down.
        loss_from: `"hidden"` computes the loss directly from the hidden states: the head is called
            for sampling but never in training, and the logits of a mini-batch never exist;
            `"logits"` goes through the head's fp32 logits of all response tokens; `"eager"` is the
            same formula in plain PyTorch. The results are the same up to rounding.
        old_log_probs: `"recompute"`, with the very forward that the update will run; or
            `"rollout"`, as sampling returned them.
        rollout_weight_cap: apply importance weights from sampling to `"recompute"`, truncated at
            this value; 0 for none. A sequence has one weight, the product over its tokens, unless
            the objective has a ratio per token.
        skip_dead: compute neither old log-probs nor updates for groups whose advantages are all 0,
            unless a KL term or an entropy bonus gives them a gradient; with
            `gradient_checkpointing`, do not recompute rows that are clipped. Loss and gradients are
            the same up to rounding.
        gradient_checkpointing: keep only the inputs of each layer and recompute the rest in the
            backward pass.
        routing_replay: route the tokens of each update to the experts that were chosen when the
            old log-probs were computed.
        max_bad_updates: number of consecutive updates with a non-finite loss or gradient that ends
            the run; fewer are skipped and counted.
    """

    mini_batches: int = 4
    epochs: int = 1
    micro_batch: int = 0
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    loss_from: Literal["hidden", "logits", "eager"] = "hidden"
    old_log_probs: Literal["recompute", "rollout"] = "recompute"
    rollout_weight_cap: float = 0.0
    skip_dead: bool = True
    gradient_checkpointing: bool = False
    routing_replay: bool = False
    max_bad_updates: int = 3

    def __post_init__(self) -> None:
        self._at_least(1, "mini_batches", "epochs", "max_bad_updates")
        self._at_least(0, "warmup_steps", "micro_batch")
        self._not_negative("weight_decay", "rollout_weight_cap")
        self._positive("learning_rate", "max_grad_norm")
        for name in ("beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "a number from 0 to below 1")
        self._require(
            "gradient_checkpointing", not (self.gradient_checkpointing and self.routing_replay),
            "false with routing_replay, which records each layer once",
        )  # fmt: skip
        if self.old_log_probs == "rollout":
            self._require(
                "rollout_weight_cap", self.rollout_weight_cap == 0,
                "0 with old_log_probs='rollout', whose ratios already contain that weight",
            )  # fmt: skip
            self._require(
                "routing_replay", not self.routing_replay,
                "false with old_log_probs='rollout', which leaves no forward to record",
            )  # fmt: skip


@dataclass(frozen=True)
class EvaluationConfig(_Section):
    """How held-out accuracy is measured.

    Attributes:
        samples: number of responses to each held-out problem.
        temperature: sampling temperature, 0 for the likeliest tokens; by default that of training.
        every: number of steps between evaluations; 0 to evaluate only before and after training.
        pass_at: k, to also report the probability that at least one of k responses is right, with a
            reward of 1 or more, estimated from the `samples` (arXiv 2107.03374); 0 for none.
        target: end the run when an evaluation reaches this mean reward; 0 for no target.
    """

    samples: int = 4
    temperature: float | None = None
    every: int = 0
    pass_at: int = 0
    target: float = 0.0

    def __post_init__(self) -> None:
        self._at_least(1, "samples")
        self._at_least(0, "every", "pass_at")
        self._not_negative("target")
        holds = not self.temperature or is_temperature(self.temperature)
        self._require("temperature", holds, f"0 or {TEMPERATURE_RANGE}")
        self._require("pass_at", self.pass_at <= self.samples, f"at most samples={self.samples}")
        self._require("target", self.every > 0 or not self.target, "0 without evaluation.every")


@dataclass(frozen=True)
class CheckpointConfig(_Section):
    """When checkpoints, from which `--resume` continues, are written.

    Attributes:
        every: number of steps between checkpoints; 0 for one only if the run is interrupted.
        keep: number of most recent checkpoints to keep.
        save_model: save the trained model (or adapter) in `out/model`.
    """

    every: int = 0
    keep: int = 2
    save_model: bool = True

    def __post_init__(self) -> None:
        self._at_least(0, "every")
        self._at_least(1, "keep")


@dataclass(frozen=True)
class LoggingConfig(_Section):
    """What is logged besides `metrics.jsonl`.

    Attributes:
        samples: number of responses per step to keep in `samples.jsonl`.
        tensorboard: write event files to `out/tensorboard`.
        wandb: send metrics to this Weights & Biases project; a resumed run is a new run there.
        expert_churn: measure the metric of this name, for mixture-of-experts models: the fraction
            of a mini-batch's chosen experts that the first update of a step replaces.
    """

    samples: int = 4
    tensorboard: bool = False
    wandb: str = ""
    expert_churn: bool = False

    def __post_init__(self) -> None:
        self._at_least(0, "samples")


@dataclass(frozen=True)
class TrainConfig(_Section):
    """Settings of one run.

    Attributes:
        out: directory for everything that the run writes.
        steps: number of rollout batches.
        time_limit: seconds of training after which no further step starts.
        seed: seed of the problems, their order and the sampling.
        device: `"cpu"`, a GPU such as `"cuda:1"`, or `"auto"`: the GPU if there is one.
        dtype: dtype of training: `"bfloat16"` (autocast over fp32 weights, with the head in fp32),
            `"float32"`, or `"auto"`: bfloat16 where the device has instructions for it.
        model, task, objective, rollout, update, evaluation, checkpoint, logging: tables.

    Raises:
        ValueError: a value is out of range or does not fit another; the message names it.
    """

    out: Path = Path("runs/train")
    steps: int = 100
    time_limit: float = math.inf
    seed: int = 0
    device: str = "auto"
    dtype: Dtype = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        self._at_least(1, "steps")
        self._require("seed", is_seed(self.seed), SEED_RANGE)
        self._require("time_limit", self.time_limit > 0, "a positive number")
        self._require(
            "device", device_exists(self._device_name),
            "'auto', 'cpu' or a GPU of this machine, such as 'cuda:0'",
        )  # fmt: skip
        prompts, parts = self.rollout.prompts, self.update.mini_batches
        if prompts % parts:
            raise ValueError(
                f"update.mini_batches: expected a divisor of rollout.prompts={prompts}, got {parts}"
            )
        if self.task.train_size < prompts:
            raise ValueError(
                f"task.train_size: expected at least rollout.prompts={prompts}, got "
                f"{self.task.train_size}"
            )
        for key, is_asked, gives in (
            ("task.name='two_step'", self.task.name == "two_step", "turn"),
            ("task.graded", self.task.graded, "token"),
        ):
            if is_asked and self.objective.name in _ADVANTAGE_PER_SEQUENCE:
                raise ValueError(
                    f"objective.name: expected one that takes an advantage per token, such as "
                    f"'gspo-token' or 'grpo', for {key}, which gives each {gives} its own, got "
                    f"{self.objective.name!r}"
                )
        if self.task.graded and self.rollout.refill:
            raise ValueError(
                f"rollout.refill: expected 0 with task.graded, got {self.rollout.refill}"
            )
        if self.task.name == "two_step" and self.task.chat:
            raise ValueError("task.chat: expected false for task.name='two_step', got True")

    def torch_device(self) -> torch.device:
        """Return the device to run on."""
        return torch.device(self._device_name)

    @property
    def _device_name(self) -> str:
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: one GPU per process
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        return name

    @property
    def training_dtype(self) -> Literal["bfloat16", "float32"]:
        """The dtype of the body in training."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if has_bf16(self.torch_device()) else "float32"

    @property
    def rollout_dtype(self) -> str:
        """The dtype of the body during sampling."""
        return self.training_dtype if self.rollout.dtype == "training" else self.rollout.dtype


# From tables to dataclasses


def presets() -> list[str]:
    """Return the names of the configurations that are shipped with the package."""
    folder = resources.files(__package__) / "presets"
    return sorted(Path(str(x)).stem for x in folder.iterdir() if str(x).endswith(".toml"))


def load_config(
    source: Path | str | None = None, overrides: Sequence[str] = (), *, preset: str | None = None
) -> TrainConfig:
    """Read a configuration.

    Args:
        source: path of a TOML file; None for the preset.
        overrides: settings of the form `table.key=value`, each value in TOML syntax or a bare
            string.
        preset: name of a shipped configuration; None for the default one.

    Returns:
        The settings; keys that are given in neither place have their defaults.

    Raises:
        ValueError: a key is unknown (the message suggests the nearest one), a value has the wrong
            type or is out of range, or the file can't be read.
    """
    if source is not None:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"no such file: {path}; the presets are {', '.join(presets())}")
        text, name = path.read_text(encoding="utf-8"), str(path)
    else:
        name = preset or "default"
        if name not in presets():
            raise ValueError(f"unknown preset {name!r}{_nearest(name, presets())}")
        text = (resources.files(__package__) / "presets" / f"{name}.toml").read_text()
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{name} is not TOML: {error}") from None
    for override in overrides:
        _override(tables, override)
    return from_tables(tables)


def from_tables(tables: Mapping[str, Any]) -> TrainConfig:
    """Build settings from nested dictionaries such as TOML gives; the inverse of `to_tables`."""
    return _build(TrainConfig, tables, "")


def to_tables(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as nested dictionaries that JSON can represent."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return str(x) if isinstance(x, Path) else x

    return plain(dataclasses.asdict(config))


def _override(tables: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"expected key=value, as in update.learning_rate=1e-5, got {text!r}")
    *path, last = key.strip().split(".")
    table = tables
    for name in path:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"{name} is not a table, in {text!r}")
    try:
        table[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = value.strip()  # a bare string, so that the shell needs no nested quotes


def _build(kind: type, table: Mapping[str, Any], prefix: str) -> Any:
    fields = get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    values = {}
    for name, value in table.items():
        if name not in known:
            raise ValueError(f"unknown key {prefix}{name}{_nearest(name, known, prefix)}")
        values[name] = _convert(fields[name], value, prefix + name)
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        # a section's messages name its keys without the prefix
        raise ValueError(f"{prefix}{error}") from None


def _convert(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}: expected a table, got {value!r}")
        return _build(kind, value, f"{name}.")  # type: ignore[arg-type]
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            known = ", ".join(map(repr, choices))
            raise ValueError(
                f"{name}: expected one of {known}, got {value!r}{_nearest(value, choices)}"
            )
        return value
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for one in kinds:
        plain = get_origin(one) or one
        if plain is float and type(value) in (int, float):
            return float(value)
        if plain is Path and isinstance(value, str):
            return Path(value)
        # to Python a bool is an int; here it is a mistake
        if type(value) is plain or (plain is Mapping and isinstance(value, Mapping)):
            return value
    wanted = " or ".join(_WORDS[get_origin(one) or one] for one in kinds if one is not type(None))
    raise ValueError(f"{name}: expected {wanted}, got {value!r}")


_WORDS = {
    int: "an integer", float: "a number", str: "a string", bool: "true or false",
    Path: "a path", Mapping: "a table",
}  # fmt: skip


def _is_json(table: Mapping[str, Any]) -> bool:
    """Return whether JSON, in which a run records its settings, can represent a table."""
    try:
        json.dumps(dict(table), allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _nearest(name: object, known: Sequence[str], prefix: str = "") -> str:
    """Return a hint at the name that was probably meant, or at all known names."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; the choices are {', '.join(known)}"
