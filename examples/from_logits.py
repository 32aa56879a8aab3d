"""A whole GSPO loop from logits: sample groups of responses, score them, take updates.

The model is small and random, and a response is rewarded for its fraction of even tokens, so that
there is something to learn within seconds. Each line shows the ratio before the first update of a
batch, which is exactly 1, and the fraction of tokens that are clipped in the first and the second
update.

    python examples/from_logits.py
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gspo_ops import GSPO, group_advantages, log_probs_from_logits, policy_loss_from_logits

STEPS, UPDATES = 12, 2
PROMPTS, GROUP, PROMPT_LENGTH, MAX_NEW_TOKENS = 8, 8, 4, 12
VOCABULARY, EOS = 64, 1
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
    eos_token_id=EOS,
)


def sample(model: LlamaForCausalLM) -> tuple[Tensor, Tensor]:
    """Sample responses; return them after their prompts, (B, S), and their mask (B, T)."""
    prompts = torch.randint(2, VOCABULARY, (PROMPTS, PROMPT_LENGTH)).repeat_interleave(GROUP, 0)
    # top_k=0 samples from the whole distribution, whose log-probs are those that are trained
    tokens = model.generate(prompts, do_sample=True, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    is_end = (tokens[:, PROMPT_LENGTH:] == EOS).long()
    return tokens, is_end.cumsum(1) - is_end == 0  # up to and including the first EOS


def response_logits(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Return (B, T, V) logits: row t predicts token t of the response."""
    return model(tokens, use_cache=False).logits[:, PROMPT_LENGTH - 1 : -1]


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        tokens, mask = sample(model)
        targets = tokens[:, PROMPT_LENGTH:]
        rewards = ((targets % 2 == 0) & mask).sum(1) / mask.sum(1)
        advantages = group_advantages(rewards, GROUP)
        with torch.no_grad():  # in the update's own batch shape, so that the first ratio is 1
            old_log_probs = log_probs_from_logits(response_logits(model, tokens), targets)
        seen = []
        for _ in range(UPDATES):
            logits = response_logits(model, tokens)
            loss, stats = policy_loss_from_logits(
                logits, targets, old_log_probs, advantages, mask=mask, objective=GSPO()
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(stats)
        print(
            f"step {step}: reward {rewards.mean():.3f}, "
            f"first ratio {seen[0]['ratio_mean'].item()}, "
            f"clipped {seen[0]['clip_frac_tokens']:.2f} then {seen[-1]['clip_frac_tokens']:.2f}"
        )


if __name__ == "__main__":
    main()
