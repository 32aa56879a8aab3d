"""Sample responses in batches, and compute the hidden states that predict them.

For sampling, prompts are padded on the left, so that all responses start at the same column:

    tokens  [PAD PAD p p p | r r r PAD]      prompts (Q, P), responses (B, T), B = Q * G

For training, a prompt and its G responses share one row, so that the prompt, which has most of the
tokens, is run once instead of G times. Each response sees the prompt and itself, at the positions
at which it was sampled:

    tokens  [PAD PAD p p p | r r r PAD | r r PAD PAD | ...]      (Q, P + G * T)

This fails for models with attention windows, recurrent states or distances between columns; they
get one row per response. A comparison with the model's own log-probs decides between the layouts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from .. import log_probs_from_logits
from ..integrations.heads import hidden_to, output_head
from ..integrations.transformers import log_probs_from_model

Autocast = Callable[[], AbstractContextManager]
RowLayout = Literal["shared", "separate"]
# Mean distance over tokens, in nats, from the model's own log-probs in fp32. A wrong mask causes
# more; rounding causes less, even where it changes a token's expert.
LARGEST_DISTANCE = 1e-3


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, newline: bool, chat: bool
) -> Tensor:
    """Return the (S,) tokens that end a response.

    Args:
        tokenizer: the model's tokenizer, whose EOS token is included.
        model: the model; the EOS tokens of its generation config are included.
        newline: whether to include all tokens that contain a newline.
        chat: whether to include the token that ends a message in the chat template.

    Raises:
        ValueError: there are none.
    """
    found = {tokenizer.eos_token_id}
    configured = getattr(model, "generation_config", None)
    eos = getattr(configured, "eos_token_id", None)
    found |= set(eos) if isinstance(eos, list) else {eos}
    if chat:
        found |= _end_of_message(tokenizer)
    if newline:
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        found |= {i for i, text in enumerate(texts) if "\n" in text}
    ids = sorted(x for x in found if x is not None)
    if not ids:
        raise ValueError("rollout.stop: neither the tokenizer nor the model has an EOS token")
    return torch.tensor(ids, device=model.device)


def _end_of_message(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special token after an answer in the chat template, if there is one."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    behind = tokenizer(text.rpartition("!")[2], add_special_tokens=False)["input_ids"]
    return {token for token in behind[:1] if token in tokenizer.all_special_ids}


class Rollout(NamedTuple):
    """Q prompts with G sampled responses each, B = Q * G in total.

    Attributes:
        prompts: (Q, P) token ids, padded on the left.
        prompt_mask: (Q, P) bool, True at prompt tokens.
        responses: (B, T) token ids, padded on the right; a prompt's responses are consecutive.
        real: (B, T) bool, True where there is no padding.
        turn: (B, T) turn in which a token was sampled, from 0; -1 at the tokens of later questions
            and at padding.
        log_probs: (B, T) fp32 log-probs of the sampled tokens, from sampling; 0 elsewhere.
    """

    prompts: Tensor
    prompt_mask: Tensor
    responses: Tensor
    real: Tensor
    turn: Tensor
    log_probs: Tensor

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, True at sampled tokens, stop tokens included."""
        return self.turn >= 0

    @property
    def group_size(self) -> int:
        return len(self.responses) // len(self.prompts)

    def split(self, parts: int) -> list[Rollout]:
        """Split into consecutive parts of equally many whole groups; all keep the padded shape."""
        chunks = [tensor.chunk(parts) for tensor in self]
        return [Rollout(*part) for part in zip(*chunks, strict=True)]

    def select(self, groups: Tensor) -> Rollout:
        """Select the groups with these (n,) numbers."""
        members = torch.arange(self.group_size, device=groups.device)
        rows = (groups[:, None] * self.group_size + members).view(-1)
        return Rollout(*(x[groups if x.shape[0] == len(self.prompts) else rows] for x in self))

    def stand_in(self) -> Rollout:
        """Return a one-token prompt and response, for a forward when no group has a gradient."""
        first = Rollout(*(x[:1] for x in self))
        prompts, mask = first.prompts[:, -1:], first.prompt_mask[:, -1:]
        return Rollout(prompts, mask, *(x[:, :1] for x in first[2:]))

    def targets(self) -> Tensor:
        """Return the (N,) sampled tokens, packed."""
        return self.responses[self.mask]

    def cu_seqlens(self) -> Tensor:
        """Return (B+1,) int32 offsets of the responses in the packed rows."""
        return pad(self.mask.sum(1).cumsum(0), (1, 0)).int()


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Concatenate rollouts, padded to a common shape."""
    columns = {}
    for name, parts in zip(Rollout._fields, zip(*rollouts, strict=True), strict=True):
        widest = max(part.shape[1] for part in parts)
        sides = [(widest - part.shape[1], 0) for part in parts]  # prompts are padded on the left
        if not name.startswith("prompt"):
            sides = [side[::-1] for side in sides]
        padded = (pad(x, side, value=_fill(name)) for x, side in zip(parts, sides, strict=True))
        columns[name] = torch.cat(list(padded))
    return Rollout(**columns)


def append_turn(rollout: Rollout, questions: Sequence[Sequence[int]], answers: Rollout) -> Rollout:
    """Append the next turn to each response.

    Args:
        rollout: B responses so far.
        questions: tokens of the next question for each response.
        answers: one response to each of these questions.

    Returns:
        The longer rollout; the tokens of the questions are real but were not sampled.
    """
    longer = {}
    for name in ("responses", "real", "turn", "log_probs"):
        old, new = getattr(rollout, name), getattr(answers, name)
        if name == "turn":
            new = new + 1 + rollout.turn.max()
        rows = []
        for b, question in enumerate(questions):
            asked = {"responses": question, "real": [True] * len(question)}.get(
                name, [_fill(name)] * len(question)
            )
            parts = old[b, rollout.real[b]], old.new_tensor(asked), new[b, answers.real[b]]
            rows.append(torch.cat(parts))
        longer[name] = pad_sequence(rows, batch_first=True, padding_value=_fill(name))
    return rollout._replace(**longer)


def _fill(name: str) -> int:
    """Return the padding value of a rollout's field; masks, not a token id, mark padding."""
    return -1 if name == "turn" else 0


