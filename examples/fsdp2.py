"""Two processes that shard a model with FSDP2, each with its own part of the batch.

`loss_from_model` takes the sharded model as it is. One denominator for all processes makes the
averaged gradient that of the whole batch, even though they have 2 and 6 of its 8 sequences. The
first process compares the gradient with that of an unsharded copy on the whole batch.

    torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from gspo_ops import GSPO, global_denominator
from gspo_ops.integrations.transformers import log_probs_from_model, loss_from_model
from gspo_ops.testing import relative

B, S, T, STEPS = 8, 16, 12, 3
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)


def policy_loss(model: LlamaForCausalLM, batch: dict[str, Tensor], **options: Any) -> Tensor:
    inputs = {"input_ids": batch["tokens"]}
    of_batch = {"advantages": batch["advantages"], "mask": batch["mask"]}
    return loss_from_model(model, inputs, objective=GSPO(), **of_batch, **options).loss


def main() -> None:
    dist.init_process_group("gloo")
    is_first = dist.get_rank() == 0
    torch.manual_seed(0)  # all processes draw the same weights and the same batch
    model = LlamaForCausalLM(CONFIG)
    whole = {
        "tokens": torch.randint(64, (B, S)),
        "advantages": torch.randn(B),
        "mask": torch.arange(T) < torch.randint(4, T + 1, (B, 1)),
    }
    unsharded = copy.deepcopy(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    mine = {name: x[:2] if is_first else x[2:] for name, x in whole.items()}
    denominator = global_denominator([{"mask": mine["mask"]}], group=dist.group.WORLD)
    with torch.no_grad():
        old = log_probs_from_model(model, {"input_ids": mine["tokens"]}, T)
    for step in range(STEPS):
        loss = policy_loss(model, mine, old_log_probs=old, denominator=denominator)
        loss.backward()
        gradient = model.lm_head.weight.grad.full_tensor()
        dist.all_reduce(mean := loss.detach() / dist.get_world_size())
        if is_first and step == 0:
            policy_loss(unsharded, whole, old_log_probs=None, denominator=float(B)).backward()
            error = relative(gradient, unsharded.lm_head.weight.grad)
            print(f"gradient off by {error:.1e} from that of one process with the whole batch")
        if is_first:
            print(f"step {step}: loss {mean.item():+.6f}")
        optimizer.step()
        optimizer.zero_grad()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
