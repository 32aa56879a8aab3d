"""`gspo-ops compare`: what it runs, and what its report says of given results."""

import io
import json
import re
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from gspo_ops import cli
from gspo_ops.trainer import compare, tiny
from gspo_ops.trainer.compare import MODELS, Run, best_rate, draw, report

RATES = [1e-5, 1e-4]


def results(gain, reward=lambda arm, rate: 0.5, seeds=(0, 1, 2, 3)):
    """As `compare` writes them, with gain(arm, rate, seed) and reward(arm, rate)."""
    runs = []
    for model, arms in MODELS.items():
        for arm in arms:
            for rate in RATES:
                for seed in seeds:
                    # the first half of the steps does not count
                    rewards = [0.99] * 10 + [reward(arm, rate)] * 10
                    summary = {"before": 0.5, "gain": gain(arm, rate, seed)}
                    runs.append(
                        {"model": model, "arm": arm, "rate": rate, "seed": seed,
                         "summary": summary,
                         "reward": rewards, "clip_frac_tokens": [0.25] * 20,
                         "response_tokens": [3.0] * 20}
                    )  # fmt: skip
    return {
        "config": {
            "steps": 20, "dtype": "float32", "rollout": {"prompts": 4, "group_size": 8},
            "update": {"mini_batches": 2}, "task": {"name": "digit_sums"},
        },
        "seeds": list(seeds), "rates": RATES, "runs": runs,
        "weights": {"GRPO": [0.9, 1.1, 1.0, 1.2], "GSPO": [0.0, 1.01, 0.99, 0.0]},
        "churn": [{"learning_rate": 1e-3, "churn": 0.0512}],
    }  # fmt: skip


def noise(seed):
    return (seed - 1.5) / 100


def test_each_arm_is_shown_at_the_rate_of_its_highest_reward():
    def best(arm):
        return RATES[arm == "GSPO"]

    found = results(
        # a higher gain at the other rate does not decide
        gain=lambda arm, rate, seed: 0.2 + noise(seed) if rate == best(arm) else 0.4,
        reward=lambda arm, rate: 0.9 if rate == best(arm) else 0.8,
    )
    assert best_rate(found, "tiny-moe", "GSPO") == 1e-4
    assert best_rate(found, "tiny-moe", "GRPO") == 1e-5
    text = "\n".join(report(found))
    gspo, grpo = (
        re.search(rf"^\| tiny-moe \| {arm} \|.*$", text, re.M) for arm in ("GSPO", "GRPO")
    )
    assert "| 0.500 | +0.400 ± 0.000 | **+0.200 ± 0.006** | 0.900 ± 0.000 | 25% |" in gspo[0]
    assert "| 0.500 | **+0.200 ± 0.006** | +0.400 ± 0.000 | 0.900 ± 0.000 | 25% |" in grpo[0]


@pytest.mark.parametrize(
    ("better", "says"), [(0.05, "more for GSPO"), (-0.05, "less for GSPO"), (0.01, "no difference")]
)
def test_a_difference_is_one_where_the_seeds_show_it(better, says):
    # the difference varies over the seeds with a standard error of 0.0065: 3.18 of it are 0.02
    found = results(lambda arm, rate, seed: 0.2 + (better + noise(seed) if arm == "GSPO" else 0.0))
    (line,) = [x for x in report(found) if x.startswith("- tiny-dense, gain of GSPO less")]
    assert f"{better:+.3f} ± 0.006: {says}" in line


def test_stability_is_judged_at_the_largest_rate():
    found = results(
        lambda arm, rate, seed: noise(seed) - (0.3 if arm != "GSPO" and rate == 1e-4 else 0.0)
    )
    lines = [x for x in report(found) if "at 0.0001, the largest rate, gain of GSPO less" in x]
    assert len(lines) == len(MODELS)
    assert all("+0.300 ± 0.000: more for GSPO" in line for line in lines)
    assert "the largest rate" not in "\n".join(report(found | {"rates": [1e-5]}))


