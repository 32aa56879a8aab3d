"""The fused loss against eager PyTorch inside the reference trainer: curves, time, memory.

    python -m gspo_ops.benchmarks.trainer --out NAME.json

Each run has a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from .measure import provenance, write

LOSSES = ("hidden", "logits", "eager")
CASES = {
    "demo: short answers": ["--preset", "demo", "steps=8", "evaluation.samples=1"],
    "responses of 96 tokens": [
        "steps=3", "rollout.prompts=8", "update.mini_batches=1", "rollout.stop=eos",
        "rollout.max_new_tokens=96", "task.name=letter_counting", "task.eval_size=2",
        "evaluation.samples=1", "checkpoint.save_model=false",
    ],
}  # fmt: skip


def train(arguments: list[str]) -> dict:
    """Run `gspo-ops train` here, and tell what it took."""
    from gspo_ops.trainer import COMMANDS
    from gspo_ops.trainer.report import read_metrics

    if COMMANDS["train"](arguments):
        raise SystemExit(1)
    out = next(a.partition("=")[2] for a in arguments if a.startswith("out="))
    rows = read_metrics(Path(out))
    return {
        "reward": [row["reward"] for row in rows],
        "clip_frac": [row["clip_frac_tokens"] for row in rows],
        "update_s": median(row["update_s"] for row in rows[1:]),
        "old_log_probs_s": median(row["old_log_probs_s"] for row in rows[1:]),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.run is not None:
        print("\n" + json.dumps(train(args.run)))
        return
    report: dict = {"benchmark": "trainer", **provenance(), "results": {}}
    for case, arguments in CASES.items():
        of = report["results"][case] = {}
        for loss in LOSSES:
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(
                    [
                        sys.executable, "-m", __spec__.name, "--run", *arguments,
                        f"out={folder}/run", f"update.loss_from={loss}",
                    ],
                    stdout=subprocess.PIPE, text=True, check=True,
                )  # fmt: skip
            of[loss] = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{case:28} {loss:8} update {of[loss]['update_s']:.2f} s, old log-probs "
                f"{of[loss]['old_log_probs_s']:.2f} s, peak {of[loss]['peak_bytes'] / 2**20:.0f} "
                f"MiB, last reward {of[loss]['reward'][-1]:.3f}",
                flush=True,
            )
    if args.out:
        write(args.out, report)


if __name__ == "__main__":
    main()
