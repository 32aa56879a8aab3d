"""The trainer on several processes: updates are those of one, and runs may change the number."""

import fcntl
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gspo_ops.trainer import load_config

transformers = pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")

from gspo_ops.trainer.files import writing  # noqa: E402
from gspo_ops.trainer.loop import Trainer  # noqa: E402
from gspo_ops.trainer.progress import CannotWrite  # noqa: E402
from gspo_ops.trainer.ranks import whole  # noqa: E402
from gspo_ops.trainer.report import RunFiles, read_metrics  # noqa: E402
from gspo_ops.trainer.tiny import character_tokenizer  # noqa: E402

sizes = pytest.mark.parametrize("size", [2, 4])
EXPERTS = 4
REWARD = """\
def score(response, problem):
    return (ord(response[0]) % 7) / 7 if response else 0.0
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Save models that answer at random, and a reward that differs between their answers."""
    path = tmp_path_factory.mktemp("trainer")
    tokenizer = character_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(llama).save_pretrained(path / "model")
    moe = transformers.Qwen3MoeConfig(
        **sizes, head_dim=8, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=16
    )
    transformers.Qwen3MoeForCausalLM(moe).save_pretrained(path / "moe")
    for name in ("model", "moe"):
        tokenizer.save_pretrained(path / name)
    (path / "rewards_of_ranks.py").write_text(REWARD)
    return path


def arguments(folder, out, *more):
    return [
        f"model.name={folder}/model", f"out={out}", "steps=6", "rollout.prompts=8",
        "rollout.group_size=4", "rollout.max_new_tokens=6", "update.mini_batches=2",
        "update.learning_rate=3e-3", "task.train_size=20", "task.eval_size=7", "task.examples=0",
        "task.reward=rewards_of_ranks:score", "checkpoint.every=1", "device=cpu", "dtype=float32",
        *more,
    ]  # fmt: skip


def trainer_of(folder, *more):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    more = [text.format(folder=folder) for text in more]
    return Trainer.of(load_config(None, arguments(folder, folder / "unused", *more)))


def sample(trainer):
    return trainer.sampler.groups(trainer.random_numbers("training"))


# One update


def batch_of(trainer, rollout, advantages):
    """Return a batch with old log-probs a little off the new ones, so that it clips some ratios.

    A recorded routing is replaced by one that is native nowhere.
    """
    batch, _ = trainer.learner.prepare(rollout, advantages)
    if batch.routing is not None:
        batch.routing.indices = [(x + 1) % EXPERTS for x in batch.routing.indices]
    # the shift depends on the token, not on its place, and is the same on any rank
    shift = torch.where(batch.rollout.targets() % 3 == 0, 4e-4, -4e-4)
    return batch._replace(old_log_probs=batch.old_log_probs + shift)


def gradients(trainer, batch):
    trainer.learner.optimizer.zero_grad()
    with batch.routing.replay(trainer.model) if batch.routing else nullcontext():
        trainer.learner.loss(batch)[0].backward()
    return {n: whole(p.grad) for n, p in trainer.model.named_parameters() if p.requires_grad}


CASES = {
    "gspo": (),
    "gspo-token": ("objective.name=gspo-token",),
    "grpo, token-mean": ("objective.name=grpo", "objective.aggregation=token-mean"),
    "kl": ("objective.kl_coef=0.5",),
    "entropy": ("objective.entropy_coef=0.01",),
    "lora": ("model.lora_rank=2",),
    "logits": ("update.loss_from=logits",),
    "eager": ("update.loss_from=eager",),
    "moe": ("model.name={folder}/moe", "objective.name=grpo"),
    "routing replay": ("model.name={folder}/moe", "update.routing_replay=true"),
}


@pytest.mark.parametrize("more", CASES.values(), ids=CASES)
@sizes
def test_an_update_is_that_of_one_process(ranks, folder, size, more):
    if "lora" in str(more):
        pytest.importorskip("peft")
    trainer = trainer_of(folder, *more)
    groups = sample(trainer)
    rollout, advantages = groups.rollout, groups.advantages()
    advantages[:8] = 0  # nothing of the first rank has a gradient
    expected = gradients(trainer, batch_of(trainer, rollout, advantages))
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert norm > 0
    answers = ranks(size)(on_rank_update, folder, more, rollout, advantages)
    for got, updated in answers:
        assert got.keys() == expected.keys()
        error = torch.stack([(got[name] - g).norm() for name, g in expected.items()]).norm()
        assert error <= 5e-6 * norm
        assert all(torch.equal(x, answers[0][1][name]) for name, x in updated.items())


def on_rank_update(folder, more, rollout, advantages):
    trainer = trainer_of(folder, *more)
    assert trainer.ranks.size == dist.get_world_size()
    mine = rollout.split(trainer.ranks.size)[trainer.ranks.rank]
    batch = batch_of(trainer, mine, advantages.chunk(trainer.ranks.size)[trainer.ranks.rank])
    found = gradients(trainer, batch)
    trainer.learner.optimizer.zero_grad()
    before = {name: whole(p).clone() for name, p in trainer.model.named_parameters()}
    assert trainer.learner.update(batch)["grad_norm"] > 0
    after = {name: whole(p).clone() for name, p in trainer.model.named_parameters()}
    moved = [name for name, x in after.items() if not torch.equal(x, before[name])]
    assert moved == [name for name, g in found.items() if g.any()]
    # a rank holds only a part
    held = sum(p.to_local().numel() for p in trainer.model.parameters())
    assert held <= 0.6 * sum(p.numel() for p in trainer.model.parameters())
    return found, after


