"""What the commands print around their results: examples in the help, and what to do next."""

import re
from types import SimpleNamespace

import pytest
import torch

from gspo_ops import cli, testing
from gspo_ops.benchmarks import bench
from gspo_ops.environment import ISSUES, provenance
from gspo_ops.testing import BOUNDS, Measured
from gspo_ops.trainer.progress import CannotWrite, Diverged, Interrupted

COMMANDS = ("verify", "bench", "env", "train", "plot", "sample", "compare")


def help_of(*command):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0


def test_results_need_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] == ""


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sample", "run", "--problems", "0"], "--problems: expected at least 1, got 0"),
        (["sample", "run", "--responses", "-1"], "--responses: expected at least 1, got -1"),
        (["sample", "run", "--temperature", "-1"], "--temperature: expected 0 or a finite number"),
        (["sample", "run", "--temperature", "nan"], "--temperature: expected 0 or a finite number"),
        (["sample", "run", "--seed", "-1"], "--seed: expected an integer from 0 to below"),
        (["sample", "run", "1 + 1 =", " "], "QUESTION: expected texts that are not empty, got"),
        (["plot", "run", "--out", "x.txt"], "--out: expected a picture's name, such as runs.png"),
        (["plot", "run", "--out", "both"], "--out: expected a picture's name, such as runs.png"),
        (["verify", "--device", "abacus"], "--device: expected 'cpu' or a GPU of this machine"),
        (["verify", "--device", "cuda:99"], "--device: expected 'cpu' or a GPU of this machine"),
        (["verify", "--device", "meta"], "--device: expected 'cpu' or a GPU of this machine"),
        (["verify", "--model", "no/such"], "--model: expected a local model directory"),
    ],
)
def test_bad_arguments(arguments, says, capsys):
    if {"plot", "--model"} & {*arguments}:
        pytest.importorskip("transformers")
        pytest.importorskip("matplotlib")
    try:
        status = cli.main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"gspo-ops {arguments[0]}: error: ")
    assert says in error


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
        ("cpu", "not installed", "pip install '.[bench]'"),
        ("cuda", "not installed", "pip install '.[bench]'"),
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


def test_sample_says_that_a_model_is_broken(monkeypatch, capsys):
    loop = pytest.importorskip("gspo_ops.trainer.loop")

    def answers(*_):
        raise Diverged("logits are not finite")

    model = SimpleNamespace(device="cpu")
    sampler = SimpleNamespace(answers=answers, model=model)
    monkeypatch.setattr(loop, "trained", lambda run: sampler)
    assert cli.main(["sample", "run", "1 + 1 ="]) == 2
    assert capsys.readouterr().err == "gspo-ops sample: error: logits are not finite\n"
