"""`gspo-ops compare`: the paper's claims about GSPO and GRPO, checked at a size that runs here.

Trains a dense and a mixture-of-experts model with GSPO, GRPO and GRPO with Routing Replay, several
seeds of each, and draws what the paper (arXiv 2507.18071) has figures of: reward against compute,
the fraction of clipped tokens, Routing Replay, and the weights that tokens' gradients get. The
report says what the seeds show, and where they show nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .config import TrainConfig, load_config, to_tables

ARMS = {
    "GSPO": ["objective.name=gspo"],
    "GRPO": ["objective.name=grpo"],
    "GRPO, Routing Replay": ["objective.name=grpo", "update.routing_replay=true"],
}
MODELS = {"tiny-dense": ("GSPO", "GRPO"), "tiny-moe": tuple(ARMS)}
CHURN_RATES = (1e-5, 1e-4, 1e-3)
# Student's t for 95%, by the number of seeds: so many standard errors are no accident.
_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


@dataclass(frozen=True)
class Run:
    """One training run."""

    model: str
    arm: str
    seed: int

    def overrides(self, out: Path, common: Sequence[str]) -> list[str]:
        return [
            *common, f"model.name={self.model}", *ARMS[self.arm], f"seed={self.seed}",
            f"out={self.folder(out)}",
        ]  # fmt: skip

    def folder(self, out: Path) -> Path:
        return (
            out
            / self.model
            / self.arm.lower().replace(", ", "-").replace(" ", "-")
            / (f"seed-{self.seed}")
        )


def main(argv: Sequence[str]) -> int:
    """Run `gspo-ops compare`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="gspo-ops compare", description="GSPO against GRPO, dense and MoE, several seeds."
    )
    add = parser.add_argument
    add("override", nargs="*", metavar="key=value", help="on top of the preset 'compare'")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--out", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    add("--jobs", type=int, default=min(os.cpu_count() or 1, 2), help="runs at a time")
    args = parser.parse_intermixed_args(argv)
    try:
        common = load_config(None, args.override, preset="compare")
        if len(set(args.seeds)) < 2:
            raise ValueError("--seeds: at least two different ones, for a spread")
        if args.jobs < 1:
            raise ValueError(f"--jobs: at least 1, got {args.jobs}")
        compare(common, args.override, args.seeds, args.out, args.jobs)
    except (ValueError, ImportError) as error:
        print(f"gspo-ops compare: error: {error}", file=sys.stderr)
        return 2
    print((args.out / "report.md").read_text())
    return 0


def compare(
    common: TrainConfig, overrides: Sequence[str], seeds: Sequence[int], out: Path, jobs: int
) -> dict:
    """Train all arms, and write `compare.json`, `compare.png` and `report.md`.

    Args:
        common: settings of all arms.
        overrides: the `key=value` that they were made with.
        seeds: of the runs of each arm.
        out: directory; runs that this commit has finished there are not done again.
        jobs: runs at a time.

    Returns:
        What `compare.json` holds.
    """
    from ..environment import provenance
    from .model import load_model

    made = provenance()
    for model in MODELS:
        load_model(model)  # makes it, once
    runs = [Run(m, arm, seed) for m, arms in MODELS.items() for arm in arms for seed in seeds]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda run: _train(run, out, overrides, jobs, made["commit"]), runs))
    results = {
        "benchmark": "compare", **made,
        "config": to_tables(common), "seeds": list(seeds),
        "runs": [_read(run, out) for run in runs],
        "weights": token_weights(common), "churn": expert_churn_table(common),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, out / "compare.png")
    (out / "report.md").write_text("\n".join(report(results)) + "\n")
    return results


