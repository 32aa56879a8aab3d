"""Run GSPOTrainer beside trl.GRPOTrainer from one seed, and compare one gradient with float64.

    python -m gspo_ops.benchmarks.trl_run --out NAME.json

Each run has a process of its own, so that peak memory can be attributed to it. The two trainers
take turns. The gradient is that of the last batch, at the weights after the last update: of both
trainers' losses, and of TRL's loss in float64.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from gspo_ops.integrations.trl import GSPOTrainer
from gspo_ops.trainer.model import SMOLLM2, smollm2_directory

from .clip_error import PROMPTS
from .measure import in_a_process, interleaved, process_peak_bytes, provenance, write

KINDS = {"TRL": GRPOTrainer, "ours": GSPOTrainer}
# learning rates at which two updates of Adam carry some ratios, but not all, out of the clip range
_GSPO = {
    "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4,
    "learning_rate": 3e-8,
}  # fmt: skip
_GRPO = {
    "importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": 0.27,
    "learning_rate": 1e-5,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "GSPO": _GSPO,
    "GRPO": _GRPO,
    # after so few updates from the reference, a smaller beta would hardly have an effect
    "GSPO, KL": {**_GSPO, "beta": 1.0, "use_bias_correction_kl": False},
    "GSPO, importance sampling correction": {**_GSPO, "use_vllm": True},
}
SETTINGS = {
    "loss_type": "grpo", "per_device_train_batch_size": 8, "num_generations": 4,
    "max_completion_length": 32, "num_iterations": 2, "max_steps": 4,
    "lr_scheduler_type": "constant", "gradient_checkpointing": False, "seed": 0,
    "use_cpu": True, "bf16": False, "model_init_kwargs": {"dtype": "float32"},
    "report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


class Engine:
    """A replacement for vLLM that samples with the policy's weights rounded to bf16."""

    def __init__(self, directory: Path, trainer: GRPOTrainer) -> None:
        self.trainer = trainer
        trainer.generation_config.update(return_dict_in_generate=True, output_scores=True)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        )

    @torch.no_grad()
    def sync_weights(self) -> None:
        policy = self.trainer.model.parameters()
        for own, new in zip(self.model.parameters(), policy, strict=True):
            own.copy_(new.bfloat16())

    def generate(self, prompts: list[list[int]], **_: Any) -> tuple:
        """Return None, responses, the log-prob of each of their tokens and None, as TRL expects."""
        batch = self.trainer.processing_class.pad(
            {"input_ids": prompts}, padding_side="left", return_tensors="pt"
        )
        out = self.model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            generation_config=self.trainer.generation_config,
        )  # fmt: skip
        scores = self.model.compute_transition_scores(
            out.sequences, out.scores, normalize_logits=True
        )
        stop, responses, log_probs = self.trainer.eos_token_ids, [], []
        rows = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
        for row, of in zip(rows, scores.tolist(), strict=True):
            end = next((t + 1 for t, token in enumerate(row) if token in stop), len(row))
            responses.append(row[:end])
            log_probs.append([[x] for x in of[:end]])
        return None, responses, log_probs, None


class Recorder:
    """A mixin for a trainer that keeps what it sampled, its losses and its last batch."""

    def __init__(self, **options: Any) -> None:
        self.responses: list[list[int]] = []
        self.losses: list[float] = []
        super().__init__(**options | {"reward_funcs": self._reward})

    def _reward(self, completions: list[str], completion_ids: list, **_: Any) -> list[float]:
        """Reward varied letters: any reward will do in which responses to one prompt differ."""
        self.responses += completion_ids
        return [len(set(text)) / (1 + len(text)) for text in completions]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)  # type: ignore[misc]
        self.losses.append(loss.item())
        self.batch = inputs
        return loss


def make_trainer(kind: str, case: str, directory: Path, out: str) -> Any:
    options = dict(CASES[case])
    with_engine = options.pop("use_vllm", False)
    trainer = type("Trainer", (Recorder, KINDS[kind]), {})(
        model=str(directory), args=GRPOConfig(output_dir=out, **SETTINGS | options),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
    )  # fmt: skip
    if with_engine:
        # set after the constructor, which would otherwise start vLLM
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        trainer.vllm_generation = Engine(directory, trainer)
    return trainer


def run(kind: str, case: str, directory: Path) -> dict:
    """Train in this process and return what the comparison needs."""
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(kind, case, directory, out)
        trainer.train()
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    found = {
        "responses": trainer.responses, "loss": trainer.losses, "peak_bytes": process_peak_bytes(),
        "grad_norm": [row["grad_norm"] for row in rows],
        "clipped": [row["clip_ratio/region_mean"] for row in rows],
        "seconds": [row["step_time"] for row in rows],
    }  # fmt: skip
    return found | ({"gradient": compare_gradients(trainer)} if kind == "ours" else {})


