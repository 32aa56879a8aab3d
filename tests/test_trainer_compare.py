"""`gspo-ops compare`: the runs that it makes and resumes, and its report on given results."""

import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")
pytest.importorskip("scipy")

from gspo_ops.trainer import compare
from gspo_ops.trainer.compare_cells import MAP, SUBSET, TUNING_SEEDS, Cell, Run
from gspo_ops.trainer.compare_plot import draw
from gspo_ops.trainer.compare_report import (
    Results,
    best_rate,
    common_rate,
    holm,
    predicted_spread,
    repeated,
    report,
)

RATES = [1e-4, 1e-3]
SEEDS = [0, 1, 2, 3, 4]
CELLS = [Cell("dense", 8, 4), Cell("dense", 8, 16), Cell("moe", 32, 16),
         Cell("moe", 32, 16, engine=True)]  # fmt: skip


def noise(seed):
    """Return noise that has a mean of 0 over the final seeds."""
    return (seed % 100 - 2) / 100


def results(gain=lambda cell, arm, rate, seed: 0.2 + noise(seed), cells=CELLS, **metrics):
    """Return results as `compare` writes them; a metric is a number or a function like `gain`."""
    metrics = {"reward": lambda *_: 0.5, "clip_frac_tokens": 0.1, "approx_kl_k3": 2e-6,
               "log_ratio_rms": 1e-3, "expert_churn": 0.07} | metrics  # fmt: skip
    runs = []

    def add(run):
        place = run.cell, run.arm, run.rate, run.seed
        values = {k: f(*place) if callable(f) else f for k, f in metrics.items()}
        # the first steps do not decide between rates
        values["reward"] = [0.99] * 8 + [values["reward"]] * 4
        runs.append(
            {"cell": run.cell.name, "arm": run.arm, "rate": run.rate, "seed": run.seed,
             "before": 0.6, "gain": gain(*place), "seconds": 36.0, **values}
        )  # fmt: skip

    for cell in cells:
        for arm in cell.arms:
            tuning = [Run(cell, arm, *x) for x in itertools.product(RATES, TUNING_SEEDS)]
            for run in tuning:
                add(run)
            best = best_rate(runs[-len(tuning) :])
            for seed in SEEDS:
                add(Run(cell, arm, best, seed))
    rollout = {"prompts": 16, "group_size": 8}
    return {
        "config": {"steps": 12, "dtype": "float32", "rollout": rollout},
        "cells": [vars(cell) | {"name": cell.name, "arms": cell.arms} for cell in cells],
        "rates": RATES, "tuning_seeds": list(TUNING_SEEDS), "seeds": SEEDS, "runs": runs,
        "jobs": 2,
    }  # fmt: skip


def line_of(found, start):
    (line,) = [line for line in report(found) if line.startswith(start)]
    return line


class TestCells:
    def test_the_map_has_what_the_claims_are_about(self):
        assert len({cell.name for cell in MAP}) == len(MAP)
        for kind in ("dense", "moe"):
            grid = {(c.tokens, c.mini_batches) for c in MAP if c.kind == kind and c.epochs == 1}
            assert grid >= set(itertools.product((8, 32, 128), (4, 16)))
        assert any(c.epochs == 3 for c in MAP)
        assert any(c.engine for c in MAP)
        assert set(SUBSET) < set(MAP)

    def test_every_run_has_valid_settings_of_its_own(self):
        settings = set()
        for cell in MAP:
            for arm in cell.arms:
                overrides = Run(cell, arm, 1e-4, 0).overrides([])
                compare.load_config(None, overrides, preset="compare")
                settings.add(tuple(overrides))
        assert len(settings) == sum(len(cell.arms) for cell in MAP)
        assert Cell("dense", 8, 4).arms == ["GSPO", "GSPO-token", "GRPO"]
        assert len(Cell("moe", 8, 4).arms) == 4

    def test_files_of_runs_differ(self, tmp_path):
        runs = [Run(cell, arm, rate, seed) for cell in MAP for arm in cell.arms
                for rate in RATES for seed in SEEDS]  # fmt: skip
        assert len({run.file(tmp_path) for run in runs}) == len(runs)