@sizes
def test_problems_are_divided(ranks, folder, size):
    """No problem is asked twice, and exactly the dead groups are refilled, on whichever rank."""
    answers = ranks(size)(on_rank_sampling, folder)
    asked = [question for questions, *_ in answers for question in questions]
    assert len(asked) == len(set(asked)) == 8
    assert len({tuple(responses) for _, responses, *_ in answers}) == size
    assert len({deck for *_, deck in answers}) == 1
    for _, _, dead, _ in answers:
        assert dead == 0


def on_rank_sampling(folder):
    trainer = trainer_of(folder, "rollout.refill=5", "task.train_size=40")
    task, score = trainer.sampler.task, trainer.sampler.task.reward
    dead = set()  # the first rank's problems, none of the others'
    if trainer.ranks.is_first:
        deck = json.dumps(trainer.sampler.deck.state_dict())
        drawn = trainer.ranks.part(trainer.sampler.deck.draw(task.train, 8))
        trainer.sampler.deck.load_state_dict(json.loads(deck))
        dead = {problem.question for problem in drawn}
    trainer.sampler.task = task.__class__(
        **vars(task) | {"reward": lambda r, p: 0.0 if p.question in dead else score(r, p)}
    )
    problems, rollout, rewards, refilled, *_ = sample(trainer)
    assert refilled == (8 // trainer.ranks.size if trainer.ranks.is_first else 0)
    mixed = rewards.view(-1, 4).amin(1) != rewards.view(-1, 4).amax(1)
    responses = rollout.responses.flatten().tolist()
    return (
        [p.question for p in problems], responses, int((~mixed).sum()),
        str(trainer.sampler.deck.state_dict()),
    )  # fmt: skip


@sizes
def test_evaluation_asks_each_problem_once(ranks, folder, size):
    answers = ranks(size)(on_rank_evaluation, folder)
    assert sum(len(asked) for asked, _ in answers) == 7 * 4
    assert len({question for asked, _ in answers for question in asked}) == 7
    for _, accuracies in answers:
        assert accuracies == answers[0][1]


def on_rank_evaluation(folder):
    trainer = trainer_of(folder)
    asked = []
    place = {problem.question: i for i, problem in enumerate(trainer.sampler.task.held_out)}

    def reward(response, problem):
        asked.append(problem.question)
        return float(place[problem.question])

    sampler = trainer.sampler
    sampler.task = sampler.task.__class__(**vars(sampler.task) | {"reward": reward})
    accuracies = trainer.evaluate().mean(1).tolist()
    assert accuracies == list(map(float, range(7)))
    return asked, accuracies


def test_parts_that_do_not_fit_are_refused(ranks, folder):
    ranks(2)(on_rank_refusal, folder)


def on_rank_refusal(folder):
    with pytest.raises(ValueError, match=r"update.mini_batches: expected mini_batches \* 2 proc"):
        trainer_of(folder, "update.mini_batches=8")


def test_one_rank_s_nan_is_skipped_by_all(ranks, folder):
    assert ranks(2)(on_rank_nan, folder) == [1, 1]


def on_rank_nan(folder):
    trainer = trainer_of(folder)
    groups = sample(trainer)
    batch, _ = trainer.learner.prepare(groups.rollout, groups.advantages())
    before = [whole(p).clone() for p in trainer.model.parameters()]
    if trainer.ranks.rank == 1:
        batch = batch._replace(advantages=batch.advantages * float("nan"))
    assert trainer.learner.update(batch) is None
    for p, q in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(whole(p), q)
    return trainer.learner.bad_updates


FAILURES = {
    "training": "task.reward: 'rewards_of_ranks:score' returned None",
    "refill": "task.reward: 'rewards_of_ranks:score' returned None",
    "evaluation": "task.reward: 'rewards_of_ranks:score' returned None",
    "metrics": "can't write metrics: No space left on device",
    "checkpoint": "can't write .*step-000000: No space left on device",
    "lock": "out: a run is going on",
}


@pytest.mark.parametrize("where", FAILURES)
def test_what_fails_on_one_rank_ends_all(ranks, folder, where, tmp_path):
    """All ranks end at once, with the same message, and none waits for one that has ended."""
    start = time.monotonic()
    for error in ranks(2)(on_rank_failure, folder, where, tmp_path / "run"):
        assert re.match(FAILURES[where], error)
    assert time.monotonic() - start < 30


def on_rank_failure(folder, where, out):
    trainer = trainer_of(folder, "rollout.refill=2", "task.train_size=40", f"out={out}")
    first, sampler = trainer.ranks.is_first, trainer.sampler
    task, calls, fails = sampler.task, [], first and where in ("training", "evaluation")

    def reward(response, problem):
        calls.append(response)
        if where == "refill":  # the first rank has everything to replace, the second one nothing
            return (None if len(calls) > 16 else 0.0) if first else len(calls) % 4
        return None if fails else 0.0

    def full(*_):
        raise OSError(28, "No space left on device")

    def taken(*_):
        raise BlockingIOError

    def append(*_):
        with writing("metrics"):
            full()

    patches = {
        "metrics": (RunFiles, "append", append), "checkpoint": (os, "fsync", full),
        "lock": (fcntl, "lockf", taken),
    }  # fmt: skip
    causes = {
        "metrics": trainer.run, "checkpoint": lambda: trainer._save(None), "lock": trainer.run,
        "evaluation": trainer.evaluate,
    }  # fmt: skip
    sampler.task = task.__class__(**vars(task) | {"reward": reward})
    with pytest.MonkeyPatch.context() as patch:
        if first and where in patches:
            patch.setattr(*patches[where])
        with pytest.raises((ValueError, CannotWrite)) as error:
            causes.get(where, lambda: sample(trainer))()
    return str(error.value)


def test_adapters_are_saved_whole(ranks, folder, tmp_path):
    peft = pytest.importorskip("peft")
    adapters, _ = ranks(2)(on_rank_adapters, folder, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "model").state_dict()
    assert adapters
    for name, x in adapters.items():
        assert x.any()
        assert torch.equal(loaded[f"base_model.model.{name}"], x)


def on_rank_adapters(folder, out):
    trainer = trainer_of(folder, "model.lora_rank=2", f"out={out}")
    for _ in range(2):
        trainer.step()
    trainer._save_model()
    return {n: whole(p) for n, p in trainer.model.named_parameters() if p.requires_grad}


# Runs under torchrun

finds_workers = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="needs /proc, to find the workers of torchrun"
)


