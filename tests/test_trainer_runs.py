"""Runs of the trainer with interruptions, damage and NaN, as real ones have; and its options."""

import json
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch

from gspo_ops.trainer import COMMANDS, load_config

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")

from gspo_ops.trainer import checkpoint
from gspo_ops.trainer.loop import Trainer
from gspo_ops.trainer.model import load_model
from gspo_ops.trainer.progress import CannotWrite, Diverged
from gspo_ops.trainer.ranks import Ranks
from gspo_ops.trainer.report import read_metrics
from gspo_ops.trainer.rollout import append_turn, concatenate, real_tokens
from gspo_ops.trainer.routing_replay import find_routers
from gspo_ops.trainer.tasks import TASKS, make_task
from gspo_ops.trainer.tiny import TINY, character_tokenizer


@pytest.fixture(scope="session")
def reward_module(tmp_path_factory):
    """Write a module with a reward that differs between random answers; return its folder."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "first_letter.py").write_text(
        "def score(response, problem):\n"
        "    return (ord(response[0]) % 7) / 7 if response else 0.0\n"
    )
    return folder


def arguments(directory, out, *more):
    return [
        f"model.name={directory}", f"out={out}", "steps=6", "rollout.prompts=4",
        "rollout.group_size=4", "rollout.max_new_tokens=4", "update.mini_batches=2",
        "update.learning_rate=1e-3", "task.train_size=20", "task.eval_size=8", "task.examples=0",
        "task.reward=first_letter:score", "checkpoint.every=1", "device=cpu", *more,
    ]  # fmt: skip


@pytest.fixture
def make(directory, reward_module, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(reward_module))

    def make(*more):
        return Trainer.of(load_config(None, arguments(directory, tmp_path / "run", *more)))

    return make


def rows_of(run):
    """Return the metrics, except for times."""
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in read_metrics(run)]


def assert_same_run(a, b):
    assert rows_of(a) == rows_of(b)
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    weights = "model/model.safetensors"
    assert (a / weights).read_bytes() == (b / weights).read_bytes()
    summaries = [json.loads((run / "summary.json").read_text()) for run in (a, b)]
    assert summaries[0] | {"seconds": 0} == summaries[1] | {"seconds": 0}


ALONE = Ranks(torch.device("cpu"))


def tied_model():
    """Return two layers with one weight, and their optimizer."""
    model = torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(9, 9, bias=False))
    model[1].weight = model[0].weight
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


class TestCheckpoint:
    @pytest.fixture
    def saved(self, tmp_path):
        """Save five checkpoints, of which the last two stay."""
        model, optimizer = tied_model()
        for step in range(1, 6):
            model(torch.ones(2, 9)).square().sum().backward()
            optimizer.step()
            state = {"x": torch.full((300,), step)}
            checkpoint.save(tmp_path, step, state, model, optimizer, ALONE, keep=2)
        return model, optimizer

    def test_the_last_ones_are_kept(self, tmp_path, saved):
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000004", "step-000005"]
        path = checkpoint.last_whole(tmp_path)
        step, state = checkpoint.load_state(path)
        assert step == 5
        assert torch.equal(state["x"], torch.full((300,), 5))
        model, optimizer = tied_model()
        checkpoint.load_weights(path, model, optimizer, ALONE)
        assert model[0].weight is model[1].weight
        for p, q in zip(model.parameters(), saved[0].parameters(), strict=True):
            assert torch.equal(p, q)
            state, expected = optimizer.state[p], saved[1].state[q]
            assert state.keys() == expected.keys() >= {"step", "exp_avg"}
            assert all(torch.equal(x, expected[name]) for name, x in state.items())

    def test_an_optimizer_that_made_no_step(self, tmp_path):
        for _ in range(2):
            model, optimizer = tied_model()
            checkpoint.save(tmp_path, 0, {}, model, optimizer, ALONE, keep=2)
            assert not optimizer.state
        other, optimizer = tied_model()
        checkpoint.load_weights(tmp_path / "step-000000", other, optimizer, ALONE)
        assert torch.equal(other[0].weight, model[0].weight)
        assert not optimizer.state

    def test_a_parameter_that_a_gradient_reaches_late(self, tmp_path):
        """A saved run and a resumed one go on to the bits of one that was never saved."""

        def start():
            torch.manual_seed(0)
            model, _ = tied_model()
            model.late = torch.nn.Parameter(torch.ones(3))
            return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

        def step(model, optimizer, *, late):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 9)).square().sum()
            (loss + model.late.square().sum() if late else loss).backward()
            optimizer.step()

        never, saved, resumed = start(), start(), start()
        for of in (never, saved):
            step(*of, late=False)
        checkpoint.save(tmp_path, 1, {}, *saved, ALONE, keep=1)
        checkpoint.load_weights(tmp_path / "step-000001", *resumed, ALONE)
        for of in (never, saved, resumed):
            step(*of, late=True)
        expected, _ = never
        for model, _ in (saved, resumed):
            assert all(map(torch.equal, model.parameters(), expected.parameters()))

    def test_one_of_another_model_is_refused(self, tmp_path, saved):
        model, optimizer = tied_model()
        model.more = torch.nn.Parameter(torch.ones(3))
        with pytest.raises(ValueError, match=r"^out: can't load .*step-000005: .*more"):
            checkpoint.load_weights(tmp_path / "step-000005", model, optimizer, ALONE)

    @pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
    @pytest.mark.parametrize("name", ["state.pt", "weights/.metadata", "weights/__0_0.distcp"])
    def test_a_damaged_one_is_passed_over(self, tmp_path, saved, damage, name):
        file = tmp_path / "step-000005" / name
        data = bytearray(file.read_bytes())
        if damage == "cut":
            file.write_bytes(data[:-1])
        elif damage == "bit":
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        else:
            file.unlink()
        with pytest.warns(UserWarning, match="step-000005 is damaged"):
            assert checkpoint.last_whole(tmp_path).name == "step-000004"

    @pytest.mark.parametrize("text", ["{", "{}", "[]", None])
    def test_one_with_a_damaged_manifest_is_passed_over(self, tmp_path, saved, text):
        manifest = tmp_path / "step-000005" / "manifest.json"
        manifest.unlink() if text is None else manifest.write_text(text)
        with pytest.warns(UserWarning, match="step-000005 is damaged"):
            assert checkpoint.last_whole(tmp_path).name == "step-000004"

    def test_one_half_written_is_not_there(self, tmp_path, saved):
        (tmp_path / "step-000006.partial").mkdir()
        assert checkpoint.last_whole(tmp_path).name == "step-000005"
        checkpoint.save(tmp_path, 6, {}, *saved, ALONE, keep=2)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000005", "step-000006"]

    def test_none(self, tmp_path):
        assert checkpoint.last_whole(tmp_path) is None


@pytest.mark.parametrize(
    "more", [(), ("objective.kl_coef=0.1",), ("model.lora_rank=2",), ("update.warmup_steps=5",)]
)
def test_resumed_is_uninterrupted(make, tmp_path, more, monkeypatch):
    if any("lora" in key for key in more):
        pytest.importorskip("peft")
    make(*more).run()
    whole = (tmp_path / "run").rename(tmp_path / "whole")
    first = make(*more)
    step = first.step

    def fail_at_fourth():
        if first.progress.step == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(first, "step", fail_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    make(*more).run(resume=True)
    if (whole / "model/model.safetensors").exists():
        assert_same_run(whole, tmp_path / "run")
    else:
        adapter = "model/adapter_model.safetensors"
        assert (whole / adapter).read_bytes() == (tmp_path / "run" / adapter).read_bytes()
        assert rows_of(whole) == rows_of(tmp_path / "run")


def test_another_run_is_not_continued(make, tmp_path):
    make("steps=2").run()
    with pytest.raises(ValueError, match=r"^update\.epochs: the run in .* has 1, which .* to 2$"):
        make("steps=3", "update.epochs=2").run(resume=True)
    make("steps=3").run(resume=True)  # more steps do not make it another run
    assert len(rows_of(tmp_path / "run")) == 3


def test_resumed_with_another_learning_rate(make, tmp_path):
    make("steps=1", "update.warmup_steps=3").run()
    trainer = make("steps=2", "update.warmup_steps=3", "update.learning_rate=1e-12")
    trainer._resume()
    # two of the four updates in which it rises were made
    assert trainer.learner.optimizer.param_groups[0]["lr"] == pytest.approx(3 / 4 * 1e-12)
    before = [p.clone() for p in trainer.model.parameters()]
    assert trainer.step()["grad_norm"] > 0
    for p, q in zip(before, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-11, rtol=0)


def test_resumed_with_another_evaluation(make, tmp_path):
    """Accuracies before and after training are of the same settings, and the run is the same."""
    make("steps=2").run()
    whole = (tmp_path / "run").rename(tmp_path / "whole")
    make("steps=1", "evaluation.samples=1", "evaluation.temperature=0").run()
    make("steps=2", "evaluation.pass_at=4").run(resume=True)
    runs = tmp_path / "run", whole
    found, expected = (json.loads((run / "summary.json").read_text()) for run in runs)
    assert found["pass_at"] == 4
    assert found["before"] == expected["before"]
    assert found["gain_se"] == expected["gain_se"]
    assert rows_of(runs[0]) == rows_of(runs[1])


def test_resumed_on_a_machine_without_the_device(make, tmp_path, monkeypatch):
    make("steps=1").run()
    load = checkpoint.load_state

    def of_another_machine(path):
        step, state = load(path)
        return step, state | {"config": state["config"] | {"device": "cuda:99"}}

    monkeypatch.setattr(checkpoint, "load_state", of_another_machine)
    make("steps=2").run(resume=True)
    file = tmp_path / "run/config.json"
    file.write_text(file.read_text().replace('"device": "cpu"', '"device": "cuda:99"'))
    assert COMMANDS["sample"]([str(tmp_path / "run"), "3 + 4 ="]) == 0


def test_the_model_is_saved_before_the_plot_is_drawn(make, tmp_path, monkeypatch):
    def full(*_, **__):
        raise CannotWrite("full")

    monkeypatch.setattr("gspo_ops.trainer.loop.plot", full)
    with pytest.raises(CannotWrite):
        make("steps=1").run()
    assert (tmp_path / "run/model").is_dir()
    assert (tmp_path / "run/summary.json").is_file()


def test_an_old_run_is_moved_aside(make, tmp_path):
    for _ in range(3):
        make("steps=1").run()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run-1", "run-2"]


@pytest.fixture(scope="session")
def start(directory, reward_module, forked):
    """Provide `start(out)`, which trains in a new process and resumes a run if there is one."""

    def start(out):
        command = ["train", "--resume", *arguments(directory, out, "steps=20")]
        return forked(
            f"import sys; sys.path.insert(0, {str(reward_module)!r})\n"
            f"from gspo_ops.cli import main; sys.exit(main({command!r}))"
        )

    return start


@pytest.fixture(scope="session")
def whole(start, tmp_path_factory):
    """Return the directory of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    status, error = start(out).wait()
    assert status == 0, error
    return out


