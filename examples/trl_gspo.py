"""TRL: GSPOTrainer in place of GRPOTrainer, with the GSPO paper's settings.

The config, the rollouts, the rewards and the logs are TRL's; the loss step is fused. The model is
small and random, and a completion is rewarded for its fraction of even digits. With a model of your
own, pass its name or path, and leave out `use_cpu`, `bf16` and the sizes.

    pip install '.[trl]'  # in a clone
    python examples/trl_gspo.py
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig

from gspo_ops.integrations.trl import GSPOTrainer

VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789"])}
CONFIG = LlamaConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
    eos_token_id=1,
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per digit."""
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def even_digits(completions: list[str], **_: object) -> list[float]:
    """Return the fraction of even digits in each completion."""
    return [sum(c in "02468" for c in text) / max(len(text), 1) for text in completions]


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            # GSPO, as in its paper
            importance_sampling_level="sequence", loss_type="grpo", epsilon=3e-4, epsilon_high=4e-4,
            beta=0.0, steps_per_generation=4,
            # small enough for a CPU
            output_dir=out, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            per_device_train_batch_size=16, num_generations=8, max_completion_length=8,
            learning_rate=1e-2, lr_scheduler_type="constant", max_steps=40, logging_steps=4,
            gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = GSPOTrainer(
            model=LlamaForCausalLM(CONFIG), processing_class=make_tokenizer(), args=config,
            reward_funcs=even_digits,
            train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(64)]),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for log in trainer.state.log_history:
        if "reward" in log:
            print(
                f"step {log['step']}: reward {float(log['reward']):.3f}, "
                f"rows with a gradient {float(log['gspo_ops/active_token_frac']):.2f}"
            )


if __name__ == "__main__":
    main()
