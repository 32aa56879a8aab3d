"""An on-policy loop from hidden states: the N x V logits of an update never exist.

The body of the model runs, its head is not called, and the op takes the head's weight. One update
per batch is on-policy, so no old log-probs are needed. The batch is trained in micro-batches, whose
losses add up to that of the whole batch because they share one denominator. A response is rewarded
for its fraction of even tokens.

    python examples/from_hidden_states.py
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gspo_ops import GSPO, group_advantages, plan_from_hidden, policy_loss_from_hidden

STEPS, MICRO_BATCHES = 12, 4
PROMPTS, GROUP, PROMPT_LENGTH, T = 8, 8, 4, 12
VOCABULARY = 512
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
    eos_token_id=None,  # all responses have T tokens
)


def sample(model: LlamaForCausalLM) -> Tensor:
    """Sample responses; return them after their prompts, (B, S)."""
    prompts = torch.randint(1, VOCABULARY, (PROMPTS, PROMPT_LENGTH)).repeat_interleave(GROUP, 0)
    return model.generate(prompts, do_sample=True, top_k=0, max_new_tokens=T)


def response_hidden(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Return (B, T, H) hidden states: row t predicts token t of the response."""
    output = model.model(tokens, use_cache=False)
    return output.last_hidden_state[:, PROMPT_LENGTH - 1 : -1]


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    weight = model.lm_head.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        tokens = sample(model)
        targets = tokens[:, PROMPT_LENGTH:]
        rewards = (targets % 2 == 0).float().mean(1)
        advantages = group_advantages(rewards, GROUP)
        for rows in torch.arange(len(tokens)).chunk(MICRO_BATCHES):
            hidden = response_hidden(model, tokens[rows])
            loss, stats = policy_loss_from_hidden(
                hidden,
                weight,
                targets[rows],
                None,  # on-policy
                advantages[rows],
                objective=GSPO(),
                denominator=float(len(tokens)),
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: reward {rewards.mean():.3f}, ratio {stats['ratio_mean'].item()}")
    print(plan_from_hidden(hidden, weight))


if __name__ == "__main__":
    main()
