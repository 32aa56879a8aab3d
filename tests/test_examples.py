"""The examples run as a reader runs them, and what they print is true."""

import ast
import contextlib
import importlib.util
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_ops.integrations import verl as verl_integration

pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?"


def run(name):
    """Run an example in this process as `python examples/NAME.py`; return its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    print(out.getvalue())
    return out.getvalue()


def numbers(output, before):
    """Return the numbers that follow these words, in order."""
    found = [float(x) for x in re.findall(rf"{re.escape(before)} ({NUMBER})", output)]
    assert found, f"no number after {before!r} in {output}"
    return found


def assert_learns(output):
    rewards = numbers(output, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


def test_from_logits():
    output = run("from_logits")
    assert_learns(output)
    assert set(numbers(output, "first ratio")) == {1.0}
    assert set(numbers(output, "clipped")) == {0.0}
    assert max(numbers(output, "then")) > 0


def test_from_hidden_states():
    output = run("from_hidden_states")
    assert_learns(output)
    assert set(numbers(output, "ratio")) == {1.0}
    assert output.splitlines()[-1].startswith("keep: ")


def test_packed():
    output = run("packed")
    (padded,), (packed,) = numbers(output, "rows:"), numbers(output, "padded,")[:1]
    assert packed < padded / 2
    (loss,) = numbers(output, "loss:")
    assert loss != 0
    assert numbers(output, "padded,")[1] == pytest.approx(loss, abs=2e-6)
    assert 0 < numbers(output, "gradients differ by")[0] <= 1e-5


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="needs trl: pip install 'gspo-ops[trl]'"
)
@pytest.mark.filterwarnings("ignore")
def test_trl_gspo():
    output = run("trl_gspo")
    assert_learns(output)
    assert min(numbers(output, "rows with a gradient")) < 1


def test_verl_settings(capsys):
    settings = dict(line.split("=") for line in run("verl_settings").splitlines())
    checked = capsys.readouterr().err
    assert 0 < numbers(checked, "actor/pg_clipfrac")[0] < 1
    assert max(numbers(checked, "off by") + numbers(checked, "gradient by")) <= 5e-6
    # settings use the name that the integration registers, and keys that its document lists
    document = (ROOT / "docs/integrations.md").read_text()
    short = [key.rpartition(".")[2] for key in settings if key != "algorithm.adv_estimator"]
    assert all(f"{key}`" in document or f"{key}=" in document for key in short), short
    assert settings["actor_rollout_ref.actor.policy_loss.loss_mode"] == verl_integration.NAME
    backend = settings["actor_rollout_ref.model.fused_kernel_options.impl_backend"]
    assert backend == verl_integration.NAME
    assert settings["actor_rollout_ref.model.external_lib"] == "verl_settings"


def test_verl_settings_register_where_a_worker_imports_them(monkeypatch):
    called = []
    for name in ("register", "skip_zero_advantages"):
        monkeypatch.setattr(verl_integration, name, lambda name=name: called.append(name))
    runpy.run_path(str(EXAMPLES / "verl_settings.py"), run_name="verl_settings")
    assert called == ["register", "skip_zero_advantages"]


def test_moe_routing_replay():
    output = run("moe_routing_replay")
    low, high = numbers(output, "ratios"), numbers(output, "to")
    assert (low[0], high[0]) == (1.0, 1.0)
    assert low[-1] < 1 < high[-1]
    moved = re.findall(rf"({NUMBER})% of the experts", output)
    assert float(moved[-1]) > 0
    replayed, native = numbers(output, "a log-prob")[-1], numbers(output, "replay,")[-1]
    assert replayed < native / 2


def test_fsdp2():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*command, EXAMPLES / "fsdp2.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert numbers(done.stdout, "gradient off by")[0] <= 1e-5
    losses = numbers(done.stdout, "loss")
    assert losses[-1] < losses[0]


def test_own_objective():
    output = run("own_objective")
    (loss,), (plain,) = numbers(output, "loss"), numbers(output, "in plain PyTorch")
    assert loss == pytest.approx(plain, abs=3e-6)  # both are rounded to six decimals
    assert 0 < numbers(output, "gradient off by")[0] <= 1e-6
    assert 0 < numbers(output, "clipped sequences")[0] < 1


def test_check_your_loss():
    lines = run("check_your_loss").splitlines()
    verdicts = {line[:26].strip(): line.split()[-1] for line in lines}
    assert verdicts.pop("your loss") == "right"
    assert len(verdicts) == 5
    assert set(verdicts.values()) == {"WRONG"}


# What they have in common


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_short_says_how_to_run_it_and_is_listed(path):
    text = path.read_text()
    assert text.count("\n") < 80
    doc = text.split('"""')[1]
    assert f"examples/{path.name}" in doc
    assert f"| [{path.name}]({path.name}) |" in (EXAMPLES / "README.md").read_text()
    assert f"test_{path.stem}" in globals()


PUBLIC_MODULES = {
    "gspo_ops", "gspo_ops.integrations", "gspo_ops.integrations.transformers",
    "gspo_ops.integrations.trl", "gspo_ops.testing", "gspo_ops.trainer.routing_replay",
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_uses_public_names(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("gspo_ops"):
            assert node.module in PUBLIC_MODULES
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]
    private = [x.attr for x in nodes if isinstance(x, ast.Attribute) and x.attr.startswith("_")]
    assert not private
