"""The files of a run: standard JSON, repair, the order of checkpoints, one run at a time."""

import json
import math
import os
import signal
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from gspo_ops.trainer import checkpoint
from gspo_ops.trainer.config import load_config
from gspo_ops.trainer.files import Lock, numbers_of, to_json, write, writing
from gspo_ops.trainer.progress import CannotWrite, stop_signals
from gspo_ops.trainer.ranks import Ranks
from gspo_ops.trainer.report import RunFiles, Summary, plot, read_metrics

NAN, INF = math.nan, math.inf


def strict(text):
    """Read JSON as a reader does that keeps to the standard."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# JSON


def test_no_nan_is_written_and_it_is_read_back(tmp_path):
    config = load_config(None, [f"out={tmp_path}"])  # its time limit is infinite
    with RunFiles.create(config) as files:
        for step in (1, 2, 3):
            row = {"step": step, "reward": NAN, "ratio_min": INF, "ratio_max": -INF, "loss": 0.5}
            files.append(row, [{"rewards": [NAN, 1.0], "response": "NaN"}])
        accuracies = torch.full((4, 1), NAN)
        files.finish(Summary.of(accuracies, accuracies, seconds=1.0))
    for name in ("metrics.jsonl", "samples.jsonl"):
        for line in (tmp_path / name).read_text().splitlines():
            assert strict(line)["step"]
    assert strict((tmp_path / "config.json").read_text())["time_limit"] is None
    assert math.isnan(numbers_of((tmp_path / "summary.json").read_text())["gain"])
    assert strict((tmp_path / "summary.json").read_text())["gain"] is None
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isnan(row[name]) for row in rows for name in ("reward", "ratio_min"))
    assert rows[0]["loss"] == 0.5


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0])
def test_such_metrics_can_be_drawn(tmp_path, value):
    names = ("reward", "ratio_min", "ratio_max", "ratio_mean", "clip_frac_tokens")
    rows = [{"step": i} | dict.fromkeys(names, value if i == 2 else 0.5) for i in (1, 2, 3)]
    plot({"a": rows}, tmp_path / "one.png")
    plot({"a": rows, "b": [rows[1]]}, tmp_path / "two.png")
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_of():
    assert strict(to_json({"a": (1, [INF]), "b": {"c": NAN}, "d": "NaN"})) == {
        "a": [1, [None]], "b": {"c": None}, "d": "NaN",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"expected an object, got '\[1\]'"):
        numbers_of("[1]")


# Repair


@pytest.fixture
def run(tmp_path):
    """Write three steps that a checkpoint knows, and a fourth."""
    config = load_config(None, [f"out={tmp_path}"])
    with RunFiles.create(config) as files:
        for step in (1, 2, 3, 4):
            files.append({"step": step, "x": step / 3}, [{"response": "a\n"}, {"response": "b"}])
            if step == 3:
                state = files.state_dict()
    metrics, samples = tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"
    good = [b"".join(path.read_bytes().splitlines(True)[:n]) for path, n in
            ((metrics, 3), (samples, 6))]  # fmt: skip

    def reopen():
        with RunFiles.reopen(config, state, 3) as files:
            assert [row["x"] for row in files.rows] == [1 / 3, 2 / 3, 1]
            files.append({"step": 4, "x": 0.0}, [])
        return metrics.read_bytes().startswith(good[0]), samples.read_bytes() == good[1]

    return reopen, metrics, samples, good


def test_what_came_later_is_done_again(run):
    reopen, metrics, _, good = run
    assert reopen() == (True, True)
    assert len(metrics.read_bytes().splitlines()) == 4
    assert good[0].count(b"\n") == 3


@pytest.mark.parametrize("cut", [1, 5])
def test_a_torn_last_line_that_the_checkpoint_does_not_know(run, cut):
    reopen, metrics, samples, _ = run
    for path in (metrics, samples):
        path.write_bytes(path.read_bytes()[:-cut])
    assert [row["step"] for row in read_metrics(metrics.parent)] == [1, 2, 3, 4][: 4 - (cut > 1)]
    assert reopen() == (True, True)


def test_a_lost_end_of_line_is_put_back(run):
    reopen, metrics, _, good = run
    metrics.write_bytes(good[0][:-1])
    assert reopen() == (True, True)


def test_lost_samples_are_no_error(run):
    reopen, _, samples, good = run
    samples.write_bytes(good[1][:-2])
    with pytest.warns(UserWarning, match=r"samples\.jsonl is shorter than before"):
        assert reopen() == (True, False)
    assert all(strict(line) for line in samples.read_text().splitlines())
    samples.unlink()
    with pytest.warns(UserWarning, match=r"samples\.jsonl is shorter than before"):
        reopen()


@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "zeros", "middle"])
def test_lost_metrics_are_an_error_that_says_what_to_do(run, damage):
    reopen, metrics, _, good = run
    lines = good[0].splitlines(True)
    metrics.write_bytes({
        "cut": good[0][:-3], "gone": b"", "empty": b"", "zeros": b"".join(lines[:2]) + bytes(50),
        "middle": lines[0] + b"{\n" + lines[2],
    }[damage])  # fmt: skip
    if damage == "gone":
        metrics.unlink()
    after = {"cut": 2, "zeros": 2, "middle": 1}.get(damage, 0)
    before = metrics.read_bytes() if metrics.exists() else None
    message = (
        rf"metrics\.jsonl: the metrics of step {after + 1} are damaged or lost, but the checkpoint "
        rf"is from step 3\. Restore the file; or remove the checkpoints after step {after}, "
    )
    with pytest.raises(ValueError, match=message):
        reopen()
    assert (metrics.read_bytes() if metrics.exists() else None) == before


def test_damaged_metrics_are_not_drawn(run):
    _, metrics, _, good = run
    metrics.write_bytes(good[0].replace(b"{", b"", 1))
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 is damaged$"):
        read_metrics(metrics.parent)
    metrics.write_bytes(b'{"step"')
    with pytest.raises(ValueError, match="no step was finished"):
        read_metrics(metrics.parent)


# Checkpoints


def save(folder, step, keep=2):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"step": step}
    checkpoint.save(folder, step, state, model, optimizer, Ranks(torch.device("cpu")), keep=keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save(tmp_path, step)
        assert checkpoint.last_whole(tmp_path).name == f"step-{step:06d}"
    assert names(tmp_path) == ["step-1000000", "step-1000001"]


def test_damaged_later_ones_do_not_count(tmp_path):
    """The last whole checkpoints stay, however many damaged ones there are after them."""
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    for step in (20, 30):
        (tmp_path / f"step-{step:06d}/state.pt").unlink()
    save(tmp_path, 15)
    assert names(tmp_path) == ["step-000010", "step-000015"]


@pytest.mark.parametrize("at", range(7))
def test_what_can_not_be_flushed_is_not_there(tmp_path, monkeypatch, at):
    save(tmp_path, 1)
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == at + 1:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CannotWrite, match=r"^can't write .*step-000002: No space left on dev"):
            save(tmp_path, 2)
    # the last flush is that of the rename, after which everything is in place
    assert names(tmp_path) == ["step-000001"] + ["step-000002"] * (at == 6)
    save(tmp_path, 3)
    assert checkpoint.last_whole(tmp_path).name == "step-000003"


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write(path, "old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "write_text", full)
        with pytest.raises(CannotWrite, match=r"^can't write .*a\.json: No space left on device$"):
            write(path, "new")
    assert path.read_text() == "old"
    with pytest.raises(ZeroDivisionError), writing(path):
        _ = 1 / 0


# One run at a time


def test_a_lock(forked, tmp_path):
    out, ready = tmp_path / "new" / "run", tmp_path / "ready"
    with Lock(out):
        assert names(out) == ["lock"]
        code = (
            f"from pathlib import Path; from gspo_ops.trainer.files import Lock\nout={str(out)!r}\n"
        )
        status, error = forked(code + "Lock(Path(out))").wait()
        assert status == 1
        assert f"a run is going on in {out} (process {os.getpid()})" in error
    assert names(out) == []
    holder = forked(
        code + f"lock = Lock(Path(out)); Path({str(ready)!r}).touch()\nimport time; time.sleep(60)"
    )
    while holder.status() is None and not ready.exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match=rf"\(process {holder.process.pid}\)"):
        Lock(out)
    holder.kill(signal.SIGKILL)
    holder.wait()
    with Lock(out) as lock:
        (out / "some").touch()
        with pytest.raises(ValueError, match=r"^out: .* has files, but none of a run \(met"):
            lock.move_aside()
        (out / "metrics.jsonl").touch()
        assert lock.move_aside() == tmp_path / "new" / "run-1"
        assert names(out) == ["lock"]
        assert lock.move_aside() is None
        assert forked(code + "Lock(Path(out))").wait()[0] == 1
    assert names(tmp_path / "new" / "run-1") == ["metrics.jsonl", "some"]


def test_what_a_run_leaves_at_any_instant_is_that_of_a_run(tmp_path, monkeypatch):
    """A run that is killed while it creates its files can be started again."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch, Lock(out):
        patch.setattr("gspo_ops.trainer.report.write", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            RunFiles.create(load_config(None, [f"out={out}"]))
    with Lock(out) as lock:
        assert lock.move_aside() == tmp_path / "run-1"


SIGNALS = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_signal_of_either_kind_ends_the_process(first, second):
    def end(*_):
        raise KeyboardInterrupt

    before = [signal.signal(number, end) for number in SIGNALS]
    try:
        with stop_signals(twice=True) as stopped:
            signal.raise_signal(first)
            assert stopped()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(second)
        with stop_signals(twice=False) as stopped:
            for number in (first, second):
                signal.raise_signal(number)
            assert stopped()
        assert all(signal.getsignal(number) is end for number in SIGNALS)
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_a_lock_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    for out, why in ((tmp_path / "file", "File exists"), (tmp_path / "file/x", "Not a directory")):
        with pytest.raises(ValueError, match=f"^out: can't write to {out}: {why}$"):
            Lock(out)