def checkpoints(out, pattern="*"):
    return {path.name for path in out.glob(f"checkpoints/{pattern}")}


def kill_and_resume(start, out, kills, seed):
    """Kill training at random instants, half of them while a checkpoint is written."""
    chance = random.Random(seed)
    landed = 0
    while landed < kills:
        before = checkpoints(out, "step-??????")
        process = start(out)
        while process.status() is None and checkpoints(out, "step-??????") <= before:
            time.sleep(0.001)
        if landed % 2:
            while process.status() is None and not checkpoints(out, "*.partial"):
                pass
        else:
            time.sleep(chance.uniform(0, 0.2))
        if process.status() is None:
            process.kill(signal.SIGKILL)
        status, error = process.wait()
        if status == -signal.SIGKILL:
            landed += 1
        else:  # it ended before it was killed: the other kills hit a new run
            assert status == 0, error
            yield out
            shutil.rmtree(out)
    status, error = start(out).wait()
    assert status == 0, error
    yield out


def test_killed_at_many_instants(start, whole, tmp_path):
    kills = int(os.environ.get("GSPO_OPS_KILLS", "8"))  # 20 take a minute
    for out in kill_and_resume(start, tmp_path / "run", kills, seed=0):
        assert_same_run(whole, out)


def test_stopped_by_a_signal(start, whole, tmp_path):
    out = tmp_path / "run"
    process = start(out)
    while process.status() is None and not list(out.glob("checkpoints/*")):
        time.sleep(0.001)
    process.kill(signal.SIGINT)
    status, error = process.wait()
    assert status == 130, error
    assert "--resume continues" in error
    assert start(out).wait()[0] == 0
    assert_same_run(whole, out)


