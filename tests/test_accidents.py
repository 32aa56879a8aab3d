"""The accidents of docs/accidents.md: each one prints the table's message and loses nothing.

test_trainer_runs.py has twenty kills at random instants, and every damage to every file of a
checkpoint; test_trainer_ranks.py has accidents of one process among several.
"""

import random
import re
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from gspo_ops.trainer import COMMANDS

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")

from gspo_ops.trainer import checkpoint
from gspo_ops.trainer.loop import Trainer
from gspo_ops.trainer.model import load_model
from gspo_ops.trainer.report import RunFiles, read_metrics

DOCUMENT = Path(__file__).parent.parent / "docs/accidents.md"
STEPS, ACCIDENT = 4, 3  # the step in which it happens
REWARD = """\
import time

def score(response, problem):
    return (ord(response[0]) % 7) / 7 if response else 0.0
"""
# Drops the capabilities of root, to which nothing is read-only.
NOT_ROOT = """\
import ctypes, os
if os.geteuid() == 0:
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0
"""


def table():
    """Return each accident's message and what survives it."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", DOCUMENT.read_text(), re.M)[1:]
    return {name: (message, survives) for name, message, survives in rows}


def matches(message, line):
    """Match a line against a message, where `...` stands for anything."""
    parts = message.strip("`").split("...")
    return re.fullmatch(".*".join(map(re.escape, parts)), line)


# Runs


class Run:
    """A run as a user starts it: in this process, or in one of its own."""

    def __init__(self, directory, folder, tmp_path, forked, patch, capsys):
        self.directory, self.folder, self.forked = directory, folder, forked
        self.patch, self.capsys = patch, capsys
        self.out = tmp_path / "run"
        self.printed = ""

    def arguments(self, *more):
        return [
            f"model.name={self.directory}", f"out={self.out}", f"steps={STEPS}",
            "rollout.prompts=4", "rollout.group_size=4", "rollout.max_new_tokens=4",
            "update.mini_batches=2", "update.learning_rate=1e-3", "update.max_bad_updates=1",
            "task.train_size=20", "task.eval_size=8", "task.examples=0", "evaluation.samples=1",
            "task.reward=some_reward:score", "checkpoint.every=1", "device=cpu", *more,
        ]  # fmt: skip

    def train(self, *more):
        """Train in this process; return the exit status and what was written to stderr."""
        self.capsys.readouterr()
        status = COMMANDS["train"](self.arguments(*more))
        self.printed, error = self.capsys.readouterr()
        return status, error

    def start(self, *more, before="", reward=""):
        """Train in a new process; `reward` is the function's body from the accident's step on."""
        command = ["train", *self.arguments(*more)]
        return self.forked(
            f"import sys, threading, time\nsys.path.insert(0, {str(self.folder)!r})\n{before}\n"
            "import some_reward\nfrom gspo_ops.trainer.loop import Trainer\n"
            "score, step = some_reward.score, Trainer.step\n"
            f"def other(r, p): {reward or 'return score(r, p)'}\n"
            "def changed(self):\n"
            f" if self.progress.step == {ACCIDENT - 1}:\n"
            "  self.sampler.task = self.sampler.task.__class__(\n"
            "   **vars(self.sampler.task) | {'reward': other})\n"
            " return step(self)\n"
            "Trainer.step = changed\n"
            f"from gspo_ops.cli import main; sys.exit(main({command!r}))"
        )

    def in_step(self, action):
        """Call action(trainer) before the accident's step."""
        step = Trainer.step

        def changed(trainer):
            if trainer.progress.step == ACCIDENT - 1:
                action(trainer)
            return step(trainer)

        self.patch.setattr(Trainer, "step", changed)

    def checkpoints(self):
        return sorted(path.name for path in self.out.glob("checkpoints/*"))

    def wait_for(self, process, checkpoint):
        while process.status() is None and checkpoint not in self.checkpoints():
            time.sleep(0.001)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward")
    (path / "some_reward.py").write_text(REWARD)
    return path


