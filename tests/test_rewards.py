"""Rewards: what counts as one, how long it may take, and several at once."""

import json
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("reasoning_gym")

from gspo_ops.trainer.config import load_config
from gspo_ops.trainer.metrics import combine
from gspo_ops.trainer.rewards import rewards_of
from gspo_ops.trainer.tasks import Problem


def rewards(function, count=1, **settings):
    given = [f"task.{name}={value}" for name, value in settings.items()]
    problems = [Problem(f"question {i}", "answer") for i in range(count)]
    responses = [str(i) for i in range(count)]
    return rewards_of(load_config(None, given).task, function, responses, problems)


NUMBERS = [
    1, 0.25, True, Fraction(1, 4), -3, np.float32(0.5), np.float16(2), np.int64(7), np.bool_(True),
    np.array(0.5), torch.tensor(0.5), torch.tensor(3), torch.tensor(True),
    torch.tensor(0.5, dtype=torch.bfloat16),
]  # fmt: skip
NO_NUMBERS = [
    float("nan"), float("inf"), -float("inf"), None, "1.0", b"1", 1 + 0j, [1.0], (1.0,), 1e39,
    10**400, np.float32("nan"), np.complex64(1), np.array([1.0]), np.str_("1"),
    torch.tensor(float("inf")), torch.tensor([1.0]), torch.tensor(1j),
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_numbers(number):
    found, failed = rewards(lambda response, problem: number)
    assert type(found[0]) is float
    assert (found, failed) == ([float(number)], 0)


@pytest.mark.parametrize("given", NO_NUMBERS, ids=lambda x: f"{type(x).__name__} {str(x)[:9]}")
def test_what_is_no_finite_number_is_refused(given):
    with pytest.raises(ValueError, match=r"^task\.reward: 'exact' returned ") as refused:
        rewards(lambda response, problem: given)
    text = str(refused.value)
    for part in ("task 'digit_sums'", "question 'question 0'", "response '0'", "failed_reward"):
        assert part in text
    assert len(text) < 500
    assert rewards(lambda response, problem: given, failed_reward=-1) == ([-1.0], 1)


def test_a_long_response_is_shortened():
    config = load_config().task
    with pytest.raises(ValueError, match="returned None") as refused:
        rewards_of(config, lambda r, p: None, ["a" * 10**6 + "end"], [Problem("q" * 999, "")])
    assert "aaa...aaa" in str(refused.value)
    assert "end'" in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3)])
def test_what_raises_is_named_and_chained(error, workers):
    def check(response, problem):
        raise error

    with pytest.raises(ValueError, match=r"raised (KeyError|SystemExit): .*test_rewards.py:") as r:
        rewards(check, reward_workers=workers)
    assert r.value.__cause__ is error
    assert rewards(check, 3, reward_workers=workers, failed_reward=0.5) == ([0.5] * 3, 3)


def test_ctrl_c_is_no_failed_reward():
    def check(response, problem):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewards(check, failed_reward=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_hangs_is_left_behind(workers):
    forever = threading.Event()

    def check(response, problem):
        return forever.wait() if int(response) % 2 else float(response)

    start, others = time.monotonic(), set(threading.enumerate())
    with pytest.raises(ValueError, match=r"took longer than task\.reward_seconds=0\.1 for the que"):
        rewards(check, 6, reward_seconds=0.1, reward_workers=workers)
    found = rewards(check, 6, reward_seconds=0.1, reward_workers=workers, failed_reward=-1)
    assert found == ([0, -1, 2, -1, 4, -1], 3)
    assert time.monotonic() - start < 5
    assert all(thread.daemon for thread in set(threading.enumerate()) - others)
    forever.set()


def test_several_at_once_stay_in_place():
    barrier = threading.Barrier(4, timeout=10)  # breaks unless four wait at once

    def check(response, problem):
        assert problem.question == f"question {response}"
        place = barrier.wait()
        time.sleep(0.01 * place)
        return int(response)

    found = rewards(check, 16, reward_workers=4)
    assert found == ([float(i) for i in range(16)], 0)


def test_no_more_than_asked_at_once():
    lock, running, most = threading.Lock(), 0, 0

    def check(response, problem):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.001)
        with lock:
            running -= 1
        return 0

    rewards(check, 50, reward_workers=3)
    assert most == 3


def test_a_bar_when_it_takes_long(monkeypatch, capsys):
    from gspo_ops.trainer import rewards as module

    def bar(*args, delay, **options):
        assert delay == 1
        return tqdm(*args, delay=0.01, **options)

    tqdm = module.tqdm
    monkeypatch.setattr(module, "tqdm", bar)
    problems, responses = [Problem("", "")] * 3, ["a"] * 3
    for shown in (False, True):
        rewards_of(
            load_config().task, lambda r, p: time.sleep(0.1) or 1, responses, problems, bar=shown
        )
        assert ("rewards" in capsys.readouterr().err) is shown


def test_failed_rewards_of_all_processes_are_counted():
    assert combine([{"failed_rewards": 2}, {"failed_rewards": 3}]) == {"failed_rewards": 5}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("reward_seconds=-1", "task.reward_seconds: expected 0 or a positive number, got -1"),
        ("reward_seconds=inf", "task.reward_seconds: expected 0 or a positive number, got inf"),
        ("reward_workers=0", "task.reward_workers: expected at least 1, got 0"),
        ("failed_reward=nan", "task.failed_reward: expected a finite float32 number, got nan"),
        ("failed_reward=1e300", "task.failed_reward: expected a finite float32 number, got 1e"),
    ],
)
def test_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [f"task.{setting}"])


def test_a_run_counts_them(directory, tmp_path, monkeypatch):
    """Failed rewards are counted, also over turns, and a resumed run may change their settings."""
    pytest.importorskip("matplotlib")
    from gspo_ops.trainer import COMMANDS

    calls = []

    def check(response, problem):
        calls.append(response)
        return None if len(calls) % 5 == 0 else len(calls) % 3

    monkeypatch.setitem(__import__("sys").modules, "some_rewards", SimpleNamespace(check=check))
    given = [
        f"model.name={directory}", f"out={tmp_path}/run", "steps=2", "rollout.prompts=4",
        "rollout.group_size=4", "rollout.max_new_tokens=3", "update.mini_batches=2",
        "task.name=two_step", "objective.name=gspo-token", "task.train_size=8", "task.eval_size=5",
        "task.examples=0", "task.reward=some_rewards:check", "device=cpu", "evaluation.samples=1",
        "checkpoint.save_model=false", "checkpoint.every=1",
    ]  # fmt: skip
    assert COMMANDS["train"](given) == 2
    failing = ["task.failed_reward=-2", "task.reward_seconds=9", "task.reward_workers=3"]
    calls.clear()
    assert COMMANDS["train"]([*given, "steps=1", *failing]) == 0
    assert COMMANDS["train"]([*given, "task.failed_reward=0", "--resume"]) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    # each step has 32 rewards, of which every fifth fails
    assert all(json.loads(line)["failed_rewards"] in (6, 7) for line in lines)
    assert len(lines) == 2
