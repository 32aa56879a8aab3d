"""Two small models that learn on a CPU in minutes: a Qwen3-MoE and a dense Qwen3 like it.

They read characters. A short supervised warm-up teaches them one-digit sums, with so many wrong
answers among the right ones that they know the sums but do not rely on it: from there a policy
gradient has something to reinforce, and what it reinforces carries over to held-out problems (which
the warm-up, unlike the policy gradient, has seen).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

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
from .tasks import Problem, make_task

TINY = ("tiny-moe", "tiny-dense")
_VERSION = 1  # of what the cache holds
_CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
_LAYERS, _HIDDEN, _EXPERTS, _TOP_K, _EXPERT_SIZE = 4, 128, 8, 2, 128
_STEPS, _BATCH, _LEARNING_RATE, _RIGHT = 500, 128, 3e-3, 0.6


def tiny_directory(name: str, cache: Path) -> Path:
    """Directory of a tiny model, made and taught on the first call.

    Args:
        name: `"tiny-moe"` or `"tiny-dense"`.
        cache: where it stays.

    Returns:
        A directory that `AutoModelForCausalLM` and `AutoTokenizer` load.
    """
    directory = cache / f"{name}-{_VERSION}"
    if directory.is_dir():
        return directory
    tokenizer = character_tokenizer()
    model = build(name, seed=0)
    teach(model, tokenizer, seed=0)
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=name, dir=cache))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.replace(partial, directory)
    except OSError:
        if not directory.is_dir():  # another process may have finished first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and newline, after PAD, EOS and UNK."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build(name: str, seed: int) -> PreTrainedModel:
    """The untaught model; the dense one has as many weights as the other uses per token."""
    sizes = {
        "vocab_size": 3 + len(_CHARACTERS), "hidden_size": _HIDDEN, "num_hidden_layers": _LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    torch.manual_seed(seed)
    if name == "tiny-dense":
        config = Qwen3Config(**sizes, intermediate_size=_TOP_K * _EXPERT_SIZE)
        return Qwen3ForCausalLM(config).eval()
    config = Qwen3MoeConfig(
        **sizes, intermediate_size=_EXPERT_SIZE, moe_intermediate_size=_EXPERT_SIZE,
        num_experts=_EXPERTS, num_experts_per_tok=_TOP_K, norm_topk_prob=True,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


@torch.enable_grad()  # whatever it is asked for from
def teach(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """The supervised warm-up: next-token loss on the answers, most of them those of others."""
    task = make_task(TaskConfig(name="digit_sums", examples=0, train_size=150, eval_size=2), seed)
    problems = [*task.train, *task.held_out]
    chance = random.Random(seed)
    shown = []
    for problem in chance.choices(problems, k=_STEPS * _BATCH // 8):
        answer = problem.answer if chance.random() < _RIGHT else chance.choice(problems).answer
        shown.append(Problem(problem.question, answer))
    tokens, mask = _examples(shown, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, _STEPS)
    for _ in tqdm(range(_STEPS), desc="warm-up", leave=False):
        rows = torch.randint(len(tokens), (_BATCH,), generator=generator)
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


def _examples(problems: list[Problem], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """(n, S) questions with their answers, padded on the right, and where the answers are."""
    asked = [tokenizer(p.question)["input_ids"] for p in problems]
    answered = [tokenizer(f" {p.answer}\n")["input_ids"] for p in problems]
    width = max(len(q) + len(a) for q, a in zip(asked, answered, strict=True))
    tokens = torch.zeros(len(problems), width, dtype=torch.long)
    mask = torch.zeros(len(problems), width, dtype=torch.bool)
    for row, (q, a) in enumerate(zip(asked, answered, strict=True)):
        tokens[row, : len(q) + len(a)] = torch.tensor(q + a)
        mask[row, len(q) : len(q) + len(a)] = True
    return tokens, mask
