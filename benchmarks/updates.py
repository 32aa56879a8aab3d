"""`gspo-ops bench --path model`: whole updates of a real model when some sequences are dead.

An update is the loss, its backward with activation checkpointing, gradient clipping and a step of
AdamW, on responses that the model has sampled. A fraction f of them has a gradient; the others have
no advantage, or are clipped. All contenders get the same tokens and weights. An update does not
change the weights, because the learning rate is negligible. Rounds are interleaved over all cases.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gspo_ops.integrations.transformers import log_probs_from_model
from gspo_ops.testing import relative

from .measure import interleaved, peak_bytes, provenance, release_memory, seconds, write
from .plots import MARKERS, pyplot

DEAD = ("no advantage", "clipped")
FRACTIONS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.1)
SEQUENCES, TOKENS = 20, 64
_STILL = 1e-30  # a learning rate that changes no weight


class Sampled(NamedTuple):
    """Attributes:
    model: the fp32 model that sampled the responses; each contender copies it.
    ids: (B, P + T) prompts of P tokens and responses.
    prompt: P.
    log_probs: (B, T) log-probs of the responses.
    """

    model: Any
    ids: Tensor
    prompt: int
    log_probs: Tensor


class Case(NamedTuple):
    """Attributes:
    dead: why the dead sequences have no gradient.
    f: fraction of sequences that have one.
    advantages: (B,).
    old_log_probs: (B, T).
    """

    dead: str
    f: float
    advantages: Tensor
    old_log_probs: Tensor


def sampled(name: str, sequences: int = SEQUENCES, tokens: int = TOKENS) -> Sampled:
    """Sample responses of a model, given by name or directory; none of them ends early."""
    from .clip_error import sample_tokens

    model, ids, prompt = sample_tokens(name, sequences, tokens, torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_probs = log_probs_from_model(model, {"input_ids": ids}, tokens)
    return Sampled(model, ids, prompt, log_probs)


def make_case(data: Sampled, dead: str, f: float) -> Case:
    """Make a case with live ratios inside the clip range and clipped ones far outside."""
    generator = torch.Generator().manual_seed(1)
    count = len(data.ids)
    advantages = torch.randn(count, generator=generator)
    is_live = torch.zeros(count, dtype=torch.bool)
    is_live[torch.randperm(count, generator=generator)[: round(f * count)]] = True
    log_ratio = 1e-4 * torch.randn(count, generator=generator).clamp(-2, 2)
    if dead == "clipped":
        log_ratio = torch.where(is_live, log_ratio, 0.1 * advantages.sign())
    else:
        advantages = advantages * is_live
    return Case(dead, f, advantages, data.log_probs - log_ratio[:, None])


class Contender(NamedTuple):
    """Attributes:
    optimizer: the optimizer of its own copy of the model.
    update: function that turns a case into a callable that makes one update.
    """

    optimizer: torch.optim.Optimizer
    update: Callable[[Case], Callable[[], object]]


def of_trl(data: Sampled, out: str, kind: Any, **options: Any) -> Contender:
    """Make a contender of the loss step of one of TRL's trainers."""
    from datasets import Dataset
    from trl import GRPOConfig

    from gspo_ops.trainer.tiny import character_tokenizer

    prompt, tokens = data.prompt, data.log_probs.shape[1]
    trainer = kind(
        model=copy.deepcopy(data.model), reward_funcs=lambda completions, **_: completions,
        train_dataset=Dataset.from_list([{"prompt": ""}]),
        processing_class=character_tokenizer(),  # nothing is sampled or read
        args=GRPOConfig(
            output_dir=out, use_cpu=True, bf16=False, report_to="none", loss_type="grpo",
            importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4,
            learning_rate=_STILL, max_completion_length=tokens,
        ),
        **options,
    )  # fmt: skip
    model = trainer.model.train()
    model.activation_checkpointing_enable()  # TRL's default, which only its train() applies
    optimizer = torch.optim.AdamW(model.parameters(), lr=_STILL, weight_decay=0.0, fused=True)
    trainer.current_gradient_accumulation_steps = 1
    shared = {
        "prompt_ids": data.ids[:, :prompt], "completion_ids": data.ids[:, prompt:],
        "prompt_mask": torch.ones_like(data.ids[:, :prompt]),
        "completion_mask": torch.ones_like(data.ids[:, prompt:]),
        "num_items_in_batch": torch.tensor(data.log_probs.numel()),
    }  # fmt: skip

    def update(case: Case) -> Callable[[], object]:
        inputs = shared | {"advantages": case.advantages, "old_per_token_logps": case.old_log_probs}

        def step() -> None:
            optimizer.zero_grad()
            trainer._metrics["train"].clear()
            trainer._compute_loss(model, inputs).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()

        return step

    return Contender(optimizer, update)


