"""`gspo-ops train`: a run from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import GRPO, GSPO, GSPOToken
from .config import DEMO, TrainConfig

_PRESETS = {"default": TrainConfig(), "demo": DEMO}
_OBJECTIVES = {"gspo": GSPO, "gspo-token": GSPOToken, "grpo": GRPO}
_REQUIRED = ("transformers", "reasoning_gym", "tqdm", "matplotlib")
# Options that are fields of TrainConfig under the same name: type and help.
_FIELDS: dict[str, tuple[Any, str]] = {
    "out": (Path, "directory for the metrics and the picture"),
    "model": (str, "'smollm2', or a local directory that transformers loads"),
    "task": (str, "digit_sums, sums, products or letter_counting"),
    "steps": (int, "rollout batches"),
    "time_limit": (float, "seconds of training after which no further step starts"),
    "prompts_per_step": (int, "problems in a rollout batch"),
    "group_size": (int, "sampled responses per problem"),
    "mini_batches": (int, "updates per rollout batch"),
    "max_new_tokens": (int, "longest response, in tokens"),
    "loss_from": (str, "hidden (the head is not called in training) or logits"),
    "learning_rate": (float, "of AdamW"),
    "dtype": (str, "bfloat16 (autocast over fp32 weights) or float32"),
    "device": (str, "a torch device, or auto: the GPU if there is one"),
    "seed": (int, "of the problems, the sampling and the order"),
}


def main(argv: Sequence[str]) -> int:
    """Train as the arguments say.

    Args:
        argv: the arguments after `gspo-ops train`.

    Returns:
        0, or 2 when an argument is refused or something that a run needs isn't installed.
    """
    arguments = vars(_parser().parse_args(argv))
    try:
        config = _config(arguments)
        _require_packages()
        from .loop import Trainer  # imports transformers, which takes seconds

        trainer = Trainer.of(config)
    except (ValueError, ImportError) as error:
        print(f"gspo-ops train: error: {error}", file=sys.stderr)
        return 2
    print(trainer.run())
    print(f"metrics.jsonl, summary.json and training.png are in {config.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gspo-ops train",
        description="Train a language model on verifiable problems, with the fused op as its loss. "
        "What isn't given comes from the preset.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--preset",
        choices=sorted(_PRESETS),
        default="default",
        help="demo: minutes on two CPU cores (default: %(default)s)",
    )
    parser.add_argument("--objective", choices=sorted(_OBJECTIVES), help="the policy objective")
    parser.add_argument("--clip-low", type=float, help="clip range below 1")
    parser.add_argument("--clip-high", type=float, help="clip range above 1")
    for name, (kind, text) in _FIELDS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    return parser


def _config(arguments: dict[str, Any]) -> TrainConfig:
    preset = _PRESETS[arguments["preset"]]
    objective = preset.objective
    if "objective" in arguments:
        objective = _OBJECTIVES[arguments["objective"]]()
    clip = {name: arguments[name] for name in ("clip_low", "clip_high") if name in arguments}
    fields = {name: arguments[name] for name in _FIELDS if name in arguments}
    return dataclasses.replace(preset, objective=dataclasses.replace(objective, **clip), **fields)


def _require_packages() -> None:
    missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install 'gspo-ops[train]'")