def autocast(device: torch.device, dtype: str) -> Autocast:
    """Return a function that makes the context for the body: `"bfloat16"` or `"float32"`."""
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stops: Tensor,
    *,
    group_size: int = 1,
    max_new_tokens: int,
    temperature: float,
    autocast: Autocast,
    generator: torch.Generator | None = None,
    bar: bool = False,
) -> Rollout:
    """Sample responses of at least one token with a KV cache, from the whole vocabulary.

    Args:
        model: a causal language model.
        prompts: token ids of Q prompts.
        stops: (S,) tokens that end a response.
        group_size: number of responses per prompt, G.
        max_new_tokens: maximum length of a response, in tokens, including the stop token.
        temperature: divisor of the logits; 0 takes the likeliest token.
        autocast: function that makes the context in which the model's body runs.
        generator: generator of the random numbers.
        bar: show progress, in tokens of the longest response so far.

    Returns:
        The rollout; T is the length of the longest sampled response.

    Raises:
        FloatingPointError: logits are NaN or infinite.
    """
    prompt_tokens, prompt_mask = _pad_left(prompts, model.device)
    cache = DynamicCache(config=model.config)
    cached: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    hidden = _hidden(model, autocast, prompt_tokens, prompt_mask, _positions(prompt_mask), **cached)
    # Each prompt is run once for its whole group.
    cache.batch_repeat_interleave(group_size)
    last = hidden[:, -1].repeat_interleave(group_size, 0)
    attention = prompt_mask.repeat_interleave(group_size, 0)

    rows = torch.arange(len(last), device=model.device)  # the responses that have not ended
    responses = rows.new_zeros(len(rows), max_new_tokens)
    turn = torch.full_like(responses, -1)
    log_probs = responses.new_zeros(responses.shape, dtype=torch.float32)
    with tqdm(range(max_new_tokens), desc="rollout", leave=False, disable=not bar) as places:
        for t in places:
            logits = output_head(model).logits(last)
            chosen = _choose(logits, temperature, generator)
            responses[rows, t] = chosen
            turn[rows, t] = 0
            log_probs[rows, t] = log_probs_from_logits(
                logits, chosen, temperature=temperature or 1.0
            )

            going = (~torch.isin(chosen, stops)).nonzero().squeeze(1)
            if t + 1 == max_new_tokens or not len(going):
                break
            rows, attention = rows[going], pad(attention[going], (0, 1), value=True)
            cache.batch_select_indices(going)
            position = attention.sum(1, keepdim=True) - 1
            last = _hidden(model, autocast, chosen[going, None], attention, position, **cached)[
                :, -1
            ]
    sampled = (x[:, : t + 1] for x in (responses, turn >= 0, turn, log_probs))
    return Rollout(prompt_tokens, prompt_mask, *sampled)


def response_hidden(
    model: PreTrainedModel, rollout: Rollout, autocast: Autocast, layout: RowLayout = "shared"
) -> Tensor:
    """Compute the last hidden states, from which the head predicts the response tokens.

    Args:
        model: a causal language model.
        rollout: prompts and responses.
        autocast: function that makes the context in which the model's body runs.
        layout: `"shared"`, one row for a prompt and its responses, for models whose layers all see
            everything before a token; or `"separate"`, one row per response.

    Returns:
        (N, H) hidden states in the body's dtype; row t predicts `rollout.targets()[t]`. Rows of
        prompts and padding, which would be the majority, are left out.
    """
    return (_shared if layout == "shared" else _separate)(model, rollout, autocast)


def real_tokens(rollout: Rollout, layout: RowLayout) -> Tensor:
    """Return (rows, columns) bool: where the rows of `response_hidden` have no padding."""
    prompts, rows = rollout.prompt_mask, len(rollout.prompts)
    if layout == "separate":
        prompts, rows = prompts.repeat_interleave(rollout.group_size, 0), len(rollout.responses)
    return torch.cat([prompts, rollout.real.reshape(rows, -1)], 1)


