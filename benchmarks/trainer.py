"""Run the reference trainer with the fused loss, eager PyTorch, and an engine's log-probs.

    python -m gspo_ops.benchmarks.trainer --out NAME.json

Each run has a process of its own, so that peak memory can be attributed to it. Runs that are
compared take turns, from several seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

from gspo_ops.trainer.metrics import Row

from .measure import in_a_process, process_peak_bytes, provenance, write

LOSSES = ("hidden", "eager")
SEEDS = (0, 1, 2)
CASES = {
    "demo: short answers": [
        "--preset", "demo", "steps=6", "evaluation.samples=1", "task.eval_size=2",
    ],
    "responses of 64 tokens": [
        "steps=3", "rollout.prompts=4", "update.mini_batches=1", "rollout.stop=eos",
        "rollout.max_new_tokens=64", "task.name=letter_counting", "task.eval_size=2",
        "evaluation.samples=1", "checkpoint.save_model=false",
    ],
}  # fmt: skip
ENGINE = [
    "--preset", "demo", "steps=2", "evaluation.samples=1", "task.eval_size=2", "dtype=float32",
    "rollout.dtype=bfloat16",
]  # fmt: skip
SEEN = (
    "mismatch_token_mean", "mismatch_token_max", "mismatch_sequence_mean", "mismatch_sequence_max",
    "mismatch_clip_frac", "clip_frac_tokens", "first_ratio_error",
)  # fmt: skip


def train(arguments: list[str]) -> tuple[list[Row], dict]:
    """Run `gspo-ops train` here; return the metrics of its steps and its summary."""
    from gspo_ops.trainer import COMMANDS
    from gspo_ops.trainer.report import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        if COMMANDS["train"]([*arguments, f"out={out}"]):
            raise SystemExit(1)
        return read_metrics(out), json.loads((out / "summary.json").read_text())


def measured(arguments: list[str]) -> dict:
    rows, _ = train(arguments)
    return {
        "reward": [row["reward"] for row in rows],
        "seen": {key: median(row[key] for row in rows) for key in SEEN},
        "update_s": median(row["update_s"] for row in rows[1:]),
        "old_log_probs_s": median(row["old_log_probs_s"] for row in rows[1:]),
        "peak_bytes": process_peak_bytes(),
    }


def run(arguments: list[str]) -> dict:
    return in_a_process(__spec__.name, ["--run", *arguments])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.run is not None:
        print("\n" + json.dumps(measured(args.run)))
        return
    report: dict = {
        "benchmark": "trainer",
        **provenance(),
        "seeds": SEEDS,
        "results": {},
        "engine": [],
    }
    for case, arguments in CASES.items():
        of: dict[str, list[dict]] = {}
        report["results"][case] = of
        for seed in SEEDS:
            for loss in LOSSES:
                found = run([*arguments, f"update.loss_from={loss}", f"seed={seed}"])
                of.setdefault(loss, []).append(found)
                print(
                    f"{case:28} {loss:8} seed {seed}: update {found['update_s']:.2f} s, old "
                    f"log-probs {found['old_log_probs_s']:.2f} s, peak "
                    f"{found['peak_bytes'] / 2**20:.0f} MiB, last reward {found['reward'][-1]:.3f}",
                    flush=True,
                )
    for objective in ("gspo", "grpo"):
        for old in ("recompute", "rollout"):
            options = [*ENGINE, f"objective.name={objective}", f"update.old_log_probs={old}"]
            seen = [run([*options, f"seed={seed}"])["seen"] for seed in SEEDS]
            medians = {key: median(of[key] for of in seen) for key in SEEN}
            report["engine"].append({"objective": objective, "old_log_probs": old, **medians})
            print(report["engine"][-1], flush=True)
    if args.out:
        write(args.out, report)


if __name__ == "__main__":
    main()
