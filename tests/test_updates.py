"""`gspo-ops bench --path model` measures equal updates, tested on a small random model."""

import importlib.util
import json

import pytest
import torch
from test_models import V, make

from gspo_ops.benchmarks import bench, left_out, report, updates
from gspo_ops.integrations.transformers import log_probs_from_model

CPU = torch.device("cpu")
OURS = ["GSPOTrainer"] * (importlib.util.find_spec("trl") is not None) + ["reference trainer"]


@pytest.fixture(scope="module")
def data():
    pytest.importorskip("reasoning_gym")
    model = make("LlamaForCausalLM").eval()
    ids = torch.randint(2, V - 10, (10, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_probs = log_probs_from_model(model, {"input_ids": ids}, 6)
    return updates.Sampled(model, ids, 5, log_probs)


@pytest.fixture(scope="module")
def rows(data, tmp_path_factory):
    cases = [updates.make_case(data, dead, f) for dead in updates.DEAD for f in (1.0, 0.3)]
    return updates.measure(data, cases, str(tmp_path_factory.mktemp("trl")), 2)


def test_everybody_makes_the_same_update(rows):
    assert [(row["dead"], row["f"], row["live"]) for row in rows] == [
        (dead, f, live) for dead in updates.DEAD for f, live in ((1.0, 10), (0.3, 3))
    ]  # fmt: skip
    for row in rows:
        assert set(OURS) < row["contenders"].keys()
        for name, of in row["contenders"].items():
            assert of["gradient"] < 1e-4, name
            assert len(of["seconds"]) == 2


@pytest.mark.parametrize("dead", updates.DEAD)
def test_a_case_is_what_it_says(data, dead):
    for f in (1.0, 0.5, 0.1):
        case = updates.make_case(data, dead, f)
        ratio = (data.log_probs - case.old_log_probs).mean(1).exp()
        is_clipped = torch.where(case.advantages > 0, ratio > 1 + 4e-4, ratio < 1 - 3e-4)
        is_live = (case.advantages != 0) & ~is_clipped
        assert is_live.sum() == round(10 * f)
        assert is_clipped.any() == (dead == "clipped" and f < 1)


def test_weights_stay_as_they_are(data, tmp_path):
    contender = updates.of_reference_trainer(data)
    (group,) = contender.optimizer.param_groups
    before = [p.detach().clone() for p in group["params"]]
    contender.update(updates.make_case(data, "clipped", 0.5))()
    assert all(map(torch.equal, before, group["params"]))


def test_table_picture_and_command(data, rows, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(updates, "sampled", lambda name: data)
    monkeypatch.setattr(updates, "measure", lambda *_: rows)
    out, plot = tmp_path / "found.json", tmp_path / "found.png"
    assert bench.main(["--path", "model", "--out", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in OURS)
    text = report.render(json.loads(out.read_text()))
    assert "| clipped | reference trainer | 0.3 | " in text
    assert plot.stat().st_size > 10_000
    with pytest.raises(SystemExit):
        bench.main(["--path", "model", "logits"])
    assert "--path model cannot be combined" in capsys.readouterr().err
    for name, value in (
        ("shape", "16,40"),
        ("dtype", "float16"),
        ("lengths", "ragged"),
        ("against", "TRL"),
    ):
        with pytest.raises(SystemExit):
            bench.main(["--path", "model", f"--{name}", value])
        assert f"--{name} has no effect with --path model" in capsys.readouterr().err


def test_what_the_demo_saves(tmp_path):
    def run(seconds):
        series = {name: [0.5, 0.25] for name in left_out.SERIES}
        summary = {"before": 0.1, "before_se": 0.01, "after": 0.5, "after_se": 0.02}
        return series | {"update_s": seconds, "old_log_probs_s": [1.0, 1.0], "summary": summary}

    runs = {"left out": [run([1.0, 2.0])], "computed": [run([3.0, 2.5])]}
    assert left_out.saved(runs) == [2.0, 0.5]
    table = "\n".join(report.left_out_table({"seeds": [0], "runs": runs}))
    assert "| left out | 0.100 ± 0.010 | 0.500 ± 0.020 | 2 | 3 |" in table
    assert "saves 2.0 s in the first step, 0.5 s in the last one and 2 s in the whole" in table
    left_out.draw({"runs": runs}, tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 10_000