class TestBadUpdates:
    def poison(self, trainer, monkeypatch, calls):
        loss = trainer.learner.loss
        seen = []

        def poisoned(batch, *args):
            seen.append(batch)
            found = loss(batch, *args)
            return found._replace(loss=found.loss * float("nan")) if len(seen) in calls else found

        monkeypatch.setattr(trainer.learner, "loss", poisoned)

    def test_one_is_skipped_and_counted(self, make, monkeypatch):
        trainer = make()
        self.poison(trainer, monkeypatch, {1, 2})
        before = [p.clone() for p in trainer.model.parameters()]
        assert trainer.step()["skipped_updates"] == 2
        assert all(map(torch.equal, before, trainer.model.parameters()))
        row = trainer.step()
        assert row["skipped_updates"] == trainer.learner.bad_updates == 0
        assert not all(map(torch.equal, before, trainer.model.parameters()))

    def test_many_end_the_run(self, make, monkeypatch, tmp_path, capsys):
        trainer = make("update.max_bad_updates=3")
        self.poison(trainer, monkeypatch, set(range(3, 99)))
        with pytest.raises(Diverged, match="3 updates in a row had a loss or a gradient that is"):
            trainer.run()
        assert len(rows_of(tmp_path / "run")) == 2
        assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_model_beyond_all_numbers_ends_the_run(make, directory, tmp_path, capsys):
    options = ("update.mini_batches=1", "steps=3")
    make(*options).run()
    whole = (tmp_path / "run").rename(tmp_path / "whole")
    make("update.mini_batches=1", "steps=1").run()
    broken = arguments(directory, tmp_path / "run", *options, "update.learning_rate=1e30")
    assert COMMANDS["train"]([*broken, "--resume"]) == 1
    # on a line of its own: no bar is left open
    message = "\ngspo-ops train: logits are not finite during sampling: the model was broken"
    assert message in capsys.readouterr().err
    # the step that broke it was finished and saved; follow the message's advice
    shutil.rmtree(tmp_path / "run/checkpoints/step-000002")
    make(*options).run(resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_lora_trains_and_saves_what_peft_loads(make, tmp_path):
    peft = pytest.importorskip("peft")
    trainer = make("model.lora_rank=2", "steps=2")
    fresh, _ = load_model(trainer.config.model.name)
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    assert trainer.model.get_output_embeddings().weight.requires_grad is False
    trainer.run()
    for p, q in zip(frozen, fresh.parameters(), strict=True):
        assert torch.equal(p, q)
    tokens = torch.tensor([[5, 6, 7]])
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "run" / "model")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, trainer.model(tokens).logits)
        with loaded.disable_adapter():
            assert not torch.equal(loaded(tokens).logits, trainer.model(tokens).logits)