def torchrun(folder, out, *more):
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "gspo_ops.cli", "train", "--resume", *arguments(folder, out, *more),
        ],
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def train(folder, forked):
    """Provide `train(out, size)`, which does what torchrun does, without importing each time."""

    def train(out, size, *more):
        command = ["train", "--resume", *arguments(folder, out, *more)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        ranks = [
            forked(
                f"import os, sys; sys.path.insert(0, {str(folder)!r})\n"
                f"os.environ |= dict(RANK='{rank}', LOCAL_RANK='{rank}', WORLD_SIZE='{size}', "
                f"MASTER_ADDR='127.0.0.1', MASTER_PORT='{port}', TORCHELASTIC_RUN_ID='none')\n"
                f"from gspo_ops.cli import main; sys.exit(main({command!r}))"
            )
            for rank in range(size)
        ]
        for status, error in [rank.wait() for rank in ranks]:
            assert status == 0, error

    return train


def workers(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def rows_of(run):
    """Return the metrics, except for times."""
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in read_metrics(run)]


@pytest.fixture(scope="session")
def two_ranks(folder, train):
    """Return the directory of an uninterrupted run of two processes."""
    out = folder / "whole"
    train(out, 2)
    return out


@finds_workers
def test_a_rank_is_killed_and_another_number_goes_on(folder, train, two_ranks, tmp_path):
    out = tmp_path / "run"
    process = torchrun(folder, out)
    while process.poll() is None and not list(out.glob("checkpoints/step-??????")):
        time.sleep(0.001)
    time.sleep(random.Random(0).uniform(0, 0.1))
    os.kill(workers(process)[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1, error
    done = len(rows_of(out))
    assert 1 <= done < 6

    runs = {size: tmp_path / f"on{size}" for size in (1, 2, 4)}
    for size, run in runs.items():
        subprocess.run(["cp", "-r", out, run], check=True)
        train(run, size)
    # the same number of processes ends where it would have ended, to the bit
    assert rows_of(runs[2]) == rows_of(two_ranks)
    weights = "model/model.safetensors"
    assert (runs[2] / weights).read_bytes() == (two_ranks / weights).read_bytes()
    for size in (1, 4):
        rows = rows_of(runs[size])
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert rows[0] == rows_of(two_ranks)[0]
        assert rows[-1]["skipped_updates"] == 0
        loaded = transformers.AutoModelForCausalLM.from_pretrained(runs[size] / "model")
        assert type(loaded) is transformers.LlamaForCausalLM


@finds_workers
def test_ctrl_c_saves(folder, tmp_path):
    out = tmp_path / "run"
    process = torchrun(folder, out, "checkpoint.every=0", "steps=500")
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    for pid in (process.pid, *workers(process)):  # as a terminal does
        os.kill(pid, signal.SIGINT)
    process.communicate(timeout=300)
    assert len(rows_of(out)) < 500
    assert list(out.glob("checkpoints/step-??????"))


def test_two_ranks_learn(train, tmp_path):
    train(tmp_path / "run", 2, "steps=30", "rollout.group_size=16", "checkpoint.every=0")
    rewards = [row["reward"] for row in rows_of(tmp_path / "run")]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
