"""Train the demo with and without the groups that have no gradient.

    python -m gspo_ops.benchmarks.left_out --out NAME.json

Both run from the same seeds, in turns, each run in a process of its own. Their results differ by
rounding, since products of other shapes round differently, and sampling amplifies the difference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

from .measure import in_a_process, provenance, write
from .plots import pyplot
from .trainer import train

ARMS = {"left out": "true", "computed": "false"}
SEEDS = (0, 1)
SERIES = ("left_out_frac", "update_s", "old_log_probs_s", "step_s", "reward", "active_token_frac")
DEMO = ["--preset", "demo", "time_limit=inf", "logging.samples=0"]


def measured(arguments: list[str]) -> dict:
    """Run `gspo-ops train` here; return its series by step and its summary."""
    rows, summary = train(arguments)
    return {name: [row[name] for row in rows] for name in SERIES} | {"summary": summary}


def seconds(runs: list[dict]) -> list[float]:
    """Return the seconds of old log-probs and updates in each step, averaged over seeds."""
    of_seeds = (zip(run["update_s"], run["old_log_probs_s"], strict=True) for run in runs)
    return [mean(map(sum, of_step)) for of_step in zip(*of_seeds, strict=True)]


def saved(runs: dict[str, list[dict]]) -> list[float]:
    """Return the seconds that each step saves."""
    pairs = zip(seconds(runs["left out"]), seconds(runs["computed"]), strict=True)
    return [b - a for a, b in pairs]


def draw(report: dict, path: Path) -> None:
    """Draw, by step of the demo, what is left out and the seconds that this saves."""
    figure, (share, time) = pyplot().subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    runs = report["runs"]
    steps = range(1, 1 + len(runs["left out"][0]["left_out_frac"]))
    for place, run in enumerate(runs["left out"]):
        label = "responses left out" if not place else None
        share.plot(steps, run["left_out_frac"], color="C0", alpha=0.6, label=label)
        share.plot(
            steps, run["active_token_frac"], color="C1", alpha=0.6,
            label="tokens with a gradient" if not place else None,
        )  # fmt: skip
    share.set(title="Groups without an advantage", ylabel="fraction", ylim=(0, 1))
    for place, (arm, of_arm) in enumerate(runs.items()):
        label = "left out" if arm == "left out" else "computed anyway"
        time.plot(steps, seconds(of_arm), color=f"C{place}", label=label)
    time.bar(steps, saved(runs), color="grey", alpha=0.3, label="saved")
    time.set(title="Time of old log-probs and updates", ylabel="seconds")
    for axis in (share, time):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=20, help="steps of each run")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.run is not None:
        print("\n" + json.dumps(measured(args.run)))
        return
    runs: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    report = {"benchmark": "left_out", **provenance(), "seeds": SEEDS, "runs": runs}
    for seed in SEEDS:
        for arm in sorted(ARMS, reverse=bool(seed % 2)):  # so that neither is always first
            options = [f"steps={args.steps}", f"seed={seed}", f"update.skip_dead={ARMS[arm]}"]
            runs[arm].append(in_a_process(__spec__.name, ["--run", *DEMO, *options]))
            print(seed, arm, runs[arm][-1]["summary"], flush=True)
    print("seconds saved by step:", " ".join(f"{x:.1f}" for x in saved(runs)))
    if args.out:
        write(args.out, report)


if __name__ == "__main__":
    main()
