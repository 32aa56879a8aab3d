"""`gspo-ops compare`: where GSPO is better than GRPO, as a map over length and staleness.

Each cell of the map has a small model, dense or mixture-of-experts, a length of its answers and a
number of updates per rollout. In each cell, every objective trains at several learning rates from
tuning seeds, and then from other seeds at the rate with the highest training reward. The
comparisons, their criteria and their number were fixed before the final seeds ran;
`compare_report.py` reports where each claim of the paper (arXiv 2507.18071) holds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from threading import Thread
from typing import Any

from .compare_cells import MAP, RATES, SEEDS, SUBSET, TUNING_SEEDS, Cell, Run
from .config import SEED_RANGE, is_seed, load_config, to_tables
from .progress import CannotWrite

_EXAMPLES = """examples:
  gspo-ops compare                           one cell, about ten minutes on two cores
  gspo-ops compare --map                     all cells; this takes hours and resumes after a kill
  gspo-ops compare --only "moe, 128 tokens"  some cells
"""
_MEANS = ("clip_frac_tokens", "approx_kl_k3", "log_ratio_rms", "expert_churn")  # over the steps


def main(argv: Sequence[str]) -> int:
    """Run `gspo-ops compare` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="gspo-ops compare",
        description="Compare GSPO with GRPO on an MoE model with answers of 32 tokens, or on a\n"
        "map over lengths, updates per rollout, and dense and MoE models.\n"
        "Runs that are already in the output directory are not repeated.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("override", nargs="*", metavar="key=value", help="overrides of the preset 'compare'")
    add("--map", action="store_true", help="run all cells, which takes hours")
    add("--only", metavar="TEXT", action="append", default=[],
        help="run the cells whose name contains this text; may be repeated")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds of the final runs, "
        "default: " + " ".join(map(str, SEEDS)))  # fmt: skip
    add("--rates", type=float, nargs="+", default=list(RATES), help="learning rates, default: "
        + " ".join(f"{rate:g}" for rate in RATES))  # fmt: skip
    add("--out", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    add("--jobs", type=int, default=os.cpu_count() or 1,
        help="parallel runs, of one thread each (default: %(default)s)")  # fmt: skip
    args = parser.parse_intermixed_args(argv)
    try:
        cells = _cells(args.map, args.only)
        _check(args, cells)
        compare(cells, args.override, sorted(set(args.seeds)), sorted(set(args.rates)), args.out,
                args.jobs)  # fmt: skip
    except (ValueError, ImportError, CannotWrite) as error:
        out = "--out: " if isinstance(error, CannotWrite) else ""
        print(f"gspo-ops compare: error: {out}{error}", file=sys.stderr)
        return 2
    print((args.out / "report.md").read_text())
    return 0


def _cells(whole: bool, only: Sequence[str]) -> Sequence[Cell]:
    for text in only:
        if not any(text in cell.name for cell in MAP):
            raise ValueError(f"--only: {text!r} is in no name: {'; '.join(c.name for c in MAP)}")
    if only:
        return [cell for cell in MAP if any(text in cell.name for text in only)]
    return MAP if whole else SUBSET


def _check(args: argparse.Namespace, cells: Sequence[Cell]) -> None:
    if len(set(args.seeds)) < 2:
        raise ValueError("--seeds: expected at least two different seeds, for a standard error")
    if not all(map(is_seed, args.seeds)):
        raise ValueError(f"--seeds: expected each to be {SEED_RANGE}, got {args.seeds}")
    if set(args.seeds) & set(TUNING_SEEDS):
        raise ValueError(f"--seeds: {TUNING_SEEDS} are reserved for tuning the learning rates")
    if args.jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {args.jobs}")
    if not all(0 < rate < math.inf for rate in args.rates):
        raise ValueError(f"--rates: expected positive numbers, got {args.rates}")
    runs = [Run(cell, arm, 1.0, 0) for cell in MAP for arm in cell.arms]
    differ = {_key_of(setting) for run in runs for setting in run.overrides([])}
    for key in map(_key_of, args.override):
        if key in differ:
            raise ValueError(f"{key}: can't be overridden, as the runs differ in it")
    for run in runs:
        if run.cell in cells:
            load_config(None, run.overrides(args.override), preset="compare")


def _key_of(setting: str) -> str:
    return setting.partition("=")[0].strip()


def compare(
    cells: Sequence[Cell],
    overrides: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float],
    out: Path,
    jobs: int,
) -> dict[str, Any]:
    """Train all arms and write `compare.json`, `compare.png` and `report.md`.

    Args:
        cells: cells of the map.
        overrides: `key=value` overrides of the preset.
        seeds: seeds of the final runs of each arm.
        rates: learning rates that the tuning seeds try.
        out: output directory; runs that the same code finished there with the same libraries and
            models are not repeated.
        jobs: number of parallel runs.

    Returns:
        The contents of `compare.json`.
    """
    from ..environment import provenance
    from . import compare_plot, compare_report
    from .files import to_json, write, writing
    from .model import fingerprint, load_model

    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    models = {  # each is made once, before the parallel runs load it
        name: fingerprint(load_model(name)[0])
        for name in dict.fromkeys(cell.model for cell in cells)
    }
    arms = [(cell, arm) for cell in cells for arm in cell.arms]
    tuning = [Run(*arm, rate, seed) for arm in arms for rate in rates for seed in TUNING_SEEDS]
    final: list[Run] = []
    with _Runner(out, overrides, jobs, models) as runner:
        runner.expect(tuning + [Run(*arm, 0.0, seed) for arm in arms for seed in seeds])
        found = runner.do(tuning)
        for cell, arm in arms:
            tried = [run for run in found if (run["cell"], run["arm"]) == (cell.name, arm)]
            best = compare_report.best_rate(tried)
            final += [Run(cell, arm, best, seed) for seed in seeds]
        found += runner.do(final)
    results = {
        "benchmark": "compare", **provenance(),
        "config": to_tables(load_config(None, overrides, preset="compare")),
        "cells": [asdict(cell) | {"name": cell.name, "arms": cell.arms} for cell in cells],
        "rates": list(rates), "tuning_seeds": list(TUNING_SEEDS), "seeds": list(seeds),
        "jobs": jobs, "runs": found,
    }  # fmt: skip
    write(out / "compare.json", to_json(results, indent=1) + "\n")
    compare_plot.draw(results, out / "compare.png")
    write(out / "report.md", "\n".join(compare_report.report(results)) + "\n")
    return results


