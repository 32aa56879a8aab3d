"""TRL's GRPOTrainer and our GSPOTrainer: loss and gradient beside float64, then whole runs.

    python -m gspo_ops.benchmarks.trl_trainers --out NAME.json

On SmolLM2-135M-Instruct in fp32, with TRL's own generation, both from the same seed. Every run has
a process of its own, so that its peak memory is its own; the runs of both alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .measure import provenance, write

SETTINGS = {
    "per_device_train_batch_size": 8, "num_generations": 8, "gradient_accumulation_steps": 1,
    "max_completion_length": 64, "learning_rate": 1e-5, "loss_type": "grpo", "num_iterations": 2,
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_dropout": True,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 0, "max_steps": 6,
    "use_bias_correction_kl": False, "disable_tqdm": True,
}  # fmt: skip
LEVELS = {
    "GSPO": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "GRPO": {"importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": 0.27},
}
# name: level, KL coefficient, and whether the sampler's log-probs are corrected for
CASES = {
    "GSPO": ("GSPO", 0.0, False),
    "GRPO": ("GRPO", 0.0, False),
    "GSPO with KL": ("GSPO", 0.04, False),
    "GRPO with KL": ("GRPO", 0.04, False),
    "GSPO with importance-sampling correction": ("GSPO", 0.0, True),
    "GRPO with importance-sampling correction": ("GRPO", 0.0, True),
}
KINDS = ("GRPOTrainer", "GSPOTrainer")
ROUNDS = 2


def make_trainer(kind: str, level: str, folder: str, **options: Any) -> Any:
    """A trainer for letter counting, in which short answers are rewarded a little."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from gspo_ops.integrations.trl import GSPOTrainer
    from gspo_ops.trainer.config import TaskConfig
    from gspo_ops.trainer.model import load_model
    from gspo_ops.trainer.tasks import make_task

    task = make_task(TaskConfig(name="letter_counting"), 0)
    model, tokenizer = load_model("smollm2")
    problems = {task.prompt(p): p for p in task.train[:64]}

    def reward(prompts: list, completions: list, **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        asked = [problems[prompt[0]["content"]] for prompt in prompts]
        right = [task.reward(text, p) for text, p in zip(texts, asked, strict=True)]
        return [r - len(text) / 1000 for r, text in zip(right, texts, strict=True)]

    rows = [{"prompt": [{"role": "user", "content": text}]} for text in problems]
    return {"GRPOTrainer": GRPOTrainer, "GSPOTrainer": GSPOTrainer}[kind](
        model=model, reward_funcs=reward, processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(output_dir=folder, **SETTINGS | LEVELS[level] | options),
    )  # fmt: skip


# Loss and gradient


def accuracy() -> list[dict]:
    """Of both loss steps, on one batch that TRL has sampled, against the same in float64."""
    from trl import GRPOTrainer

    from gspo_ops.integrations.trl import GSPOTrainer

    found = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer("GSPOTrainer", "GSPO", folder)
        inputs = sampled(trainer)
        model, exact = trainer.model, copy.deepcopy(trainer.model).double()
        trainer.current_gradient_accumulation_steps = 1
        for case, (level, beta, corrected) in CASES.items():
            of = LEVELS[level]
            trainer.importance_sampling_level = of["importance_sampling_level"]
            trainer.epsilon_low, trainer.epsilon_high = of["epsilon"], of["epsilon_high"]
            trainer.beta = beta
            trainer.use_vllm = trainer.vllm_importance_sampling_correction = corrected
            batch = with_old_log_probs(inputs, level)
            loss, gradient = loss_and_gradient(trainer, GRPOTrainer, exact, batch)
            for kind in (GRPOTrainer, GSPOTrainer):
                own_loss, own = loss_and_gradient(trainer, kind, model, batch)
                error = (own.double() - gradient).norm() / gradient.norm()
                found.append(
                    {
                        "case": case, "trainer": kind.__name__, "loss": own_loss,
                        "loss_error": abs(own_loss - loss), "gradient_error": error.item(),
                    }
                )  # fmt: skip
                print(found[-1], flush=True)
    return found


def sampled(trainer: Any) -> dict[str, Any]:
    """TRL's own rollout of the first batch, with the log-probs of this model."""
    trainer.model.eval()
    rows = [trainer.train_dataset[0]] * 8
    inputs = trainer._generate_and_score_completions(rows)
    inputs["advantages"] = torch.linspace(-1, 1, 8)
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        real = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        inputs["new"] = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, real, inputs["completion_ids"].shape[1]
        )[0]
    return inputs


def with_old_log_probs(inputs: dict[str, Any], level: str) -> dict[str, Any]:
    """Ratios on both sides of the clip range, but at no edge of it."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.tensor([1e-4, -2e-4, 2e-3, -2e-3, 1e-4, 2e-4, 3e-3, -1e-4])[:, None]
    if level == "GRPO":
        shift = shift + 0.2 * torch.randn(inputs["new"].shape, generator=generator)
    old = inputs["new"] - shift
    noise = 0.1 * torch.randn(old.shape, generator=generator)
    weights = (0.3 * torch.randn(old.shape, generator=generator)).exp().clamp(max=2.0)
    return inputs | {
        "old_per_token_logps": old, "ref_per_token_logps": inputs["new"] + noise,
        "importance_sampling_ratio": weights,
    }  # fmt: skip


def loss_and_gradient(trainer: Any, kind: Any, model: Any, inputs: dict) -> tuple[float, Tensor]:
    if next(model.parameters()).dtype == torch.float64:
        inputs = {
            k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for k, x in inputs.items()
        }
    model.zero_grad()
    loss = kind._compute_loss(trainer, model, inputs)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return loss.item(), gradient


# Whole runs


def run(kind: str, level: str) -> dict:
    """Train here, and tell what it took."""
    spent: dict[str, list[float]] = {"sampling": [], "step": []}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        trainer = make_trainer(kind, level, folder)
        timed(trainer, "_generate_and_score_completions", spent["sampling"])
        timed(trainer, "training_step", spent["step"])
        trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    # the first step loads code, and sampling is within the steps where it happens
    without = [s for i, s in enumerate(spent["step"]) if i % 2 == 1]
    return {
        "loss": [row["loss"] for row in rows], "grad_norm": [row["grad_norm"] for row in rows],
        "clip": [row["clip_ratio/region_mean"] for row in rows],
        "update_s": median(without), "sampling_s": median(spent["sampling"]),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }  # fmt: skip


def timed(owner: Any, name: str, seconds: list[float]) -> None:
    """Make a method note how long it takes."""
    method: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, call)


def in_a_process(kind: str, level: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--run", kind, level],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.run is not None:
        print("\n" + json.dumps(run(*args.run)))
        return
    report: dict = {
        "benchmark": "trl",
        **provenance(),
        "settings": SETTINGS,
        "accuracy": accuracy(),
        "runs": [],
    }
    for level in LEVELS:
        for _ in range(ROUNDS):
            for kind in KINDS:
                of = in_a_process(kind, level)
                report["runs"].append({"objective": level, "trainer": kind, **of})
                print(report["runs"][-1], flush=True)
    if args.out:
        write(args.out, report)


if __name__ == "__main__":
    main()
