"""A mixture of experts with Routing Replay: each token keeps the experts of the old policy.

An update moves the router too, and the log-prob of a token that is then sent to other experts jumps
by more than the update itself changes it. The experts are recorded with the old log-probs and
replayed in the updates; their weights come from the live router, which still gets its gradient.
GRPO on such a model needs this, according to the GSPO paper (arXiv 2507.18071), and GSPO does not.

    python examples/moe_routing_replay.py
"""

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_ops import GRPO
from gspo_ops.integrations.transformers import log_probs_from_model, loss_from_model
from gspo_ops.trainer.routing_replay import RoutingReplay, expert_churn

B, S, T, UPDATES = 16, 24, 16, 3
CONFIG = Qwen3MoeConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    initializer_range=0.3,  # so that it matters which experts a token has
    pad_token_id=0,
)


@torch.no_grad()
def recorded(model: Qwen3MoeForCausalLM, batch: dict[str, Tensor]) -> tuple[RoutingReplay, Tensor]:
    """Return the experts of each token, and the log-probs (B, T) of the responses."""
    routing = RoutingReplay()
    with routing.record(model):
        log_probs = log_probs_from_model(model, batch, T)
    return routing, log_probs


def main() -> None:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = {"input_ids": torch.randint(1, 64, (B, S))}
    advantages, mask = torch.randn(B), torch.ones(B, T)
    log_probs_from_model(model, batch, T)  # the first call also runs the model, to examine its head
    routing, old_log_probs = recorded(model, batch)
    for update in range(UPDATES):
        with routing.replay(model):  # the backward too, for gradient checkpointing
            loss, stats = loss_from_model(
                model, batch, old_log_probs, advantages, mask=mask, objective=GRPO(), skip="none"
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        now, native = recorded(model, batch)
        with torch.no_grad(), routing.replay(model):
            replayed = log_probs_from_model(model, batch, T)
        jumps = [(x - old_log_probs).abs().max().item() for x in (replayed, native)]
        print(
            f"update {update}: ratios {stats['ratio_min']:.8g} to {stats['ratio_max']:.8g}; "
            f"{expert_churn(routing, now):.1%} of the experts would change; "
            f"largest change of a log-prob {jumps[0]:.3f} with replay, {jumps[1]:.3f} without"
        )


if __name__ == "__main__":
    main()