def of_reference_trainer(data: Sampled, *options: str) -> Contender:
    """Make a contender of an update of `gspo_ops.trainer`."""
    from gspo_ops.trainer.config import load_config
    from gspo_ops.trainer.learner import Learner
    from gspo_ops.trainer.ranks import Ranks
    from gspo_ops.trainer.rollout import Rollout

    config = load_config(None, [
        "dtype=float32", "device=cpu", "update.gradient_checkpointing=true",
        f"update.learning_rate={_STILL}", "update.max_grad_norm=1e9", *options,
    ])  # fmt: skip
    model = copy.deepcopy(data.model)
    learner = Learner(config, model, Ranks(torch.device("cpu")))
    prompts, responses = data.ids.split([data.prompt, data.log_probs.shape[1]], 1)
    rollout = Rollout(
        prompts, torch.ones_like(prompts, dtype=torch.bool), responses,
        torch.ones_like(responses, dtype=torch.bool), torch.zeros_like(responses), data.log_probs,
    )  # fmt: skip

    def update(case: Case) -> Callable[[], object]:
        batch, _ = learner.prepare(rollout, case.advantages[:, None])
        is_there = case.advantages != 0 if batch.left_out else slice(None)
        old = case.old_log_probs[is_there].flatten()
        return partial(learner.update, batch._replace(old_log_probs=old))

    return Contender(learner.optimizer, update)


def contenders(data: Sampled, out: str) -> dict[str, Contender]:
    """Return all contenders by name, with those of TRL if it is installed."""
    found = {}
    if importlib.util.find_spec("trl") is not None:
        from trl import GRPOTrainer

        from gspo_ops.integrations.trl import GSPOTrainer

        found["TRL GRPOTrainer"] = of_trl(data, out, GRPOTrainer)
        found["GSPOTrainer"] = of_trl(data, out, GSPOTrainer)
    eager = "update.loss_from=eager", "update.skip_dead=false"
    found["reference trainer, eager loss, none left out"] = of_reference_trainer(data, *eager)
    found["reference trainer"] = of_reference_trainer(data)
    return found


class Sample(NamedTuple):
    """One update: its seconds, and its peak memory beyond what was in use before."""

    seconds: float
    peak_bytes: int


def sample(step: Callable[[], object], device: torch.device) -> Sample:
    release_memory()
    taken: list[float] = []
    peak = peak_bytes(lambda: taken.append(seconds(step, device)), device)
    return Sample(taken[0], peak)


def gradient(contender: Contender, step: Callable[[], object]) -> Tensor:
    """Return the gradient of an update, flattened; this call also warms it up."""
    optimizer = contender.optimizer
    found: list[Tensor] = []

    def keep(*_: object) -> None:
        found.extend(p.grad.flatten().clone() for p in optimizer.param_groups[0]["params"])

    hook = optimizer.register_step_pre_hook(keep)
    try:
        step()
    finally:
        hook.remove()
    optimizer.zero_grad()
    return torch.cat(found)