class _Runner:
    """Executes runs in processes of one thread each, with one progress bar."""

    def __init__(
        self, out: Path, overrides: Sequence[str], jobs: int, models: Mapping[str, str]
    ) -> None:
        from tqdm import tqdm

        self._out, self._overrides, self._models = out, list(overrides), models
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(jobs, spawn, initializer=_start_worker)
        # in tokens: the duration of a run is roughly proportional to the length of its answers
        self._bar = tqdm(desc="runs", unit="token", smoothing=0)

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._bar.close()

    def expect(self, runs: Sequence[Run]) -> None:
        """Set the total of the progress bar."""
        self._bar.reset(sum(_cost(run) for run in runs))

    def do(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Return the results of runs, in their order; those of finished runs come from files."""
        code = code_fingerprint()
        keys = {
            run: _key(run, self._overrides, code + self._models[run.cell.model]) for run in runs
        }
        done = {run: x for run in runs if (x := _done(run.file(self._out), keys[run])) is not None}
        self._bar.total -= sum(map(_cost, done))
        longest_first = sorted((run for run in runs if run not in done), key=_cost, reverse=True)
        going = {
            self._pool.submit(_run, run, self._overrides, self._out, keys[run]): run
            for run in longest_first
        }
        for future in as_completed(going):
            run = going[future]
            done[run] = future.result()
            self._bar.update(_cost(run))
            self._bar.set_postfix_str(f"{run.cell.name}, {run.arm}: {done[run]['gain']:+.2f}")
        return [done[run] for run in runs]


def _cost(run: Run) -> int:
    return run.cell.tokens * run.cell.epochs + 16


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the only progress bar is that of all runs
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with its parent: otherwise it would wait forever after a kill."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def code_files() -> set[Path]:
    """The source files that can change the results of a run with given settings."""
    package = Path(__file__).parent.parent
    # in a checkout gspo_ops/kernels is a link, which rglob does not follow
    files = {*package.rglob("*.py"), *(package / "kernels").glob("*.py")}
    return {p for p in files if "benchmarks" not in p.parts and not p.stem.startswith("compare_")}


def code_fingerprint() -> str:
    """Hash these files and their names, and the versions of the libraries that compute."""
    digest = hashlib.sha256()
    for name in ("torch", "transformers", "reasoning-gym"):
        digest.update(f"{name} {importlib.metadata.version(name)}".encode())
    for path in sorted(code_files()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _key(run: Run, overrides: Sequence[str], code: str) -> str:
    config = load_config(None, run.overrides(overrides), preset="compare")
    text = json.dumps([code, to_tables(config)], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _done(file: Path, key: str) -> dict[str, Any] | None:
    """Return a run's result, if the same code has finished it with the same settings."""
    if not file.is_file():
        return None
    saved = json.loads(file.read_text())
    return saved["run"] if saved["key"] == key else None


def _run(run: Run, overrides: Sequence[str], out: Path, key: str) -> dict[str, Any]:
    from .files import to_json, write

    found = train(run, overrides)
    file = run.file(out)
    write(file, to_json({"key": key, "run": found}))
    return json.loads(file.read_text())["run"]  # like the result of a finished run


def train(run: Run, overrides: Sequence[str]) -> dict[str, Any]:
    """Train one run and measure its held-out accuracy before and after.

    Returns:
        `cell`, `arm`, `rate` and `seed`; held-out accuracy `before` and `after`, and its `gain`;
        `diverged`, whether the run ended with non-finite numbers, which counts as an accuracy of 0;
        `reward` of each step, 0 after such an end; means of other metrics over the steps; and
        `seconds`.
    """
    from .loop import Trainer
    from .progress import Diverged

    start = time.monotonic()
    config = load_config(None, run.overrides(overrides), preset="compare")
    trainer = Trainer.of(config)
    before, after, rows = trainer.evaluate().mean().item(), 0.0, []
    try:
        for _ in range(config.steps):
            rows.append(trainer.step())
        after, diverged = trainer.evaluate().mean().item(), False
    except Diverged:
        diverged = True
    rewards = [round(row["reward"], 5) for row in rows]
    return {
        "cell": run.cell.name, "arm": run.arm, "rate": run.rate, "seed": run.seed,
        "before": before, "after": after, "gain": after - before, "diverged": diverged,
        "reward": rewards + [0.0] * (config.steps - len(rows)),
        # a step whose updates were all skipped has no such metrics
        **{key: mean(of) for key in _MEANS if (of := [row[key] for row in rows if key in row])},
        "seconds": round(time.monotonic() - start, 2),
    }  # fmt: skip
