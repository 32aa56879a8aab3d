"""`gspo-ops train`, `plot` and `sample`: runs from the command line."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import (
    SEED_RANGE,
    TEMPERATURE_RANGE,
    TrainConfig,
    is_seed,
    is_temperature,
    load_config,
    presets,
)
from .progress import CannotWrite, Diverged, Interrupted

_REQUIRED = ("transformers", "reasoning_gym", "tqdm", "matplotlib")
_TRAIN_EXAMPLES = """examples:
  gspo-ops train --preset demo                        what make demo does
  gspo-ops train run.toml update.learning_rate=5e-6   a file, and key=value on top
  gspo-ops train run.toml --resume                    from the last checkpoint in its out
  torchrun --nproc-per-node 2 --no-python gspo-ops train --preset demo
"""
_PLOT_EXAMPLES = """examples:
  gspo-ops plot runs/demo
  gspo-ops plot runs/a runs/b --out both.png
"""
_SAMPLE_EXAMPLES = """examples:
  gspo-ops sample runs/train                          its answers to held-out problems
  gspo-ops sample runs/train "3 + 4 =" --responses 4
"""
_INTACT = ". Earlier checkpoints are intact: --resume continues from the last one"


def main(argv: Sequence[str]) -> int:
    """Run `gspo-ops train`.

    Args:
        argv: the arguments after `gspo-ops train`.

    Returns:
        The exit status: 0 on success; 2 if an argument is refused or a required package isn't
        installed; 130 if the run was stopped; 1 if it diverged or a file could not be written.
    """
    parser = _train_parser()
    args = parser.parse_intermixed_args(argv)
    source, overrides = args.config, list(args.override)
    if source is not None and "=" in source:
        source, overrides = None, [source, *overrides]
    try:
        if source is not None and args.preset is not None:
            raise ValueError(f"expected either a file or a preset, got {source} and {args.preset}")
        config = load_config(source, overrides, preset=args.preset)
        _require_packages()
        from .loop import Trainer  # imports transformers, which takes seconds

        trainer = Trainer.of(config)
        summary = trainer.run(resume=args.resume)
    except (ValueError, ImportError) as error:
        return _refuse("train", error)
    except (Interrupted, Diverged, CannotWrite) as ended:
        intact = _INTACT if isinstance(ended, CannotWrite) else ""
        print(f"gspo-ops train: {ended}{intact}", file=sys.stderr)
        lower = " and a lower update.learning_rate" if isinstance(ended, Diverged) else ""
        print(f"next: the same command with --resume{lower}")
        return 130 if isinstance(ended, Interrupted) else 1
    if trainer.ranks.is_first:
        print(f"metrics.jsonl, samples.jsonl, summary.json and training.png are in {config.out}")
        print(summary)
        print(_next_step(config))
    return 0


def _next_step(config: TrainConfig) -> str:
    """Return a line that says what to do after a run."""
    out = shlex.quote(str(config.out))
    if config.checkpoint.save_model:
        return f"next: gspo-ops sample {out} shows what the model answers"
    return f"next: gspo-ops plot {out} OTHER_RUN draws runs side by side"


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gspo-ops train",
        description="Train a language model on verifiable problems, with the fused op as the\n"
        "loss. docs/trainer.md lists all keys.",
        epilog=_TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG.toml", help="settings (default: the preset's)")
    add(
        "override", nargs="*", metavar="key=value",
        help="overrides, such as update.learning_rate=1e-5 or model.name=tiny-moe",
    )  # fmt: skip
    add(
        "--preset", metavar="NAME",
        help=f"one of {', '.join(presets())} (default: the preset 'default')",
    )  # fmt: skip
    add("--resume", action="store_true", help="continue from the last checkpoint in out")
    return parser


def plot_main(argv: Sequence[str]) -> int:
    """Run `gspo-ops plot` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="gspo-ops plot",
        description="Plot the metrics of one run, or of several side by side.",
        epilog=_PLOT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--out", type=Path, default=Path("runs.png"), help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        _require_packages()
        from matplotlib.backend_bases import FigureCanvasBase

        from .report import plot, read_metrics

        if args.out.suffix[1:].lower() not in FigureCanvasBase.filetypes:
            raise ValueError(f"--out: expected a picture's name, such as runs.png, got {args.out}")
        names = [run.name for run in args.runs]
        if len(set(names)) < len(names):
            names = [str(run) for run in args.runs]
        runs = {name: read_metrics(run) for name, run in zip(names, args.runs, strict=True)}
        plot(runs, args.out)
    except (ValueError, ImportError) as error:
        return _refuse("plot", error)
    except CannotWrite as error:
        return _refuse("plot", f"--out: {error}")
    print(args.out)
    return 0


def sample_main(argv: Sequence[str]) -> int:
    """Run `gspo-ops sample` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="gspo-ops sample",
        description="Show how the model trained by a run answers the run's held-out problems, or\n"
        "other questions put in the same form.",
        epilog=_SAMPLE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="directory of the run")
    add("questions", nargs="*", metavar="QUESTION", help="default: held-out problems")
    add("--problems", type=int, default=8, help="held-out problems to show (default: %(default)s)")
    add("--responses", type=int, default=1, help="responses to each (default: %(default)s)")
    add("--temperature", type=float, help="0 for the likeliest tokens (default: the run's)")
    add("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    args = parser.parse_intermixed_args(argv)
    try:
        _check_sample(args)
        _require_packages()
        import torch

        from .loop import trained
        from .tasks import Problem

        sampler = trained(args.run)
        problems = [Problem(question, "") for question in args.questions]
        problems = problems or list(sampler.task.held_out[: args.problems])
        generator = torch.Generator(sampler.model.device).manual_seed(args.seed)
        answers = sampler.answers(problems, args.responses, generator, args.temperature)
    except (ValueError, ImportError, Diverged) as error:
        return _refuse("sample", error)
    for problem, texts in zip(problems, answers, strict=True):
        expected = f"   (expected: {' or '.join(problem.answers)})" if problem.answer else ""
        print(f"{problem.question}{expected}")
        for text in texts:
            print(f"    {text.strip()!r}")
    return 0


def _check_sample(args: argparse.Namespace) -> None:
    for name in ("problems", "responses"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.temperature and not is_temperature(args.temperature):
        expected = f"expected 0 or {TEMPERATURE_RANGE}"
        raise ValueError(f"--temperature: {expected}, got {args.temperature}")
    if not is_seed(args.seed):
        raise ValueError(f"--seed: expected {SEED_RANGE}, got {args.seed}")
    if not all(question.strip() for question in args.questions):
        raise ValueError(f"QUESTION: expected texts that are not empty, got {args.questions}")


def _refuse(command: str, why: object) -> int:
    """Print why a command is refused; return its exit status."""
    print(f"gspo-ops {command}: error: {why}", file=sys.stderr)
    return 2


def _require_packages() -> None:
    missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: in a clone, pip install '.[train]'")