def test_weights_and_churn_are_told():
    text = "\n".join(report(results(lambda *_: 0.1)))
    assert "GRPO's reach from 0.9 to 1.2 " in text
    assert "clipped to 0: 0.0% and 50.0%." in text
    assert "| 0.001 | 5.12% |" in text


@pytest.mark.parametrize("weights", [[0.9, 0.0, 1.1], [0.0], []])
def test_picture(tmp_path, weights):
    found = results(lambda arm, rate, seed: noise(seed))
    found["weights"]["GSPO"] = found["weights"]["GRPO"] = weights
    report(found)
    draw(found, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_finished_run_was_made_with_decides_whether_it_is_done_again(tmp_path, monkeypatch):
    run, calls = Run("tiny-moe", "GRPO, Routing Replay", 1e-4, 3), []
    folder = run.folder(tmp_path)
    assert folder == tmp_path / "tiny-moe/grpo-routing-replay/rate-0.0001/seed-3"

    def train(command, **_):
        calls.append(command)
        settings = compare.load_config(None, command[6:], preset="compare")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text("{}")
        (folder / "config.json").write_text(json.dumps(compare.to_tables(settings)))
        return SimpleNamespace(returncode=0, stdout="the summary\nthe files\n")

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=train))
    for overrides, commit, count in [
        ([], "a", 1), ([], "a", 1), ([], "b", 2), (["steps=9"], "b", 3), (["steps=9"], "b", 3),
    ]:  # fmt: skip
        compare._train(run, tmp_path, overrides, 1, commit)
        assert len(calls) == count
    config = json.loads((folder / "config.json").read_text())
    assert (config["steps"], config["update"]["learning_rate"]) == (9, 1e-4)
    assert config["update"]["routing_replay"]


def in_process(command, **_):
    assert command[1:3] == ["-m", "gspo_ops.cli"]
    with redirect_stdout(io.StringIO()) as out:
        code = cli.main(command[3:])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr="it failed")


def test_all_of_it_with_untaught_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny, "teach", lambda *_, **__: None)
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=in_process))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "parity.py").write_text(
        "def score(text, _):\n    return float(sum(map(ord, text)) % 2)"
    )
    out = tmp_path / "compare"
    arguments = [
        "--out", str(out), "--seeds", "0", "1", "--rates", "1e-3", "--jobs", "1", "device=cpu",
        "steps=2", "rollout.prompts=4", "task.train_size=20", "task.eval_size=8",
        "task.reward=parity:score",
    ]  # fmt: skip
    assert compare.main(arguments) == 0
    printed = capsys.readouterr().out
    assert (out / "report.md").read_text() in printed
    assert printed.count("held-out accuracy, 8 problems") == 10
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "compare.json").read_text())
    assert len(found["runs"]) == 10
    assert all(len(run["reward"]) == 2 for run in found["runs"])
    churn = [row["churn"] for row in found["churn"]]
    assert churn == sorted(churn)
    assert 0 <= churn[0] < churn[-1] < 1
    gspo, grpo = found["weights"]["GSPO"], found["weights"]["GRPO"]
    assert len(gspo) == len(grpo) > 20
    assert all(0.5 < weight < 2 for weight in gspo + grpo if weight)
    assert compare.main(arguments) == 0
    assert capsys.readouterr().out.count("done before") == 10


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "1", "1"], "--seeds: at least two different ones"),
        (["--jobs", "0"], "--jobs: at least 1"),
        (["update.learning_rate=1e-4"], "update.learning_rate: --rates has those"),
        (["rollout.promts=4"], "did you mean rollout.prompts"),
        (["--rates", "-1"], "--rates: expected positive numbers, got [-1.0]"),
    ],
)
def test_bad_arguments(arguments, says, capsys, monkeypatch):
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("it began"))
    assert compare.main(arguments) == 2
    assert says in capsys.readouterr().err