def measure(
    data: Sampled,
    cases: Sequence[Case],
    out: str,
    rounds: int,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Return a row for each case: every contender's time, memory and distance of its gradient.

    The distance is that from the reference trainer's gradient when it computes every response, also
    in fp32.
    """
    device = data.ids.device
    everybody = contenders(data, out)
    exact = of_reference_trainer(data, "update.skip_dead=false")
    steps, errors = {}, {}
    for case in cases:
        progress(f"{case.dead}, f={case.f:g}: gradients")
        expected = gradient(exact, exact.update(case))
        for name, contender in everybody.items():
            steps[case, name] = step = contender.update(case)
            errors[case, name] = relative(gradient(contender, step), expected)
    del exact
    progress(f"{rounds} rounds of {len(steps)} updates")
    # A contender's updates follow one another, so that it is compared with its own recent f=1.
    names = {
        f"{case.dead} {name} {case.f}": (case, name)
        for dead in DEAD for name in everybody for case in cases if case.dead == dead
    }  # fmt: skip
    taken = interleaved(
        {key: partial(sample, steps[of], device) for key, of in names.items()}, rounds
    )
    samples = {of: taken[key] for key, of in names.items()}
    return [
        {
            "dead": case.dead, "f": case.f, "live": round(case.f * len(case.advantages)),
            "contenders": {
                name: {
                    "seconds": [of.seconds for of in samples[case, name]],
                    "peak_bytes": statistics.median(of.peak_bytes for of in samples[case, name]),
                    "gradient": errors[case, name],
                }
                for name in everybody
            },
        }
        for case in cases
    ]  # fmt: skip


def ratio(row: dict, name: str, base: dict, of: str) -> float:
    """Return the median over rounds of a contender's time relative to that of a row's contender."""
    pairs = zip(row["contenders"][name]["seconds"], base["contenders"][of]["seconds"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def lines(report: dict) -> list[str]:
    """Return the results as a table for the terminal."""
    found = []
    for dead in DEAD:
        rows = [row for row in report["results"] if row["dead"] == dead]
        if not rows:
            continue
        fs = "".join(f"{row['f']:>8g}" for row in rows)
        found += ["", f"{dead}: seconds, then time relative to f={rows[0]['f']:g}; f =", ""]
        found.append(f"{'':46}{fs}")
        for name in rows[0]["contenders"]:
            times = [statistics.median(row["contenders"][name]["seconds"]) for row in rows]
            found.append(f"  {name:44}" + "".join(f"{x:8.2f}" for x in times))
            of_own = [ratio(row, name, rows[0], name) for row in rows]
            found.append(f"  {'':44}" + "".join(f"{x:8.2f}" for x in of_own))
    return found


def draw(report: dict, path: Path) -> None:
    """Draw the time of an update against f, for both reasons why sequences are dead."""

    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    theory = {DEAD[0]: (lambda f: f, "f"), DEAD[1]: (lambda f: (1 + 3 * f) / 4, "(1 + 3f) / 4")}
    for axis, dead in zip(axes, DEAD, strict=True):
        rows = [row for row in report["results"] if row["dead"] == dead]
        names = list(rows[0]["contenders"])
        for place, name in enumerate(names):
            points = [(row["f"], ratio(row, name, row, names[0])) for row in rows]
            is_ours = name in ("GSPOTrainer", "reference trainer")
            color = {"GSPOTrainer": "red", "reference trainer": "darkorange"}.get(name, f"C{place}")
            axis.plot(
                *zip(*points, strict=True), marker=MARKERS[place], mfc="none", color=color,
                lw=2.5 if is_ours else 1.2, label=name,
            )  # fmt: skip
        function, label = theory[dead]
        top = max(rows, key=lambda row: row["f"])
        ours = ratio(top, "GSPOTrainer" if "GSPOTrainer" in names else names[-1], top, names[0])
        fs = [k / 50 for k in range(51)]
        axis.plot(
            fs, [ours * function(f) / function(top["f"]) for f in fs], ":", color="grey",
            label=f"proportional to {label}",
        )  # fmt: skip
        axis.set(
            xlabel="f, fraction of sequences with a gradient", title=f"Remaining sequences: {dead}"
        )
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    axes[0].set_ylabel(f"time of an update relative to {names[0]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def run(
    model: str, fractions: Sequence[float], rounds: int, out: Path | None, plot: Path | None,
    progress: Callable[[str], None],
) -> None:  # fmt: skip
    """Run `gspo-ops bench --path model`."""
    progress(f"{model}: sampling {SEQUENCES} responses of {TOKENS} tokens")
    data = sampled(model)
    cases = [make_case(data, dead, f) for dead in DEAD for f in fractions]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(data, cases, folder, rounds, progress)
    report = {
        "benchmark": "updates", **provenance(), "peers": versions(), "model": model,
        "sequences": SEQUENCES, "tokens": TOKENS, "prompt": data.prompt, "dtype": "float32",
        "rounds": rounds, "results": rows,
    }  # fmt: skip
    progress("")
    print("\n".join(lines(report)), flush=True)
    if out:
        write(out, report)
    if plot:
        draw(report, plot)


def versions() -> dict[str, str]:
    names = [name for name in ("trl", "transformers") if importlib.util.find_spec(name)]
    return {name: importlib.metadata.version(name) for name in names}