@pytest.fixture
def run(directory, folder, tmp_path, forked, monkeypatch, capsys):
    sys.modules.pop("some_reward", None)
    monkeypatch.syspath_prepend(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        yield Run(directory, folder, tmp_path, forked, patch, capsys)


@pytest.fixture(scope="session")
def whole(directory, folder, tmp_path_factory, forked):
    """Return what a run without accidents leaves."""
    run = Run(directory, folder, tmp_path_factory.mktemp("whole"), forked, None, None)
    status, error = run.start().wait()
    assert status == 0, error
    return contents(run.out)


def contents(out):
    """Return what a run leaves, as far as it is the same each time."""
    rows = [{k: v for k, v in x.items() if not k.endswith("_s")} for x in read_metrics(out)]
    samples, model = out / "samples.jsonl", out / "model/model.safetensors"
    return rows, samples.read_bytes(), model.read_bytes()


# Accidents, by their names in the table: exit status, and what is on stderr


ACCIDENTS = {}


def accident(name, *, goes_on=True):
    """Register an accident; with `goes_on`, --resume must then end like a run without accidents."""

    def register(function):
        ACCIDENTS[name] = function, goes_on
        return function

    return register


@accident("SIGTERM or Ctrl-C")
def signals(run):
    process = run.start()
    run.wait_for(process, "step-000001")
    process.kill(signal.SIGTERM)
    status, error = process.wait()
    assert status == 130
    return error


@accident("`kill -9`, or the machine loses power")
def kills(run):
    chance = random.Random(1)
    for step in (1, 2):
        process = run.start("--resume", reward="time.sleep(0.05); return score(r, p)")
        run.wait_for(process, f"step-00000{step}")
        time.sleep(chance.uniform(0, 0.1))
        process.kill(signal.SIGKILL)
        status, _ = process.wait()
        assert status == -signal.SIGKILL
    return ""


def limit(size):
    """Limit the size of files, beyond which a write fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture(autouse=True)
def no_limit():
    yield
    limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])


@accident("the disk is full when a checkpoint is written")
def full_at_checkpoint(run):
    run.in_step(lambda trainer: limit(20_000))
    status, error = run.train()
    assert status == 1
    assert "checkpoints/step-000003: File too large." in error
    assert run.checkpoints() == ["step-000001", "step-000002"]
    return error


@accident("the disk is full when metrics are written")
def full_at_metrics(run):
    append = RunFiles.append

    def changed(files, row, samples):
        if row["step"] == ACCIDENT:
            files._metrics.write('{"step": 3, "rew')
            files._metrics.close()
            files._metrics = Path("/dev/full").open("w")  # noqa: SIM115
        append(files, row, samples)

    run.patch.setattr(RunFiles, "append", changed)
    status, error = run.train()
    assert status == 1
    assert f"can't write {run.out}: No space left on device." in error
    assert run.checkpoints() == ["step-000001", "step-000002"]
    return error


@accident("the disk is full when the model is written")
def full_at_model(run):
    save = Trainer._save_model

    def changed(trainer):
        limit(20_000)
        save(trainer)

    run.patch.setattr(Trainer, "_save_model", changed)
    status, error = run.train()
    assert status == 1
    assert "run/model: " in error
    assert not list(run.out.glob("model*"))
    assert (run.out / "summary.json").exists()
    return error


@accident("`out` is a file", goes_on=False)
def out_is_a_file(run):
    run.out.write_text("precious")
    status, error = run.train()
    assert (status, run.out.read_text()) == (2, "precious")
    assert run.train("--resume")[0] == 2
    return error


@accident("`out` has files but no run", goes_on=False)
def other_files(run):
    notes = run.out / "notes/precious.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("precious")
    for more in ([], ["--resume"]):
        status, error = run.train(*more)
        assert status == 2
        assert list(run.out.parent.rglob("*.*")) == [notes]
    return error


@accident("the directory of `out` is read-only", goes_on=False)
def read_only(run):
    run.out.parent.chmod(0o555)
    try:
        status, error = run.start(before=NOT_ROOT).wait()
    finally:
        run.out.parent.chmod(0o755)
    assert status == 2
    assert not run.out.exists()
    run.out /= "not/there/yet"
    assert run.train("steps=1")[0] == 0
    return error


@accident("a second run with the same `out`")
def second_run(run):
    process = run.start(reward="threading.Event().wait()")
    run.wait_for(process, "step-000002")

    def state():
        return {path: path.stat().st_mtime_ns for path in run.out.parent.rglob("*")}

    before = state()
    try:
        for more in ([], ["--resume"]):
            status, error = run.train(*more)
            assert status == 2
            assert f"in {run.out} (process {process.process.pid})" in error
        assert state() == before
    finally:
        process.kill(signal.SIGKILL)
        process.wait()
    return error


@accident("the last checkpoint is damaged")
def damaged(run):
    assert run.train("steps=3")[0] == 0
    (run.out / "checkpoints/step-000003/state.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-000003 is damaged") as warned:
        assert run.train("--resume")[0] == 0
    assert "resumed after step 2" in run.printed
    (message,) = [str(x.message) for x in warned if "damaged" in str(x.message)]
    return message


@accident("all checkpoints are lost")
def no_checkpoint(run):
    assert run.train("steps=2")[0] == 0
    for state in run.out.glob("checkpoints/*/state.pt"):
        state.unlink()
    with pytest.warns(UserWarning, match="is damaged"):
        assert run.train("--resume")[0] == 0
    assert len(read_metrics(Path(f"{run.out}-1"))) == 2
    return run.printed.splitlines()[0]


@accident("the last line of the metrics is torn")
def torn(run):
    assert run.train("steps=2")[0] == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run.out / name).open("a") as file:
            file.write('{"step": 3, "rew')
    assert len(read_metrics(run.out)) == 2
    return ""


@accident("metrics from before the checkpoint are lost", goes_on=False)
def shortened(run):
    assert run.train("steps=2")[0] == 0
    metrics = run.out / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-9])
    status, error = run.train("--resume")
    assert status == 2
    assert "remove the checkpoints after step 1," in error
    assert run.checkpoints() == ["step-000001", "step-000002"]
    # follow the advice
    for path in (run.out / "checkpoints/step-000002").rglob("*.*"):
        path.unlink()
    with pytest.warns(UserWarning, match="is damaged"):
        assert run.train("--resume")[0] == 0
    assert len(read_metrics(run.out)) == STEPS
    return error


def with_reward(run, reward):
    def change(trainer):
        task = trainer.sampler.task
        trainer.sampler.task = task.__class__(**vars(task) | {"reward": reward})

    run.in_step(change)
    status, error = run.train()
    assert status == 2
    assert "'some_reward:score'" in error
    assert "task 'digit_sums'" in error
    return error


@accident("a reward is NaN")
def reward_nan(run):
    return with_reward(run, lambda response, problem: float("nan"))


@accident("a reward is None")
def reward_none(run):
    return with_reward(run, lambda response, problem: None)


@accident("a reward raises")
def reward_raises(run):
    error = with_reward(run, lambda response, problem: {}["key"])
    assert "raised KeyError: 'key' (" in error
    assert "test_accidents.py:" in error
    return error


@accident("a reward hangs")
def reward_hangs(run):
    process = run.start("task.reward_seconds=0.2", reward="threading.Event().wait()")
    status, error = process.wait()
    assert status == 2
    return error


def with_loss(run, change):
    def poison(trainer):
        loss = trainer.learner.loss
        trainer.learner.loss = lambda *args: change(loss(*args))

    run.in_step(poison)
    status, error = run.train()
    assert status == 1
    return error


@accident("the loss is NaN")
def loss_nan(run):
    return with_loss(run, lambda found: found._replace(loss=found.loss * float("nan")))


@accident("the gradient is NaN")
def gradient_nan(run):
    def change(found):
        found.loss.register_hook(lambda grad: grad * float("nan"))
        return found

    return with_loss(run, change)


@accident("the logits are NaN")
def logits_nan(run):
    @torch.no_grad()
    def poison(trainer):
        trainer.model.get_output_embeddings().weight.fill_(float("nan"))

    run.in_step(poison)
    status, error = run.train()
    assert status == 1
    return error


@accident("the loaded model has NaN among its weights", goes_on=False)
def model_nan(run):
    model, tokenizer = load_model(str(run.directory))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    run.directory = run.out.parent / "broken"
    model.save_pretrained(run.directory)
    tokenizer.save_pretrained(run.directory)
    status, error = run.train()
    assert status == 2
    assert "model.layers.1.mlp.up_proj.weight" in error
    assert not run.out.exists()
    return error


@pytest.mark.parametrize("name", ACCIDENTS)
def test_accident(run, whole, name):
    cause, goes_on = ACCIDENTS[name]
    error = cause(run)
    message = table()[name][0]
    said = [x.removeprefix("error: ") for x in re.findall("^gspo-ops train: (.*)$", error, re.M)]
    if message == "none":
        assert said == []
    else:
        (line,) = said or [error]
        assert matches(message, line), (message, line)
    assert "Traceback" not in error
    if goes_on:
        limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        run.patch.undo()
        assert checkpoint.last_whole(run.out / "checkpoints") is not None
        status, error = run.train("--resume")
        assert status == 0, error
        assert "resumed after step" in run.printed
        assert contents(run.out) == whole
        assert not (run.out / "lock").exists()


def test_the_table_and_the_accidents_agree():
    assert list(table()) == list(ACCIDENTS)