def respond(trainer, group_size):
    """Sample responses to the first two problems."""
    problems = list(trainer.sampler.task.train[:2])
    return trainer.sampler.respond(problems, group_size, trainer.random_numbers("training"))


class TestOldLogProbs:
    def test_sampling_and_training_agree_in_fp32(self, make):
        row = make("dtype=float32").step()
        assert 0 < row["mismatch_token_max"] < 1e-5
        assert row["mismatch_clip_frac"] == 0
        assert row["first_ratio_error"] == 0

    def test_bf16_sampling_is_clipped_by_gspo_and_not_by_grpo(self, make):
        options = ("dtype=float32", "rollout.dtype=bfloat16", "update.old_log_probs=rollout")
        gspo, grpo = (make(*options, f"objective.name={name}").step() for name in ("gspo", "grpo"))
        assert gspo["mismatch_token_max"] == grpo["mismatch_token_max"] > 1e-4
        assert gspo["mismatch_clip_frac"] > 0 == grpo["mismatch_clip_frac"]
        assert gspo["first_ratio_error"] > 0

    @pytest.mark.parametrize("name", ["gspo", "grpo"])
    def test_rollout_weights(self, make, name):
        trainer = make("update.rollout_weight_cap=1.5", f"objective.name={name}")
        rollout = respond(trainer, 3).rollout
        lengths = rollout.mask.sum(1)
        difference = torch.linspace(-2, 2, int(lengths.sum()))
        weights = trainer.learner.rollout_weights(rollout, difference)
        of = difference if name == "grpo" else torch.stack(
            [d.sum() for d in difference.split(lengths.tolist())]
        )  # fmt: skip
        torch.testing.assert_close(weights, of.exp().clamp(max=1.5))
        assert trainer.step()["grad_norm"] > 0


