"""Packed sequences: responses of different lengths in one row, without padding.

Prompts and responses lie one after another in a single row of tokens, with positions that start
again at each sequence. The loss takes the rows that predict response tokens, and `cu_seqlens` says
where each response begins, as in FlashAttention. Loss and gradient are those of the padded batch.

    python examples/packed.py
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from gspo_ops import policy_loss_from_hidden
from gspo_ops.integrations.transformers import loss_from_model
from gspo_ops.testing import relative

VOCABULARY, PROMPT_LENGTH, LENGTHS = 64, 4, torch.tensor([3, 17, 8, 1, 12])
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)


def packed_loss(model: LlamaForCausalLM, sequences: list[Tensor], advantages: Tensor) -> Tensor:
    tokens = torch.cat(sequences)
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    output = model.model(tokens[None], position_ids=positions[None], use_cache=False)
    is_response = positions >= PROMPT_LENGTH
    hidden = output.last_hidden_state[0, is_response.roll(-1)]  # the row before predicts a token
    targets = tokens[is_response]
    return policy_loss_from_hidden(
        hidden,  # (N, H)
        model.lm_head.weight,
        targets,
        uniform_log_probs(targets),
        advantages,
        cu_seqlens=pad(LENGTHS.cumsum(0), (1, 0)).int(),
    ).loss


def padded_loss(model: LlamaForCausalLM, sequences: list[Tensor], advantages: Tensor) -> Tensor:
    tokens = pad_sequence(sequences, batch_first=True)
    mask = torch.arange(LENGTHS.max()) < LENGTHS[:, None]
    old_log_probs = uniform_log_probs(mask)
    return loss_from_model(model, {"input_ids": tokens}, old_log_probs, advantages, mask=mask).loss


def uniform_log_probs(tokens: Tensor) -> Tensor:
    """Return log-probs of a uniform policy: the model's ratios to it lie on both sides of 1."""
    return torch.full(tokens.shape, -math.log(VOCABULARY))


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    sequences = [torch.randint(VOCABULARY, (PROMPT_LENGTH + n,)) for n in LENGTHS.tolist()]
    advantages = torch.tensor([1.0, -0.5, 0.8, -1.2, 0.3])
    losses, gradients = [], []
    for loss_of in (padded_loss, packed_loss):
        loss = loss_of(model, sequences, advantages)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(loss.item())
        gradients.append(torch.cat([grad.flatten() for grad in grads]))
    print(f"rows: {len(LENGTHS) * LENGTHS.max()} padded, {LENGTHS.sum()} packed")
    print(f"loss: {losses[0]:.6f} padded, {losses[1]:.6f} packed")
    print(f"gradients differ by {relative(*gradients):.1e}")


if __name__ == "__main__":
    main()