def _shared(model: PreTrainedModel, rollout: Rollout, autocast: Autocast) -> Tensor:
    (prompts, width), (count, length) = rollout.prompts.shape, rollout.responses.shape
    tokens = torch.cat([rollout.prompts, rollout.responses.reshape(prompts, -1)], 1)
    real = real_tokens(rollout, "shared")
    column = torch.arange(tokens.shape[1], device=tokens.device)
    # The response that each column belongs to (-1: the prompt), and its place in the response.
    response = (column - width).div(length, rounding_mode="floor").clamp(min=-1)
    place = column - width - response.clamp(min=0) * length
    positions = _positions(rollout.prompt_mask)
    positions = torch.cat([positions, positions[:, -1:] + 1 + place[width:]], 1)
    hidden = _hidden(model, autocast, tokens, _tree_mask(real, response), positions)
    # A token's state predicts the next token; the prompt's last predicts each response's first.
    before = torch.where(place == 0, width - 1, column - 1)[width:]
    return hidden[:, before].view(count, length, -1)[rollout.mask]


def _separate(model: PreTrainedModel, rollout: Rollout, autocast: Autocast) -> Tensor:
    prompts = rollout.prompts.repeat_interleave(rollout.group_size, 0)
    tokens = torch.cat([prompts, rollout.responses], 1)
    real = real_tokens(rollout, "separate")
    hidden = _hidden(model, autocast, tokens, real, _positions(real))
    return hidden[:, prompts.shape[1] - 1 : -1][rollout.mask]


def _hidden(
    model: PreTrainedModel, autocast: Autocast, tokens: Tensor, mask: Tensor, positions: Tensor,
    **options: Any,
) -> Tensor:  # fmt: skip
    """Compute the head's input (B, S, H); models without positions, as with ALiBi, get none."""
    own = partial(type(model).forward, model)  # because this already runs within a forward
    batch = {"input_ids": tokens, "attention_mask": mask, **options}
    if "position_ids" in inspect.signature(own).parameters:
        batch["position_ids"] = positions
    with autocast():
        return hidden_to(model, batch, lambda head, hidden, output: hidden, within=own)


@torch.no_grad()
def own_log_probs(model: Any, rollout: Rollout, temperature: float) -> Tensor:
    """Compute the model's own (N,) log-probs: one response at a time, without padding or cache."""

    def of(b: int) -> Tensor:
        q = b // rollout.group_size
        prompt = rollout.prompts[q, rollout.prompt_mask[q]]
        ids = torch.cat([prompt, rollout.responses[b, rollout.real[b]]])[None]
        found = log_probs_from_model(
            model, {"input_ids": ids}, ids.shape[1] - len(prompt), temperature=temperature
        )
        return found[0, rollout.mask[b, rollout.real[b]]]

    return torch.cat([of(b) for b in range(len(rollout.responses))])


def check_sampling(model: PreTrainedModel) -> None:
    """Refuse a model that can't be sampled in padded batches with a cache.

    Raises:
        ValueError: the log-probs of sampled tokens are not the model's own, or the model fails.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = [[(7 * i + 5) % vocabulary for i in range(n)] for n in (4, 9)]
    stops = torch.empty(0, dtype=torch.long, device=model.device)
    numbers = torch.Generator(model.device).manual_seed(0)
    try:
        rollout = generate(
            model, ids, stops, group_size=2, max_new_tokens=4, temperature=1.0,
            autocast=nullcontext, generator=numbers,
        )  # fmt: skip
        sampled = rollout.log_probs[rollout.mask]
        distance = (sampled - own_log_probs(model, rollout, 1.0)).abs().mean().item()
    except FloatingPointError:  # due to the weights: sampling reports it later
        return
    except Exception as error:
        raise ValueError(
            f"model.name: {type(model).__name__} can't be sampled in padded batches with a cache: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not distance <= LARGEST_DISTANCE:
        raise ValueError(
            f"model.name: the log-probs of {type(model).__name__} in padded batches with a cache "
            f"differ by {distance:.2g} nats from those without padding and cache"
        )


def _tree_mask(real: Tensor, response: Tensor) -> Tensor:
    """Return (Q, 1, S, S) bool: which tokens (last dimension) each token attends to.

    Args:
        real: (Q, S) bool, False at padding.
        response: (S,) response that a column belongs to, -1 for the prompt.
    """
    causal = torch.ones(len(response), len(response), device=real.device).tril().bool()
    lineage = (response == -1) | (response == response[:, None])
    # Padding attends to itself: attending to nothing gives NaN in some attention kernels.
    itself = torch.eye(len(response), dtype=torch.bool, device=real.device)
    return ((causal & lineage & real[:, None, :]) | itself)[:, None]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Choose (B,) tokens, one per row of (B, V) logits."""
    if not bool(logits.amax(-1).isfinite().all()):
        raise FloatingPointError("logits are not finite during sampling")
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (B, P) tokens, padded on the left, and their bool mask."""
    width = max(map(len, prompts))
    tokens = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _positions(mask: Tensor) -> Tensor:
    """Return positions counted from each row's first real token, whatever padding precedes it."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)
