"""Small models that learn on a CPU in minutes: Qwen3-MoE and a dense Qwen3 of similar form.

Their tokens are characters. A short supervised warm-up teaches them their task, with enough wrong
answers among the right ones that they master it only in part. This gives a policy gradient
something to reinforce, which carries over to held-out problems (which the warm-up, unlike the
policy gradient, has seen).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from .config import TaskConfig
from .routing_replay import find_routers
from .tasks import Problem, make_task, next_digit

_VERSION = 2  # of the cached models
_CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
_HIDDEN, _LEARNING_RATE, _RIGHT = 128, 3e-3, 0.6


def _digit_sums(chance: random.Random, count: int) -> list[Problem]:
    """Draw digit sums, most with their right answer and the others with another problem's."""
    task = make_task(TaskConfig(name="digit_sums", examples=0, train_size=150, eval_size=2), 0)
    problems = [*task.train, *task.held_out]
    shown = []
    for problem in chance.choices(problems, k=count):
        answer = problem.answer if chance.random() < _RIGHT else chance.choice(problems).answer
        shown.append(Problem(problem.question, f" {answer}\n"))
    return shown


def _recurrences(digits: int, chance: random.Random, count: int) -> list[Problem]:
    """Draw recurrences, most of them right and the others continued from one wrong addition."""
    shown = []
    for _ in range(count):
        start = "".join(chance.choices("0123456789", k=4))
        wrong = -1 if chance.random() < _RIGHT else chance.randrange(digits)
        answer = start
        for place in range(digits):
            answer += chance.choice("0123456789") if place == wrong else next_digit(answer)
        shown.append(Problem(start, answer.removeprefix(start)))
    return shown


@dataclass(frozen=True)
class Tiny:
    """The architecture of a model, and its warm-up.

    Attributes:
        lesson: function that makes problems and answers of the warm-up from random numbers and a
            count.
        layers: number of layers.
        experts: number of experts per layer; 0 for a dense model of width top_k * width.
        top_k: number of experts per token.
        width: width of an expert.
        steps: number of warm-up steps.
        batch: problems per warm-up step.
        router_std: standard deviation with which routers are initialized; the warm-up does not
            train them. None to train them with the rest. Routers that decide by small margins
            change their choice often, as those of large models do.
        router_steps: warm-up steps after which they are initialized again, so that no token learns
            to depend on one expert.
    """

    lesson: Callable[[random.Random, int], list[Problem]]
    layers: int = 4
    experts: int = 0
    top_k: int = 2
    width: int = 128
    steps: int = 500
    batch: int = 128
    router_std: float | None = None
    router_steps: int = 20

    def build(self, seed: int) -> PreTrainedModel:
        """Build the model, before its warm-up."""
        sizes = {
            "vocab_size": 3 + len(_CHARACTERS), "hidden_size": _HIDDEN,
            "num_hidden_layers": self.layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 1, "attn_implementation": "sdpa",
        }  # fmt: skip
        torch.manual_seed(seed)
        if not self.experts:
            config = Qwen3Config(**sizes, intermediate_size=self.top_k * self.width)
            return Qwen3ForCausalLM(config).eval()
        config = Qwen3MoeConfig(
            **sizes, intermediate_size=self.width, moe_intermediate_size=self.width,
            num_experts=self.experts, num_experts_per_tok=self.top_k, norm_topk_prob=True,
        )  # fmt: skip
        return Qwen3MoeForCausalLM(config).eval()

    def fixed_routers(self, model: PreTrainedModel) -> list[torch.nn.Parameter]:
        """Return the weights of the routers that the warm-up does not train."""
        if self.router_std is None or not self.experts:
            return []
        return [weight for router in find_routers(model) for weight in router.parameters()]


def _recurrence_models() -> dict[str, Tiny]:
    """Return models with names like `recurrence-moe-32`, after the digits in an answer."""
    return {
        f"recurrence-{kind}-{digits}": Tiny(
            partial(_recurrences, digits), layers=2, experts=experts, top_k=4, width=width,
            steps=steps, batch=4096 // digits, router_std=2e-3,
        )
        for kind, experts, width, steps in (("dense", 0, 384, 400), ("moe", 32, 64, 700))
        for digits in (8, 32, 128)
    }  # fmt: skip


TINY: Mapping[str, Tiny] = MappingProxyType(
    {"tiny-moe": Tiny(_digit_sums, experts=8), "tiny-dense": Tiny(_digit_sums)}
    | _recurrence_models()
)


def tiny_directory(name: str, cache: Path) -> Path:
    """Return the directory of a tiny model, which the first call makes and teaches.

    Args:
        name: name in `TINY`.
        cache: parent directory, in which the model is kept.

    Returns:
        A directory that `AutoModelForCausalLM` and `AutoTokenizer` load.
    """
    directory = cache / f"{name}-{_VERSION}"
    if directory.is_dir():
        return directory
    tokenizer = character_tokenizer()
    model = TINY[name].build(seed=0)
    teach(model, tokenizer, TINY[name], seed=0)
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=name, dir=cache))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        os.replace(unfinished, directory)
    except OSError:
        if not directory.is_dir():  # another process may have finished first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of printable ASCII characters and newline, after PAD, EOS and UNK."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@torch.enable_grad()  # whatever the caller's mode
def teach(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tiny: Tiny, seed: int
) -> None:
    """Run the supervised warm-up: next-token loss on the answers, some of them wrong."""
    shown = tiny.lesson(random.Random(seed), tiny.steps * tiny.batch // 8)
    tokens, mask = _examples(shown, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    fixed = tiny.fixed_routers(model)
    for weight in fixed:
        weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, tiny.steps)
    for step in tqdm(range(tiny.steps), desc="warm-up", leave=False):
        for weight in fixed if step % tiny.router_steps == 0 else []:
            torch.nn.init.normal_(weight, std=tiny.router_std or 0.0)
        rows = torch.randint(len(tokens), (tiny.batch,), generator=generator)
        logits = model(tokens[rows], use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[rows, 1:], reduction="none"
        )
        loss = losses[mask[rows, 1:]].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for weight in fixed:
        weight.requires_grad_(True)


def _examples(problems: list[Problem], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Return (n, S) tokens of questions and answers, right-padded, and a mask of the answers."""
    asked = [tokenizer(p.question)["input_ids"] for p in problems]
    answered = [tokenizer(p.answer)["input_ids"] for p in problems]
    width = max(len(q) + len(a) for q, a in zip(asked, answered, strict=True))
    tokens = torch.zeros(len(problems), width, dtype=torch.long)
    mask = torch.zeros(len(problems), width, dtype=torch.bool)
    for row, (q, a) in enumerate(zip(asked, answered, strict=True)):
        tokens[row, : len(q) + len(a)] = torch.tensor(q + a)
        mask[row, len(q) : len(q) + len(a)] = True
    return tokens, mask