class TestReport:
    def test_each_arm_is_shown_at_the_rate_of_its_highest_last_rewards(self):
        def best(arm):
            return RATES[arm == "GSPO"]

        found = Results(
            results(
                # a higher gain at the other rate does not decide
                gain=lambda cell, arm, rate, seed: 0.1 if rate == best(arm) else 0.4,
                reward=lambda cell, arm, rate, seed: 0.9 if rate == best(arm) else 0.8,
            )
        )
        assert found.best(CELLS[0].name, "GSPO") == 1e-3
        assert found.best(CELLS[0].name, "GRPO") == 1e-4
        assert found.gains(CELLS[0].name, "GRPO") == [0.1] * 5

    @pytest.mark.parametrize(("better", "where"), [(0.1, 0), (-0.1, 1), (0.01, 2)])
    def test_a_difference_is_one_where_the_seeds_show_it(self, better, where):
        def gain(cell, arm, rate, seed):
            # the differences have a standard error of 0.007
            return 0.2 + (better + noise(seed) if (arm, cell.tokens) == ("GSPO", 8) else 0.0)

        line = line_of(results(gain), "- *More is learned")
        says = ("GSPO gains more in", "GRPO gains more in", "these seeds are inconclusive in")
        counts = [int(re.search(rf"{text} (\d)", line)[1]) for text in says]
        expected = [0, 0, 2]  # the cells without a difference
        expected[where] += 2
        assert counts == expected
        assert f"dense, 8 tokens, 4 updates: {better:+.2f} ± 0.01" in line

    def test_correction_for_the_number_of_comparisons(self):
        assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
        assert holm([0.9, 0.5]) == [1.0, 1.0]
        # 0.02 is significant for one, but not among many
        assert min(holm([0.02] + [0.5] * 9)) == pytest.approx(0.2)

    def test_rates_at_which_it_learns(self):
        def gain(cell, arm, rate, seed):
            collapses = arm == "GRPO" and rate == 1e-3 and seed == TUNING_SEEDS[1]
            return -0.6 if collapses else 0.2

        found = results(gain)
        assert Results(found).learns(CELLS[0].name, "GRPO") == [1e-4]
        assert Results(found).learns(CELLS[0].name, "GSPO") == RATES
        line = line_of(found, "- *Stable")
        assert f"at more than GRPO in {len(CELLS)} cells ({CELLS[0].name}: 2 and 1;" in line
        assert "(0.0001; 0.0001)" in line_of(found, f"| {CELLS[0].name} | 0.60")

    def test_clipped_tokens_are_compared_at_one_rate(self):
        def clipped(cell, arm, rate, seed):
            return (0.2 if arm.startswith("GSPO") else 0.001) * rate / RATES[0] / cell.mini_batches

        line = line_of(results(clip_frac_tokens=clipped), "- *Two orders")
        assert "or more, in 4 cells (dense, 8 tokens, 4 updates, at 0.001: 200;" in line
        assert "and fewer in 0 cells." in line

    def test_a_step_that_clips_nothing(self):
        found = results(clip_frac_tokens=lambda cell, arm, *_: 0.1 * (arm == "GSPO"))
        assert "at 0.001: none with GRPO" in line_of(found, "- *Two orders")

    def test_the_engine_is_compared_with_the_same_cell_without(self):
        found = results(lambda cell, arm, rate, seed: 0.2 - 0.1 * cell.engine * (arm == "GRPO"))
        line = line_of(found, "- *Tolerance")
        assert "GSPO's gain changes by +0.00 ± 0.00 and GRPO's gain changes by -0.10 ± 0" in line

    def test_predicted_spread_is_that_of_means_of_independent_tokens(self):
        x = 1e-2 * torch.randn(20000, 64, generator=torch.Generator().manual_seed(0)).double()
        k3 = (x.exp() - 1 - x).mean().item()
        assert predicted_spread(k3, 64) == pytest.approx(x.mean(1).std().item(), rel=0.02)
        rows = [line for line in report(results()) if line.startswith(f"| {CELLS[2].name} | 10%")]
        assert rows[0].count(f"| {math.sqrt(4e-6 / 32):.1e} | 1.0e-03 ") == 2

    def test_one_rate_for_all_is_where_most_learn(self):
        found = results(lambda cell, arm, rate, seed: 0.2 if rate == 1e-4 or cell.tokens < 9 else 0)
        assert common_rate(Results(found)) == 1e-4

    def test_churn_is_that_of_experts(self):
        lines = {cell.name: line_of(results(), f"| {cell.name} | 0.60") for cell in CELLS}
        assert "| 7%, 7% |" in lines["moe, 32 tokens, 16 updates"]
        assert "7%" not in lines["dense, 8 tokens, 4 updates"]

    def test_two_measurements_of_the_same_cells(self):
        def better(cell, arm, rate, seed):
            return 0.2 + noise(seed) + 0.1 * ((cell.kind, arm) == ("moe", "GRPO"))

        first = results(cells=CELLS[:3]) | {"commit": "a", "date": "Monday"}
        second = results(better, cells=CELLS[1:]) | {"commit": "b", "date": "Tuesday"}
        lines = repeated(second, first)
        # the standard error of a difference is 0.01; each measurement has one cell of its own
        assert lines[0].startswith("6 of 7 gains differ between two measurements (Monday, commit")
        assert len(lines) == 4 + 7
        (line,) = [line for line in lines if f"{CELLS[2].name} | GRPO |" in line]
        assert "| +0.20 ± 0.01 (0.0001; 0.0001 to 0.001) | +0.30 ± 0.01 (" in line
        assert line.endswith("| +0.10 ± 0.01 |")

    def test_time(self):
        found = results()
        count = len(found["runs"])
        assert report(found)[-1] == (
            f"{count} runs of one thread took {count / 100:.1f} hours, {0.3 * count:.0f} minutes "
            "with 2 at a time."
        )

    def test_metrics_that_a_run_without_an_update_does_not_have(self, tmp_path):
        found = results()
        for run in found["runs"]:
            if run["arm"] == "GRPO":
                run["expert_churn"] = None
                del run["clip_frac_tokens"]
        assert "nan" in line_of(found, f"| {CELLS[2].name} | 0.60")
        draw(found, tmp_path / "compare.png")

    @pytest.mark.parametrize("cells", [CELLS, CELLS[:1], CELLS[2:3]])
    def test_picture(self, tmp_path, cells):
        found = results(cells=cells)
        report(found)
        draw(found, tmp_path / "compare.png")
        assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_change_of_kernels_or_trainer_repeats_runs_and_one_of_the_report_does_not():
    files = {"/".join(path.parts[-2:]) for path in compare.code_files()}
    assert files > {"kernels/policy_loss.py", "trainer/learner.py", "trainer/compare.py"}
    assert not files & {"trainer/compare_report.py", "benchmarks/bench.py"}