def test_refill_replaces_groups_without_a_gradient(make, monkeypatch):
    """Refilled groups have a gradient, though only one problem in two has rewards that differ."""
    trainer = make("rollout.refill=3")
    reward = trainer.sampler.task.reward
    dead = {p.question for p in trainer.sampler.task.train[::2]}
    task = trainer.sampler.task.__class__(
        **{
            **vars(trainer.sampler.task),
            "reward": lambda r, p: 0.0 if p.question in dead else reward(r, p),
        }
    )
    trainer.sampler.task = task
    problems, rollout, rewards, refilled, failed, _ = trainer.sampler.groups(
        trainer.random_numbers("training")
    )
    assert refilled >= 1
    assert failed == 0
    live = [p.question not in dead for p in problems]
    assert sum(live) == 4
    assert len(rollout.responses) == len(rewards) == 16
    asked = [p for p in problems for _ in range(4)]
    again = [task.reward(a, p) for a, p in zip(trainer.sampler.texts(rollout), asked, strict=True)]
    torch.testing.assert_close(rewards[:, 0], torch.tensor(again))
    prompts = trainer.tokenizer.batch_decode(
        [x[m] for x, m in zip(rollout.prompts, rollout.prompt_mask, strict=True)]
    )
    assert prompts == [task.prompt(p) for p in problems]