# One gradient, computed three times


def compare_gradients(trainer: Any) -> dict:
    """Compare loss, clipped fraction and gradient of both trainers with float64."""
    found = {
        name: _gradient(trainer, kind, partial(kind._get_per_token_logps_and_entropies, trainer))
        for name, kind in KINDS.items()
    }
    _to_float64(trainer.model)
    exact = _gradient(trainer, GRPOTrainer, _from_logits)  # TRL's fused head computes in fp32
    size = exact["gradient"].norm().item()

    def error(of: dict, true: dict = exact) -> dict:
        difference = of["gradient"].double() - true["gradient"]
        return {
            "loss": abs(of["loss"] - true["loss"]),
            "gradient": difference.norm().item() / size,
        }

    weights = trainer.batch.get("importance_sampling_ratio", torch.ones(1))
    return {
        "norm": size, "loss": exact["loss"], "clipped": exact["clipped"],
        "weights": [weights.min().item(), weights.max().item()],
        "same_clipped": all(abs(of["clipped"] - exact["clipped"]) < 1e-6 for of in found.values()),
        "errors": {name: error(of) for name, of in found.items()},
        "between": error(found["ours"], found["TRL"]),
    }  # fmt: skip


def _gradient(trainer: Any, kind: Any, log_probs: Callable[..., tuple]) -> dict:
    """Return loss, clipped fraction and gradient of one kind of trainer, from given log-probs."""
    trainer._get_per_token_logps_and_entropies = log_probs
    trainer.model.zero_grad()
    loss = kind._compute_loss(trainer, trainer.model, trainer.batch)
    loss.backward()
    grads = [p.grad.flatten() for p in trainer.model.parameters()]
    clipped = trainer._metrics["train"]["clip_ratio/region_mean"][-1]
    return {"loss": loss.item(), "clipped": clipped, "gradient": torch.cat(grads)}


def _to_float64(model: Any) -> None:
    model.double()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):  # RMSNorm, which would round to fp32
            module.forward = partial(
                torch.nn.functional.rms_norm, normalized_shape=module.weight.shape,
                weight=module.weight, eps=module.variance_epsilon,
            )  # fmt: skip


def _from_logits(model: Any, ids: Tensor, mask: Tensor, count: int, **_: Any) -> tuple:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -count - 1 : -1]
    return selective_log_softmax(logits, ids[:, -count:]), entropy_from_logits(logits), None


# Both trainers


def compare(runs: dict[str, list[dict]]) -> dict:
    """Return how the runs of one case differ, and the time and memory of each trainer."""
    theirs, ours = (runs[name][0] for name in KINDS)
    return {
        "same_responses": all(
            of["responses"] == ours["responses"] for name in KINDS for of in runs[name]
        ),
        "lengths": [len(tokens) for tokens in ours["responses"]], "clipped": ours["clipped"],
        "loss": max(abs(x - y) for x, y in zip(ours["loss"], theirs["loss"], strict=True)),
        "grad_norm": max(
            abs(x / y - 1) for x, y in zip(ours["grad_norm"], theirs["grad_norm"], strict=True)
        ),
        "gradient": ours["gradient"],
        "step": _times(runs, slice(None)),
        "update": _times(runs, slice(1, None, 2)),  # steps that train on responses sampled before
        "peak_bytes": {name: [of["peak_bytes"] for of in runs[name]] for name in KINDS},
    }  # fmt: skip


def _times(runs: dict[str, list[dict]], steps: slice) -> dict:
    """Return the median seconds of a step, and the median ratio of corresponding steps."""
    seconds = {name: [x for of in runs[name] for x in of["seconds"][steps]] for name in KINDS}
    ratios = [ours / theirs for theirs, ours in zip(*seconds.values(), strict=True)]
    return {name: median(of) for name, of in seconds.items()} | {"ratio": median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SMOLLM2, help="smollm2 or a local model directory")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each trainer")
    parser.add_argument("--run", nargs=2, metavar=("KIND", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.run is not None:
        directory = smollm2_directory() if args.model == SMOLLM2 else Path(args.model)
        kind, case = args.run
        print("\n" + json.dumps(run(kind, case, directory)))
        return
    report: dict = {
        "benchmark": "trl_run", **provenance(),
        "peers": {"trl": trl.__version__, "transformers": transformers.__version__},
        "model": args.model, "rounds": args.rounds, "settings": SETTINGS, "cases": CASES,
        "results": {},
    }  # fmt: skip
    for case in CASES:
        of = report["results"][case] = compare(interleaved({
            kind: partial(
                in_a_process, __spec__.name, ["--model", args.model, "--run", kind, case]
            )
            for kind in KINDS
        }, args.rounds))  # fmt: skip
        print(case, json.dumps(of), flush=True)
        if args.out:
            write(args.out, report)


if __name__ == "__main__":
    main()