def test_other_libraries_or_models_repeat_runs(tmp_path, monkeypatch):
    def key(model="a"):
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(compare, "_done", lambda file, key: found.append(key) or {})
            with compare._Runner(tmp_path, [], 1, {SMALL.model: model}) as runner:
                runner.expect([Run(SMALL, "GSPO", 1e-3, 0)])
                runner.do([Run(SMALL, "GSPO", 1e-3, 0)])
        return found[0]

    keys = {key(), key("b")}
    assert key() in keys
    version = compare.importlib.metadata.version
    for name in ("torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(
                compare.importlib.metadata, "version",
                lambda x, name=name: "0" if x == name else version(x),
            )  # fmt: skip
            keys.add(key())
    assert len(keys) == 4


@pytest.fixture
def untaught(tmp_path, monkeypatch):
    """Make a cache with a model without a warm-up, and a reward in which its answers differ."""
    from gspo_ops.trainer import tiny

    (tmp_path / "parity.py").write_text(
        "def score(text, problem):\n    return float(sum(map(ord, text)) % 2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny, "teach", lambda *_, **__: None)
    tiny.tiny_directory(SMALL.model, tmp_path / "cache" / "gspo-ops")


OVERRIDES = [
    "device=cpu", "steps=2", "rollout.group_size=2", "task.train_size=16", "task.eval_size=2",
    "evaluation.samples=1", "task.reward=parity:score",
]  # fmt: skip
SMALL = CELLS[0]
ARGUMENTS = ["--only", SMALL.name, "--rates", "1e-2", "--seeds", "0", "1", "--jobs", "1"]


def is_running(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_comparison_that_is_killed_goes_on(tmp_path, untaught, one_thread):
    """Finished runs are not repeated, and the numbers are those of an uninterrupted comparison."""
    out = tmp_path / "compare"
    command = [sys.executable, "-m", "gspo_ops.cli", "compare", "--out", str(out)]
    command += [*ARGUMENTS, *OVERRIDES]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 300
        while len(done := sorted(out.rglob("rate*.json"))) < 3:
            assert killed.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        killed.kill()
        killed.wait()
        while is_running(killed.pid):  # its processes end with it
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(killed.pid, signal.SIGKILL)
    count = len(SMALL.arms) * (len(TUNING_SEEDS) + 2)
    done = sorted(out.rglob("rate*.json"))  # all are whole
    assert 3 <= len(done) < count
    before = {path: (path.stat().st_mtime_ns, json.loads(path.read_text())) for path in done}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (out / "report.md").read_text() in shown.stdout
    assert all(path.stat().st_mtime_ns == time for path, (time, _) in before.items())
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "compare.json").read_text())
    assert len(found["runs"]) == count
    assert all(len(run["reward"]) == 2 for run in found["runs"])

    # a run that was not done when it was killed, repeated in this process
    late = next(path for path in out.rglob("rate*.json") if path not in before)
    run = json.loads(late.read_text())["run"]
    again = compare.train(Run(SMALL, run["arm"], run["rate"], run["seed"]), OVERRIDES)
    assert again | {"seconds": 0} == run | {"seconds": 0}

    # other code or settings repeat a run
    made = (OVERRIDES, "a"), (OVERRIDES, "b"), ([*OVERRIDES, "steps=3"], "a")
    keys = {compare._key(Run(SMALL, "GSPO", 1e-3, 0), *x) for x in made}
    assert len(keys) == 3
    file = done[0]
    assert compare._done(file, before[file][1]["key"]) == before[file][1]["run"]
    assert compare._done(file, keys.pop()) is None
    assert compare._done(file.with_name("no"), keys.pop()) is None