class TestGrades:
    def test_each_token_has_its_own_advantage(self, make):
        trainer = make(
            "task.name=recurrence", "task.graded=true", "objective.name=gspo-token",
            "rollout.stop=eos", "rollout.group_size=3",
        )  # fmt: skip
        groups = respond(trainer, 3)
        rollout, advantages = groups.rollout, groups.advantages()
        assert groups.grades.shape == advantages.shape == rollout.responses.shape
        texts = trainer.sampler.texts(rollout)
        for i, text in enumerate(texts):
            expected = trainer.sampler.task.grades(text, groups.problems[i // 3])
            assert groups.grades[i, : len(text)].tolist() == expected
        # each place is a separate problem: the advantages of a group have a mean of 0
        of_groups = advantages.view(2, 3, -1)
        torch.testing.assert_close(of_groups.sum(1), torch.zeros(2, rollout.responses.shape[1]))
        given = torch.arange(float(advantages.numel())).view(advantages.shape) + 1
        batch, _ = trainer.learner.prepare(rollout, given)
        assert batch.advantages.tolist() == given[rollout.mask].tolist()
        assert trainer.step()["grad_norm"] >= 0

    def test_a_batch_without_any_gradient(self, make):
        trainer = make(
            "task.name=recurrence", "task.graded=true", "objective.name=grpo", "rollout.stop=eos"
        )
        groups = respond(trainer, 2)
        batch, _ = trainer.learner.prepare(groups.rollout, torch.zeros(groups.grades.shape))
        assert (batch.left_out, batch.advantages.tolist()) == (1, [0.0])
        assert trainer.learner.update(batch)["grad_norm"] == 0


class TestChurn:
    @pytest.fixture
    def trainer(self, directory, reward_module, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(reward_module))
        options = arguments(directory, tmp_path / "run", "logging.expert_churn=true")
        config = load_config(None, options)
        task = make_task(config.task, config.seed)
        return Trainer(config, TINY["tiny-moe"].build(0), character_tokenizer(), task)

    def test_of_an_update(self, trainer):
        rollout = respond(trainer, 2).rollout

        def turn_around():
            for router in find_routers(trainer.model):
                router.weight.data.neg_()
            return "what it gives"

        assert trainer.learner.churn(rollout, lambda: None) == (None, 0.0)
        given, churn = trainer.learner.churn(rollout, turn_around)
        assert given == "what it gives"
        assert churn > 0.6

    def test_of_the_first_update_of_a_step(self, trainer):
        calls, churn = [], trainer.learner.churn
        trainer.learner.churn = lambda *args: calls.append(1) or churn(*args)
        row = trainer.step()
        assert len(calls) == 1
        assert 0 < row["expert_churn"] < 0.5

    @pytest.mark.parametrize(("layout", "prompts"), [("shared", 1), ("separate", 3)])
    def test_padding_is_not_real(self, make, layout, prompts):
        rollout = respond(make(), 3).rollout
        rollout.prompt_mask[0, 0] = False
        found = real_tokens(rollout, layout)
        assert found.sum() == prompts * rollout.prompt_mask.sum() + rollout.real.sum()
        assert not found[0, 0]

    def test_models_without_experts_have_none(self, make):
        with pytest.raises(ValueError, match=r"logging.expert_churn: .* has no router"):
            make("logging.expert_churn=true")


class TestTurns:
    def test_each_turn_has_its_own_advantage(self, make):
        trainer = make("task.name=two_step", "objective.name=gspo-token", "rollout.group_size=3")
        _, rollout, rewards, *_ = respond(trainer, 3)
        assert rewards.shape == (6, 2)
        advantages = torch.arange(12.0).view(6, 2)
        batch, _ = trainer.learner.prepare(rollout, advantages)
        start = 0
        for i, turn in enumerate(rollout.turn):
            sampled = turn[turn >= 0]
            assert set(sampled.tolist()) == {0, 1}
            got = batch.advantages[start : start + len(sampled)]
            assert torch.equal(got, advantages[i][sampled])
            start += len(sampled)
        assert trainer.step()["grad_norm"] > 0

    def test_the_second_question_goes_on_from_the_first_answer(self):
        made = make_task(load_config(None, ["task.name=two_step", "objective.name=grpo"]).task, 0)
        for problem in made.train[:10]:
            expression = problem.entry["metadata"]["expression"]
            operator, operand = expression.split()[-2:]
            after_right = made.follow_up(problem, f" {problem.answer}\n")
            assert after_right.answer == problem.entry["answer"] == str(eval(expression))
            after_wrong = made.follow_up(problem, " 99\n")
            assert after_wrong.question == f"99 {operator} {operand} ="
            assert after_wrong.answer == str(eval(f"99 {operator} {operand}"))
            assert made.follow_up(problem, "what?").question == after_right.question
            assert made.follow_up(after_right, " 5\n") is None
            assert made.reward(f" {after_wrong.answer}\n", after_wrong)

    def test_tokens_of_later_questions_do_not_count(self, make):
        trainer = make("task.name=two_step", "objective.name=gspo-token")
        rollout = respond(trainer, 2).rollout
        asked = rollout.real & ~rollout.mask
        assert asked.any(1).all()
        assert (rollout.log_probs[asked] == 0).all()
        for row, real, mask in zip(rollout.responses, rollout.real, rollout.mask, strict=True):
            assert real.tolist() == sorted(real.tolist(), reverse=True)
            text = trainer.tokenizer.decode(row[real & ~mask])
            assert text.lstrip("\n").endswith("=")
            assert int(real.sum()) == int(mask.sum()) + len(text)

    def test_shapes(self, make):
        trainer = make()
        rollout = respond(trainer, 2).rollout
        longer = append_turn(rollout, [[7], [8, 9], [7], [7]], rollout)
        assert (longer.turn == 1).sum() == rollout.mask.sum()
        both = concatenate([rollout, longer])
        assert torch.equal(both.select(torch.tensor([2, 3])).targets(), longer.targets())
        assert torch.equal(both.select(torch.tensor([1, 0, 2, 3])).select(
            torch.tensor([1, 0])).targets(), rollout.targets())  # fmt: skip


def test_a_run_that_has_reached_its_target_is_over(make):
    ask = ["steps=4", "evaluation.every=1", "evaluation.target=1e-9"]
    first = make(*ask)
    first.run()
    assert first.progress.step < 4
    again = make(*ask)
    again.run(resume=True)
    assert again.progress.step == first.progress.step
    more = make(*ask[:-1], "evaluation.target=1000")
    more.run(resume=True)
    assert more.progress.step == 4


def test_a_checkpoint_of_an_earlier_version_is_refused(make, monkeypatch):
    make("steps=1").run()
    load = checkpoint.load_state

    def of_then(path):
        step, state = load(path)
        del state["fingerprints"]
        return step, state

    monkeypatch.setattr(checkpoint, "load_state", of_then)
    with pytest.raises(ValueError, match="was written by an earlier version"):
        make("steps=2").run(resume=True)


class TestWhatSettingsName:
    """A run is not continued once what a setting names has changed, except for the reward."""

    def resume(self, make, *more):
        make(*more, "steps=2").run(resume=True)

    def test_the_problems(self, make, tmp_path):
        path = tmp_path / "problems.jsonl"
        lines = [json.dumps({"prompt": f"say {i}:", "answer": i}) for i in range(28)]
        path.write_text("\n".join(lines))
        make(f"task.name={path}", "steps=1").run()
        path.write_text("\n".join([*lines[:-1], lines[-1].replace("27}", "28}")]))
        with pytest.raises(ValueError, match=r"task\.name: what .* has changed since"):
            self.resume(make, f"task.name={path}")
        path.write_text("\n".join(lines))
        self.resume(make, f"task.name={path}")

    def test_the_reward(self, make, tmp_path, monkeypatch, capsys):
        """A corrected function is taken, with a notice, for accuracy before training, too."""
        monkeypatch.syspath_prepend(str(tmp_path))
        ask = "task.reward=corrected:score"
        notice = "task.reward: 'corrected:score' has changed; the run goes on with the new func"
        before = []
        for steps, factor in (("steps=1", "1"), ("steps=2", "2.0"), ("steps=3", "2.0")):
            code = f"def score(r, p):\n    return {factor} * len(r.strip())\n"
            (tmp_path / "corrected.py").write_text(code)
            sys.modules.pop("corrected", None)
            before.append(make(ask, steps).run(resume=steps != "steps=1").before)
            assert (notice in capsys.readouterr().out) == (steps == "steps=2")
        assert before[1] == before[2] == 2 * before[0] > 0
        with pytest.raises(ValueError, match=r"^task\.reward: the run .* --resume can't change"):
            self.resume(make)

    def test_the_model(self, make, directory):
        make("steps=1").run()
        file = directory / "model.safetensors"
        whole = file.read_bytes()
        try:
            file.write_bytes(whole[:-4] + bytes(4))
            with pytest.raises(ValueError, match=r"model\.name: what .* names has changed since"):
                self.resume(make)
        finally:
            file.write_bytes(whole)


class TestSources:
    def test_json_lines(self, make, tmp_path):
        path = tmp_path / "problems.jsonl"
        lines = [json.dumps({"prompt": f"say {i}:", "answer": i}) for i in range(40)]
        path.write_text("\n\n".join(lines))
        trainer = make(f"task.name={path}")
        assert {p.answer for p in trainer.sampler.task.train} <= set(map(str, range(40)))
        assert trainer.step()["grad_norm"] > 0
        path.write_text("\n".join([*lines, '{"prompt": 3}']))
        with pytest.raises(ValueError, match=r'line 41 of .* is not \{"prompt"'):
            make(f"task.name={path}", "task.train_size=99")

    def test_any_dataset_of_reasoning_gym_with_its_own_check(self):
        config = load_config(
            None,
            ["task.name=gcd", "task.options.max_numbers=2", "task.reward=score"],
        )
        made = make_task(config.task, 0)
        assert "gcd" not in TASKS
        problem = made.train[0]
        assert made.reward(problem.answer, problem) == 1.0
        assert made.reward("nothing", problem) < 1.0


def test_kl_to_the_model_before_training(make):
    trainer = make("objective.kl_coef=0.5", "steps=2")
    first, second = trainer.step(), trainer.step()
    assert first["ref_kl"] < second["ref_kl"]


def test_chat_template(make):
    trainer = make()
    trainer.sampler.config = load_config(None, ["task.chat=true"])
    trainer.tokenizer.chat_template = "<{{ messages[0]['content'] }}>"
    problem = trainer.sampler.task.train[0]
    text = trainer.tokenizer.decode(trainer.sampler.prompt_tokens(problem))
    assert text == f"<{trainer.sampler.task.prompt(problem)}>"


def test_several_runs_in_one_picture(make, tmp_path, capsys):
    for _ in range(2):
        make("steps=2").run()
    runs = [str(tmp_path / name) for name in ("run", "run-1")]
    picture = tmp_path / "new" / "both.png"
    assert COMMANDS["plot"]([*runs, "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert COMMANDS["plot"]([*runs, "--out", str(picture / "x.png")]) == 2
    assert f"error: --out: can't write {picture}/x.png: " in capsys.readouterr().err
    assert COMMANDS["plot"]([str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err


def test_weights_and_biases(make, tmp_path, monkeypatch):
    """In wandb's offline mode, the file that it would send has the metrics of every step."""
    pytest.importorskip("wandb", reason="needs wandb: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    make("steps=2", "logging.wandb=tests").run()
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    sent = file.read_bytes()
    assert sent.count(b"clip_frac_tokens") >= 2


def test_tensorboard(make, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    make("steps=2", "logging.tensorboard=true").run()
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.step for e in found.Scalars("reward")] == [1, 2]


@pytest.mark.parametrize("more", [(), ("model.lora_rank=2",)], ids=["weights", "LoRA"])
def test_what_a_run_has_learnt_can_be_asked(make, tmp_path, capsys, more):
    trainer = make("steps=2", "update.learning_rate=1e-2", *more)
    trainer.run()
    capsys.readouterr()
    ask = [str(tmp_path / "run"), "--temperature", "0"]
    assert COMMANDS["sample"](ask) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16  # eight problems, each with an answer
    numbers = torch.Generator().manual_seed(0)
    held_out = list(trainer.sampler.task.held_out[:8])
    for problem, shown in zip(held_out, lines[::2], strict=True):
        assert shown.startswith(problem.question)
    expected = trainer.sampler.answers(held_out, 1, numbers, 0)
    assert [line.strip() for line in lines[1::2]] == [repr(texts[0].strip()) for texts in expected]
    assert COMMANDS["sample"]([*ask, "say x:", "--responses", "3"]) == 0
    assert capsys.readouterr().out.count("\n") == 4
    (tmp_path / "run" / "config.json").unlink()
    assert COMMANDS["sample"](ask) == 2
    assert "no run in" in capsys.readouterr().err
