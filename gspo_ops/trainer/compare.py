"""`gspo-ops compare`: the paper's claims about GSPO and GRPO, checked at a size that runs here.

Trains a dense and a mixture-of-experts model with GSPO, GRPO and GRPO with Routing Replay, several
seeds of each at several learning rates, and draws what the paper (arXiv 2507.18071) has figures of:
reward against compute, the fraction of clipped tokens, Routing Replay, and the weights that tokens'
gradients get. Each objective is shown at the rate that suits it best. The report says what the
seeds show, and where they show nothing.
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
from dataclasses import asdict, dataclass, replace
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
RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
CHURN_RATES = (1e-5, 1e-4, 1e-3)
_KEPT = ("reward", "clip_frac_tokens", "response_tokens")  # of each step's metrics
_LAST = 10  # steps whose reward decides between learning rates
# Student's t for 95%, by the number of seeds: so many standard errors are no accident.
_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


@dataclass(frozen=True)
class Run:
    """One training run."""

    model: str
    arm: str
    rate: float
    seed: int

    def overrides(self, out: Path, common: Sequence[str]) -> list[str]:
        return [
            *common, f"model.name={self.model}", *ARMS[self.arm],
            f"update.learning_rate={self.rate}", f"seed={self.seed}", f"out={self.folder(out)}",
        ]  # fmt: skip

    def folder(self, out: Path) -> Path:
        arm = self.arm.lower().replace(", ", "-").replace(" ", "-")
        return out / self.model / arm / f"rate-{self.rate:g}" / f"seed-{self.seed}"


def main(argv: Sequence[str]) -> int:
    """Run `gspo-ops compare`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="gspo-ops compare",
        description="GSPO against GRPO, dense and MoE, several seeds and learning rates.",
    )
    add = parser.add_argument
    add("override", nargs="*", metavar="key=value", help="on top of the preset 'compare'")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--rates", type=float, nargs="+", default=list(RATES), help="learning rates, default: "
        + " ".join(f"{rate:g}" for rate in RATES))  # fmt: skip
    add("--out", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    add("--jobs", type=int, default=min(os.cpu_count() or 1, 2), help="runs at a time")
    args = parser.parse_intermixed_args(argv)
    try:
        common = load_config(None, args.override, preset="compare")
        if len(set(args.seeds)) < 2:
            raise ValueError("--seeds: at least two different ones, for a spread")
        if args.jobs < 1:
            raise ValueError(f"--jobs: at least 1, got {args.jobs}")
        if any(text.startswith("update.learning_rate") for text in args.override):
            raise ValueError("update.learning_rate: --rates has those of all runs")
        rates = sorted(set(args.rates))
        if not all(0 < rate < math.inf for rate in rates):
            raise ValueError(f"--rates: expected positive numbers, got {args.rates}")
        compare(common, args.override, args.seeds, rates, args.out, args.jobs)
    except (ValueError, ImportError) as error:
        print(f"gspo-ops compare: error: {error}", file=sys.stderr)
        return 2
    print((args.out / "report.md").read_text())
    return 0


def compare(
    common: TrainConfig,
    overrides: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float],
    out: Path,
    jobs: int,
) -> dict:
    """Train all arms, and write `compare.json`, `compare.png` and `report.md`.

    Args:
        common: settings of all arms.
        overrides: the `key=value` that they were made with.
        seeds: of the runs of each arm.
        rates: learning rates of the runs of each arm.
        out: directory; runs that this commit has finished there are not done again.
        jobs: runs at a time.

    Returns:
        What `compare.json` holds.
    """
    from ..environment import provenance
    from .files import to_json
    from .model import load_model

    made = provenance()
    for model in MODELS:
        load_model(model)  # makes it, once
    arms = [(model, arm) for model, arms in MODELS.items() for arm in arms]
    runs = [Run(*arm, rate, seed) for arm in arms for rate in rates for seed in seeds]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda run: _train(run, out, overrides, jobs, made["commit"]), runs))
    results = {
        "benchmark": "compare", **made,
        "config": to_tables(common), "seeds": list(seeds), "rates": list(rates),
        "runs": [_read(run, out) for run in runs],
        "weights": token_weights(common), "churn": expert_churn_table(common),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(to_json(results, indent=1) + "\n")
    draw(results, out / "compare.png")
    (out / "report.md").write_text("\n".join(report(results)) + "\n")
    return results


def _train(run: Run, out: Path, overrides: Sequence[str], jobs: int, commit: str) -> None:
    """In a process of its own, with its share of the cores."""
    from .files import to_json

    folder, settings = run.folder(out), run.overrides(out, overrides)
    if (folder / "summary.json").is_file():
        config = to_tables(load_config(None, settings, preset="compare"))
        same = to_json(json.loads((folder / "config.json").read_text())) == to_json(config)
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
    from .files import numbers_of
    from .report import read_metrics

    rows = read_metrics(run.folder(out))
    summary = numbers_of((run.folder(out) / "summary.json").read_text())
    # a step whose updates were all skipped has clipped nothing
    by_step = {key: [round(row.get(key, 0.0), 6) for row in rows] for key in _KEPT}
    return {**asdict(run), "summary": summary, **by_step}


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


def _runs(results: dict, model: str, arm: str, rate: float | None = None) -> list[dict]:
    """Of an arm, one for each seed, at a learning rate or at its best one."""
    rate = best_rate(results, model, arm) if rate is None else rate
    return [r for r in results["runs"] if (r["model"], r["arm"], r["rate"]) == (model, arm, rate)]


def best_rate(results: dict, model: str, arm: str) -> float:
    """The learning rate with the highest reward in training's last steps, not on the held-out."""
    return max(results["rates"], key=lambda rate: mean(_last(_runs(results, model, arm, rate))))


def _last(runs: Sequence[dict]) -> list[float]:
    """Mean reward of each run's last steps."""
    return [mean(run["reward"][-_LAST:]) for run in runs]


def _curves(results: dict, model: str, arm: str, key: str) -> tuple[list[float], list[list[float]]]:
    """Sampled tokens so far, and the values of each seed, smoothed over 5 steps."""
    runs = _runs(results, model, arm)
    rollout = results["config"]["rollout"]
    per_step = rollout["prompts"] * rollout["group_size"]
    steps = range(len(runs[0][key]))
    tokens = [mean(sum(run["response_tokens"][: i + 1]) for run in runs) * per_step for i in steps]
    return tokens, [[mean(run[key][max(0, i - 4) : i + 1]) for i in steps] for run in runs]


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
                rate = best_rate(results, model, arm)
                axis.plot(x, middle, color=_COLORS[arm], label=f"{arm} at {rate:g}")
                axis.fill_between(x, low, high, color=_COLORS[arm], alpha=0.2, lw=0)
            axis.set_xlabel("sampled tokens, thousands")
            axis.grid(alpha=0.3)
        axes[0, column].set(title=f"{model}: reward", ylabel="mean reward")
        axes[1, column].set(title=f"{model}: clipped tokens", ylabel="fraction", yscale="log")
        axes[1, column].set_ylim(1e-5, 1)
        axes[0, column].legend(frameon=False, fontsize=8)
    weights = axes[0, 2]
    data = [results["weights"]["GRPO"], results["weights"]["GSPO"]]
    live = [x for of in data for x in of if x] or [1.0]
    edges = [min(live) + (max(live) - min(live)) * i / 60 for i in range(61)]
    for values, arm in zip(data, ("GRPO", "GSPO"), strict=True):
        weights.hist(
            [v for v in values if v], bins=edges, color=_COLORS[arm], alpha=0.5,
            label=f"{arm}: {_zeros(values):.1%} clipped to 0",
        )  # fmt: skip
    weights.set(
        title="Weight of a token's gradient, same batch", xlabel="factor of $A_i / |y_i|$",
        ylabel="tokens", yscale="log",
    )  # fmt: skip
    weights.legend(frameon=False, fontsize=8, loc="upper left")
    weights.set_ylim(top=10 * len(data[0]) + 1)
    weights.grid(alpha=0.3)
    gains = axes[1, 2]
    for model, style in zip(MODELS, ("--", "-"), strict=True):
        for arm in MODELS[model]:
            of_rates = [_gains(_runs(results, model, arm, rate)) for rate in results["rates"]]
            centres, errors = zip(*map(_mean_and_error, of_rates), strict=True)
            gains.errorbar(
                results["rates"], centres, errors, color=_COLORS[arm], ls=style, marker="o", ms=3,
                capsize=3, label=f"{model}: {arm}",
            )  # fmt: skip
    gains.axhline(0, color="grey", lw=0.8)
    gains.set(
        title="Gain on held-out problems", xlabel="learning rate", xscale="log",
        ylabel="accuracy after - before",
    )  # fmt: skip
    gains.legend(frameon=False, fontsize=8)
    gains.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _gains(runs: Sequence[dict]) -> list[float]:
    return [run["summary"]["gain"] for run in runs]


def report(results: dict) -> list[str]:
    """What the seeds show, as Markdown: differences within their 95% interval are called none."""
    config, seeds, rates = results["config"], results["seeds"], results["rates"]
    rollout, update = config["rollout"], config["update"]
    lines = [
        f"{config['steps']} steps of {rollout['prompts']} problems x {rollout['group_size']} "
        f"responses in {update['mini_batches']} mini-batches, {config['dtype']}, task "
        f"{config['task']['name']}; {len(seeds)} seeds; mean and standard error over them. Gain in "
        f"held-out accuracy by learning rate; in bold at the rate with the highest reward over the "
        f"last {_LAST} steps, of which the other columns and the figures are.",
        "",
        "| model | | before | " + "".join(f"gain at {rate:g} | " for rate in rates)
        + "reward, last steps | clipped tokens |",
        f"|{'---|' * (5 + len(rates))}",
    ]  # fmt: skip
    for model, arms in MODELS.items():
        for arm in arms:
            best, runs = best_rate(results, model, arm), _runs(results, model, arm)
            gains = []
            for rate in rates:
                of_rate = _gains(_runs(results, model, arm, rate))
                gain = "{:+.3f} ± {:.3f}".format(*_mean_and_error(of_rate))
                gains.append(f"**{gain}**" if rate == best else gain)
            before = mean(run["summary"]["before"] for run in runs)
            reward = "{:.3f} ± {:.3f}".format(*_mean_and_error(_last(runs)))
            clipped = mean(x for run in runs for x in run["clip_frac_tokens"])
            lines.append(
                f"| {model} | {arm} | {before:.3f} | {' | '.join(gains)} | {reward} "
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


# What the paper says of one arm's gain less another's, at their best learning rates.
_CLAIMS = (
    ("tiny-dense", "GSPO", "GRPO", "GSPO learns more from the same compute"),
    ("tiny-moe", "GSPO", "GRPO", "GRPO does not converge on MoE without Routing Replay, GSPO does"),
    ("tiny-moe", "GRPO, Routing Replay", "GRPO", "Routing Replay is what GRPO needs on MoE"),
    ("tiny-moe", "GSPO", "GRPO, Routing Replay", "GSPO does not need it"),
)


def _findings(results: dict) -> list[str]:
    lines = [_finding(results, *claim) for claim in _CLAIMS]
    if len(results["rates"]) > 1:  # with one, it is the best
        largest, claim = max(results["rates"]), "GSPO is more stable"
        lines += [_finding(results, m, "GSPO", "GRPO", claim, largest) for m in MODELS]
    grpo, gspo = (results["weights"][name] for name in ("GRPO", "GSPO"))
    low, high, s_low, s_high = (
        of((x for x in values if x), default=math.nan)
        for values in (grpo, gspo)
        for of in (min, max)
    )
    lines.append(
        f"- Weights in one batch: GRPO's reach from {low:.3g} to {high:.3g} and differ within a "
        f"response, GSPO's from {s_low:.6g} to {s_high:.6g}, one per response; clipped to 0: "
        f"{_zeros(grpo):.1%} and {_zeros(gspo):.1%}."
    )
    return lines


def _finding(
    results: dict, model: str, a: str, b: str, claim: str, rate: float | None = None
) -> str:
    """Whether the seeds, pair by pair, tell a from b: at a learning rate, or at their best ones."""
    of_a, of_b = (_gains(_runs(results, model, arm, rate)) for arm in (a, b))
    difference, error = _mean_and_error([x - y for x, y in zip(of_a, of_b, strict=True)])
    shows = f"{'more' if difference > 0 else 'less'} for {a}"
    if abs(difference) < _T95.get(len(of_a), 2.3) * error:
        shows = "no difference that these seeds can tell"
    where = "" if rate is None else f" at {rate:g}, the largest rate"
    return (
        f"- {model}{where}, gain of {a} less that of {b}: {difference:+.3f} ± {error:.3f}: {shows} "
        f"(the paper: {claim})."
    )


def _zeros(values: Sequence[float]) -> float:
    return values.count(0.0) / max(len(values), 1)
