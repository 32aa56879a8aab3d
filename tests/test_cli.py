"""What the commands print around their results: examples in the help, and what to do next."""

import re
from types import SimpleNamespace

import pytest
import torch

from gspo_ops import cli, testing
from gspo_ops.benchmarks import bench
from gspo_ops.environment import ISSUES
from gspo_ops.testing import BOUNDS, Measured
from gspo_ops.trainer.progress import CannotWrite, Diverged, Interrupted

COMMANDS = ("verify", "bench", "env", "train", "plot", "sample", "compare")


def help_of(*command):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    help_of(command)
    usage, _, examples = re.split(r"(examples?:)", capsys.readouterr().out)
    assert f"gspo-ops {command}" in examples
    options = set(re.findall(r"--[a-z][a-z-]+", examples)) - {"--nproc-per-node", "--no-python"}
    assert all(option in usage for option in options), options


def test_help_lists_every_command(capsys):
    help_of()
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {name} ", text, re.M) for name in COMMANDS)
    assert "examples:" in text


def next_line(capsys):
    """Return the last line that was printed, the only one that says what to do next."""
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("next: ") for line in lines] == [False] * (len(lines) - 1) + [True]
    assert len(lines[-1]) <= 100
    return lines[-1]


@pytest.mark.parametrize(("error", "status", "after"), [(0.5, 0, "gspo-ops bench"), (2, 1, ISSUES)])
def test_verify_ends_with_what_to_do_next(error, status, after, monkeypatch, capsys):
    value = error * BOUNDS["log_prob"]
    measured = Measured("log_probs_from_logits", torch.float32, "a case", "log_prob", value)
    monkeypatch.setattr(testing, "verify", lambda *_, **__: [measured])
    assert cli.main(["verify", "--device", "cpu"]) == status
    assert after in next_line(capsys)


@pytest.mark.parametrize(
    ("device", "missing", "after"),
    [
        ("cpu", "not installed", "gspo-ops[bench]"),
        ("cuda", "not installed", "gspo-ops[bench]"),
        ("cuda", "needs sm_90", "make gpu"),
        ("cpu", "needs a GPU", "docs/integrations.md"),
    ],
)
def test_what_to_do_after_a_benchmark(device, missing, after, monkeypatch):
    monkeypatch.setattr(bench, "default_device", lambda: torch.device(device))
    row = {"providers": {"eager": {"extra_bytes": None}, "a peer": {"missing": missing}}}
    assert after in bench.next_step([row])


def test_bench_ends_with_it(capsys):
    options = ["--path", "logits", "--shape", "16,40", "--dtype", "float32", "--f", "1"]
    assert cli.main(["bench", *options, "--rounds", "1", "--against", "eager"]) == 0
    assert next_line(capsys)


# gspo-ops train


def train(monkeypatch, outcome, *overrides):
    """Return the exit status of a run that does nothing but end with this outcome."""
    loop = pytest.importorskip("gspo_ops.trainer.loop")

    def run(resume):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    trainer = SimpleNamespace(run=run, ranks=SimpleNamespace(is_first=True))
    monkeypatch.setattr(loop.Trainer, "of", lambda config: trainer)
    return cli.main(["train", "out=a run", *overrides])


@pytest.mark.parametrize(
    ("kept", "after"), [("true", "sample 'a run' "), ("false", "plot 'a run' ")]
)
def test_train_ends_with_what_to_do_next(kept, after, monkeypatch, capsys):
    assert train(monkeypatch, "the summary", f"checkpoint.save_model={kept}") == 0
    assert after in next_line(capsys)


@pytest.mark.parametrize(
    "ended", [Interrupted("stopped"), Diverged("not finite"), CannotWrite("full")]
)
def test_train_says_how_to_go_on_after_an_early_end(ended, monkeypatch, capsys):
    assert train(monkeypatch, ended) != 0
    line = next_line(capsys)
    assert "the same command with --resume" in line
    assert ("learning_rate" in line) == isinstance(ended, Diverged)
