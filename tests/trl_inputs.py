"""TRL trainers on tiny models, shared by several test files."""

from datasets import Dataset
from trl import GRPOConfig

from gspo_ops.trainer.tiny import character_tokenizer


def reward(completions, **_):
    return [float(len(set(completion)) % 3) for completion in completions]


def trainer_of(
    model, out, kind, peft_config=None, processing_class=None, reward_funcs=reward,
    train_dataset=None, **options,
):  # fmt: skip
    settings = {
        "output_dir": str(out), "per_device_train_batch_size": 4, "num_generations": 4,
        "max_completion_length": 6, "use_cpu": True, "bf16": False, "report_to": "none",
        "learning_rate": 1e-2, "max_steps": 3, "logging_steps": 1, "save_strategy": "no",
        "seed": 0, "disable_dropout": True, "model_init_kwargs": {"dtype": "float32"},
        "gradient_checkpointing": False, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    prompts = [{"prompt": f"{i} + {i} ="} for i in range(40)]
    return kind(
        model=model,
        reward_funcs=reward_funcs,
        args=GRPOConfig(**settings | options),
        train_dataset=train_dataset or Dataset.from_list(prompts),
        eval_dataset=Dataset.from_list(prompts[:2]),
        processing_class=processing_class or character_tokenizer(),
        peft_config=peft_config,
    )  # fmt: skip
