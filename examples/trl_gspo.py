"""TRL: GSPOTrainer in place of GRPOTrainer, with the GSPO paper's settings.

The config, the rollouts, the rewards and the logs are TRL's; the loss step is fused. The model is small
and random, and a completion is rewarded for its share of even digits. With a model of your own, pass
its name or path, and leave out `use_cpu`, `bf16` and the sizes.

    pip install 'gspo-ops[trl]'
    python examples/trl_gspo.py
"""

import tempfile

from datasets import Dataset
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig

from gspo_ops.integrations.trl import GSPOTrainer

DIGITS = "0123456789"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per digit, after padding and end of sequence."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *DIGITS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def even_digits(completions: list[str], **_: object) -> list[float]:
    """The share of even digits in each completion."""
    return [sum(c in "02468" for c in text) / max(len(text), 1) for text in completions]


def main() -> None:
    set_seed(0)
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            # GSPO, as in its paper
            importance_sampling_level="sequence", loss_type="grpo", epsilon=3e-4, epsilon_high=4e-4,
            beta=0.0, steps_per_generation=2,
            # small enough for a CPU
            output_dir=out, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            per_device_train_batch_size=16, num_generations=8, max_completion_length=8,
            learning_rate=3e-3, max_steps=20, logging_steps=2, disable_tqdm=True,
        )  # fmt: skip
        trainer = GSPOTrainer(
            model=make_model(tokenizer), processing_class=tokenizer, reward_funcs=even_digits,
            train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(64)]), args=config,
        )  # fmt: skip
        trainer.train()
    for log in trainer.state.log_history:
        if "reward" in log:
            print(f"step {log['step']}: reward {float(log['reward']):.3f}, "
                  f"rows with a gradient {float(log['gspo_ops/active_token_frac']):.2f}")


if __name__ == "__main__":
    main()
