"""The demo's training with and without groups that have no gradient.

    python -m gspo_ops.benchmarks.left_out --out NAME.json

Both run from the same seeds, in turns, each in a process of its own. They differ by rounding, since
products of other shapes are rounded otherwise, and sampling carries that on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from .measure import in_a_process, provenance, write

ARMS = {"left out": "true", "computed": "false"}
SEEDS = (0, 1)
SERIES = ("left_out_frac", "update_s", "old_log_probs_s", "step_s", "reward", "active_token_frac")
DEMO = ["--preset", "demo", "time_limit=inf", "logging.samples=0"]


def train(arguments: list[str]) -> dict:
    """Run `gspo-ops train` here, and tell what came of it by step."""
    from gspo_ops.trainer import COMMANDS
    from gspo_ops.trainer.report import read_metrics

    if COMMANDS["train"](arguments):
        raise SystemExit(1)
    out = Path(next(a.partition("=")[2] for a in arguments if a.startswith("out=")))
    rows = read_metrics(out)
    series = {name: [row[name] for row in rows] for name in SERIES}
    return series | {"summary": json.loads((out / "summary.json").read_text())}


def run(arguments: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return in_a_process(__spec__.name, ["--run", *arguments, f"out={folder}/run"])


def saved(runs: dict[str, list[dict]]) -> list[float]:
    """Seconds of old log-probs and updates that each step saves, mean over seeds."""

    def seconds(of: dict) -> list[float]:
        return [a + b for a, b in zip(of["update_s"], of["old_log_probs_s"], strict=True)]

    pairs = zip(runs["left out"], runs["computed"], strict=True)
    of_seeds = [
        [b - a for a, b in zip(seconds(ours), seconds(all_), strict=True)] for ours, all_ in pairs
    ]
    return [sum(of_step) / len(of_step) for of_step in zip(*of_seeds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.run is not None:
        print("\n" + json.dumps(train(args.run)))
        return
    runs: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    report = {"benchmark": "left_out", **provenance(), "seeds": SEEDS, "runs": runs}
    for seed in SEEDS:
        for arm in sorted(ARMS, reverse=bool(seed % 2)):  # neither is always first
            options = [f"steps={args.steps}", f"seed={seed}", f"update.skip_dead={ARMS[arm]}"]
            runs[arm].append(run([*DEMO, *options]))
            print(seed, arm, runs[arm][-1]["summary"], flush=True)
    print("seconds saved by step:", " ".join(f"{x:.1f}" for x in saved(runs)))
    if args.out:
        write(args.out, report)


if __name__ == "__main__":
    main()