def test_a_run_that_diverges_has_lost_everything(untaught, monkeypatch):
    from gspo_ops.trainer.loop import Trainer
    from gspo_ops.trainer.progress import Diverged

    steps = iter([{"reward": 0.5, "clip_frac_tokens": 0.25}])

    def step(self):
        try:
            return next(steps)
        except StopIteration:
            raise Diverged("as large rates do") from None

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "evaluate", lambda self: torch.full((2, 1), 0.75))
    found = compare.train(Run(SMALL, "GRPO", 1.0, 0), [*OVERRIDES, "steps=3"])
    assert found["diverged"]
    assert (found["before"], found["after"], found["gain"]) == (0.75, 0.0, -0.75)
    assert found["reward"] == [0.5, 0.0, 0.0]
    assert found["clip_frac_tokens"] == 0.25
    assert "expert_churn" not in found


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "1", "1"], "--seeds: expected at least two"),
        (["--seeds", "1", "100"], "--seeds: (100, 101) are reserved"),
        (["--seeds", "1", "-1"], "--seeds: expected each to be an integer from 0 to below"),
        (["--jobs", "0"], "--jobs: expected at least 1"),
        (["update.learning_rate=1e-4"], "update.learning_rate: can't be overridden"),
        (["objective.name=grpo"], "objective.name: can't be overridden"),
        (["task.graded=true"], "task.graded: can't be overridden"),
        (["rollout.promts=4"], "did you mean rollout.prompts"),
        (["rollout.prompts=4"], "update.mini_batches: expected a divisor"),
        (["--rates", "-1"], "--rates: expected positive numbers, got [-1.0]"),
        (["--only", "64 tokens"], "--only: '64 tokens' is in no name: dense, 8 tokens, 4 updates"),
    ],
)
def test_bad_arguments(arguments, says, capsys, monkeypatch):
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("it began"))
    assert compare.main(arguments) == 2
    assert says in capsys.readouterr().err


def test_an_out_that_can_not_be_written_to(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert compare.main(["--out", str(tmp_path / "file" / "x")]) == 2
    message = f"error: --out: can't write {tmp_path}/file/x: Not a directory"
    assert message in capsys.readouterr().err


def test_only_some_cells(monkeypatch, tmp_path, capsys):
    chosen = []
    monkeypatch.setattr(compare, "compare", lambda cells, *_: chosen.append(cells))
    (tmp_path / "report.md").write_text("it")
    some = ["--only", "dense, 128", "--only", "bf16"]
    for arguments in ([], ["--map"], ["--only", "bf16"], ["--map", *some]):
        assert compare.main(["--out", str(tmp_path), *arguments]) == 0
    assert [len(cells) for cells in chosen] == [1, len(MAP), 1, 3]