def _train(run: Run, out: Path, overrides: Sequence[str], jobs: int, commit: str) -> None:
    """In a process of its own, with its share of the cores."""
    folder, settings = run.folder(out), run.overrides(out, overrides)
    if (folder / "summary.json").is_file():
        config = to_tables(load_config(None, settings, preset="compare"))
        same = json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(config))
        made_by = folder / "commit.txt"
        if same and made_by.is_file() and made_by.read_text() == commit:
            print(f"{folder}: done before", flush=True)
            return
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    command = [sys.executable, "-m", "gspo_ops.cli", "train", "--preset", "compare"]
    done = subprocess.run(
        [*command, *settings], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": threads, "TQDM_DISABLE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"{folder} failed: {done.stderr.strip().splitlines()[-1]}")
    (folder / "commit.txt").write_text(commit)
    print(f"{folder}: {done.stdout.strip().splitlines()[-2]}", flush=True)


def _read(run: Run, out: Path) -> dict[str, Any]:
    from .report import read_metrics

    rows = read_metrics(run.folder(out))
    summary = json.loads((run.folder(out) / "summary.json").read_text())
    kept = ("step", "reward", "clip_frac_tokens", "response_tokens", "accuracy")
    return {
        "model": run.model, "arm": run.arm, "seed": run.seed, "summary": summary,
        "rows": [{key: row[key] for key in kept if key in row} for row in rows],
    }  # fmt: skip


# Measurements on one batch


def token_weights(common: TrainConfig) -> dict[str, list[float]]:
    """What multiplies A / |y| in the gradient of each token, of the same off-policy batch.

    r_t under GRPO and s_i under GSPO; 0 where clipped. The batch is the last mini-batch of a step,
    after the updates by the others.
    """
    import torch

    from .. import GRPO, GSPO, policy_loss_from_log_probs
    from .loop import Trainer

    trainer = Trainer.of(common)
    rollout, advantages = _rollout(trainer)
    parts = rollout.split(common.update.mini_batches)
    chunks = advantages.chunk(common.update.mini_batches)
    batches = [trainer.learner.prepare(*pair)[0] for pair in zip(parts, chunks, strict=True)]
    for batch in batches[:-1]:
        trainer.learner.update(batch)
    last = batches[-1]
    lengths = last.rollout.mask.sum(1)
    found = {}
    for objective in (GRPO(), GSPO()):
        log_probs = trainer.learner.log_probs(last.rollout).requires_grad_()
        loss, _ = policy_loss_from_log_probs(
            log_probs, last.old_log_probs, last.advantages,
            cu_seqlens=last.rollout.cu_seqlens(), objective=objective,
        )  # fmt: skip
        (g,) = torch.autograd.grad(loss, log_probs)
        unit = (-last.advantages / lengths / len(lengths)).repeat_interleave(lengths)
        found[type(objective).__name__] = (g / unit)[unit != 0].tolist()
    return found


def expert_churn_table(common: TrainConfig) -> list[dict[str, float]]:
    """Experts of a batch's tokens that are not chosen any more after one update on that batch."""
    import torch

    from .loop import Trainer
    from .routing_replay import RoutingReplay, expert_churn

    table = []
    for rate in CHURN_RATES:
        update = replace(common.update, learning_rate=rate)
        model = replace(common.model, name="tiny-moe")
        trainer = Trainer.of(replace(common, update=update, model=model))
        rollout, advantages = _rollout(trainer)
        chunk = (
            rollout.split(common.update.mini_batches)[0],
            advantages.chunk(common.update.mini_batches)[0],
        )

        def routing(part: Any = chunk[0], trainer: Any = trainer) -> RoutingReplay:
            recorded = RoutingReplay()
            with torch.no_grad(), recorded.record(trainer.model):
                trainer.learner.log_probs(part)
            return recorded

        before = routing()
        trainer.learner.update(trainer.learner.prepare(*chunk)[0])
        prompts = len(chunk[0].prompts)
        real = torch.cat([chunk[0].prompt_mask, chunk[0].real.reshape(prompts, -1)], 1)
        table.append({"learning_rate": rate, "churn": expert_churn(before, routing(), real)})
    return table


