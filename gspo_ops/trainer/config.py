"""What a training run can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from .. import GSPO, Objective


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run.

    Attributes:
        model: `"smollm2"`, or a local directory that `AutoModelForCausalLM` loads.
        task: a name in `gspo_ops.trainer.tasks.TASKS`.
        examples: solved problems shown in each prompt.
        train_size: distinct problems to train on; they are gone through in shuffled epochs.
        eval_size: held-out problems, none of them among the others.
        eval_samples: responses sampled to each held-out problem, at the training temperature.
        steps: rollout batches.
        time_limit: seconds of training after which no further step starts; None for no limit.
        prompts_per_step: problems in a rollout batch.
        group_size: sampled responses per problem.
        mini_batches: updates per rollout batch; divides `prompts_per_step`.
        max_new_tokens: longest response, in tokens, its stop token included.
        temperature: of the sampling, and of the log-probs trained on.
        objective: the policy objective with its clip range.
        loss_from: `"hidden"`, the loss straight from the hidden states: the head is called to
            sample and never to train, and the logits of a mini-batch never exist; or `"logits"`,
            through the head's fp32 logits of all response tokens. The numbers are the same up to
            rounding.
        learning_rate: of AdamW, constant.
        max_grad_norm: the gradient is scaled down to this L2 norm.
        dtype: `"bfloat16"` (autocast over fp32 weights, the head in fp32) or `"float32"`.
        device: a torch device, or `"auto"`: the GPU if there is one.
        seed: of the problems, the sampling and the order.
        out: directory for `metrics.jsonl`, `summary.json` and `training.png`.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    model: str = "smollm2"
    task: str = "digit_sums"
    examples: int = 2
    train_size: int = 76
    eval_size: int = 76
    eval_samples: int = 4
    steps: int = 100
    time_limit: float | None = None
    prompts_per_step: int = 16
    group_size: int = 8
    mini_batches: int = 4
    max_new_tokens: int = 8
    temperature: float = 1.0
    objective: Objective = field(default_factory=GSPO)
    loss_from: Literal["hidden", "logits"] = "hidden"
    learning_rate: float = 1e-5
    max_grad_norm: float = 1.0
    dtype: str = "bfloat16"
    device: str = "auto"
    seed: int = 0
    out: Path = Path("runs/train")

    def __post_init__(self) -> None:
        for name in (
            "examples",
            "train_size",
            "eval_samples",
            "steps",
            "prompts_per_step",
            "mini_batches",
            "max_new_tokens",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("eval_size", "group_size"):
            self._require(name, getattr(self, name) >= 2, "at least 2")
        for name in ("temperature", "learning_rate", "max_grad_norm"):
            self._require(name, 0 < getattr(self, name) < float("inf"), "a positive number")
        self._require(
            "time_limit", self.time_limit is None or self.time_limit > 0, "positive or None"
        )
        self._require(
            "mini_batches",
            self.prompts_per_step % self.mini_batches == 0,
            f"a divisor of prompts_per_step={self.prompts_per_step}",
        )
        self._require(
            "train_size",
            self.train_size >= self.prompts_per_step,
            f"at least prompts_per_step={self.prompts_per_step}",
        )
        self._require("loss_from", self.loss_from in ("hidden", "logits"), "'hidden' or 'logits'")
        self._require("device", self._device_exists(), "'auto' or a torch device of this machine")
        self._require("dtype", self.dtype in ("bfloat16", "float32"), "'bfloat16' or 'float32'")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def _device_exists(self) -> bool:
        try:
            return self.torch_device().type != "cuda" or torch.cuda.is_available()
        except RuntimeError:
            return False

    def torch_device(self) -> torch.device:
        """The device to run on."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


# Most of the learning is over by step 15; the limit is for machines busy with other work.
DEMO = TrainConfig(steps=20, time_limit=300.0, max_new_tokens=5, out=Path("runs/demo"))