def _rollout(trainer: Any) -> tuple[Any, Any]:
    groups = trainer.sampler.groups(trainer.random_numbers("training"))
    return groups.rollout, groups.advantages()


# Figures and report


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """And the standard error of the mean."""
    return mean(values), stdev(values) / math.sqrt(len(values))


def _curves(results: dict, model: str, arm: str, key: str) -> tuple[list[float], list[list[float]]]:
    """Sampled tokens so far, and the values of each seed, smoothed over 5 steps."""
    runs = [r for r in results["runs"] if (r["model"], r["arm"]) == (model, arm)]
    rollout = results["config"]["rollout"]
    per_step = rollout["prompts"] * rollout["group_size"]
    tokens = [
        mean(sum(row["response_tokens"] for row in run["rows"][: i + 1]) for run in runs) * per_step
        for i in range(len(runs[0]["rows"]))
    ]
    values = []
    for run in runs:
        raw = [row.get(key, math.nan) for row in run["rows"]]
        values.append([mean(raw[max(0, i - 4) : i + 1]) for i in range(len(raw))])
    return tokens, values


_COLORS = {"GSPO": "C3", "GRPO": "C0", "GRPO, Routing Replay": "C2"}


def draw(results: dict, path: Path) -> None:
    """The four figures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for column, model in enumerate(MODELS):
        for axis, key in zip(axes[:, column], ("reward", "clip_frac_tokens"), strict=True):
            for arm in MODELS[model]:
                tokens, values = _curves(results, model, arm, key)
                middle = [mean(at) for at in zip(*values, strict=True)]
                spread = [stdev(at) for at in zip(*values, strict=True)]
                low = [m - s for m, s in zip(middle, spread, strict=True)]
                high = [m + s for m, s in zip(middle, spread, strict=True)]
                x = [t / 1e3 for t in tokens]
                axis.plot(x, middle, color=_COLORS[arm], label=arm)
                axis.fill_between(x, low, high, color=_COLORS[arm], alpha=0.2, lw=0)
            axis.set_xlabel("sampled tokens, thousands")
            axis.grid(alpha=0.3)
        axes[0, column].set(title=f"{model}: reward", ylabel="mean reward")
        axes[1, column].set(title=f"{model}: clipped tokens", ylabel="fraction", yscale="log")
        axes[1, column].set_ylim(1e-5, 1)
        axes[0, column].legend(frameon=False, fontsize=8)
    weights = axes[0, 2]
    data = [results["weights"]["GRPO"], results["weights"]["GSPO"]]
    live = [x for of in data for x in of if x]
    edges = [min(live) + (max(live) - min(live)) * i / 60 for i in range(61)]
    for values, arm in zip(data, ("GRPO", "GSPO"), strict=True):
        clipped = sum(not v for v in values) / len(values)
        weights.hist(
            [v for v in values if v], bins=edges, color=_COLORS[arm], alpha=0.5,
            label=f"{arm}: {clipped:.1%} clipped to 0",
        )  # fmt: skip
    weights.set(
        title="Weight of a token's gradient, same batch", xlabel="factor of $A_i / |y_i|$",
        ylabel="tokens", yscale="log",
    )  # fmt: skip
    weights.legend(frameon=False, fontsize=8, loc="upper left")
    weights.set_ylim(top=10 * len(data[0]))
    weights.grid(alpha=0.3)
    gains = axes[1, 2]
    names = [(model, arm) for model, arms in MODELS.items() for arm in arms]
    for place, (model, arm) in enumerate(names):
        of_arm = _gains(results, model, arm)
        gains.plot([place] * len(of_arm), of_arm, "o", color=_COLORS[arm], mfc="none")
        gains.errorbar(
            [place + 0.2], [mean(of_arm)], [_mean_and_error(of_arm)[1]], fmt="s",
            color=_COLORS[arm], capsize=3,
        )  # fmt: skip
    gains.axhline(0, color="grey", lw=0.8)
    labels = [f"{model}\n{arm.replace(', ', chr(10))}" for model, arm in names]
    gains.set_xticks(range(len(names)), labels, fontsize=7)
    gains.set(title="Gain on held-out problems", ylabel="accuracy after - before")
    gains.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _gains(results: dict, model: str, arm: str) -> list[float]:
    return [r["summary"]["gain"] for r in results["runs"] if (r["model"], r["arm"]) == (model, arm)]


def report(results: dict) -> list[str]:
    """What the seeds show, as Markdown: differences within their 95% interval are called none."""
    config, seeds = results["config"], results["seeds"]
    rollout, update = config["rollout"], config["update"]
    lines = [
        f"{config['steps']} steps of {rollout['prompts']} problems x {rollout['group_size']} "
        f"responses in {update['mini_batches']} mini-batches, learning rate "
        f"{update['learning_rate']:g}, {config['dtype']}, task {config['task']['name']}; "
        f"{len(seeds)} seeds; mean and standard error over them.",
        "",
        "| model | | held-out accuracy before | gain | reward, last 10 steps | clipped tokens |",
        "|---|---|---|---|---|---|",
    ]
    for model, arms in MODELS.items():
        for arm in arms:
            runs = [r for r in results["runs"] if (r["model"], r["arm"]) == (model, arm)]
            before = [r["summary"]["before"] for r in runs]
            last = [mean(row["reward"] for row in r["rows"][-10:]) for r in runs]
            clipped = mean(row.get("clip_frac_tokens", 0.0) for r in runs for row in r["rows"])
            gain, rewards = (
                "{:+.3f} ± {:.3f}".format(*_mean_and_error(values))
                for values in (_gains(results, model, arm), last)
            )
            lines.append(
                f"| {model} | {arm} | {mean(before):.3f} | {gain} | {rewards[1:]} "
                f"| {100 * clipped:.2g}% |"
            )
    lines += [
        "",
        *_findings(results),
        "",
        "| learning rate | experts chosen before that are not chosen after one update |",
        "|---|---|",
        *(f"| {row['learning_rate']:g} | {row['churn']:.2%} |" for row in results["churn"]),
    ]
    return lines


def _findings(results: dict) -> list[str]:
    paper = {
        ("tiny-dense", "GSPO", "GRPO"): "the paper: GSPO learns more from the same compute",
        ("tiny-moe", "GSPO", "GRPO"): "the paper: GRPO does not converge on MoE without Routing "
        "Replay, GSPO does",
        ("tiny-moe", "GRPO, Routing Replay", "GRPO"): "the paper: Routing Replay is what GRPO "
        "needs on MoE",
        ("tiny-moe", "GSPO", "GRPO, Routing Replay"): "the paper: GSPO does not need it",
    }
    lines = []
    for (model, a, b), claim in paper.items():
        pairs = zip(_gains(results, model, a), _gains(results, model, b), strict=True)
        difference, error = _mean_and_error([x - y for x, y in pairs])
        shows = f"{'more' if difference > 0 else 'less'} for {a}"
        if abs(difference) < _T95.get(len(results["seeds"]), 2.3) * error:
            shows = "no difference that these seeds can tell"
        lines.append(
            f"- {model}, gain of {a} less that of {b}: {difference:+.3f} ± {error:.3f}: {shows} "
            f"({claim})."
        )
    grpo, gspo = (results["weights"][name] for name in ("GRPO", "GSPO"))
    low, high = min(x for x in grpo if x), max(grpo)
    s_low, s_high = min((x for x in gspo if x), default=math.nan), max(gspo)
    lines.append(
        f"- Weights in one batch: GRPO's reach from {low:.3g} to {high:.3g} and differ within a "
        f"response, GSPO's from {s_low:.6g} to {s_high:.6g}, one per response; clipped to 0: "
        f"{grpo.count(0.0) / len(grpo):.1%} and {gspo.count(0.0) / len(gspo):.1%}."
    )
    return lines
