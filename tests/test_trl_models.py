"""Models of several kinds have the same losses when both trainers train them from one seed."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("trl") is None:
    pytest.skip("needs trl: pip install 'gspo-ops[trl]'", allow_module_level=True)
import transformers
from datasets import Dataset
from PIL import Image
from trl import GRPOTrainer
from trl_inputs import trainer_of

from gspo_ops.integrations.trl import GSPOTrainer
from gspo_ops.trainer.tiny import character_tokenizer

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ={% endif %}"
)


def qwen3_moe():
    tokenizer = character_tokenizer()
    config = transformers.Qwen3MoeConfig(
        **SIZES, vocab_size=len(tokenizer), num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, router_aux_loss_coef=0.1,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config), tokenizer


def gpt_oss():
    tokenizer = character_tokenizer()
    config = transformers.GptOssConfig(
        **SIZES, vocab_size=len(tokenizer), num_local_experts=4, num_experts_per_tok=2,
        router_aux_loss_coef=0.1, sliding_window=4,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config), tokenizer


def tokenizer_with(**names):
    """Return a tokenizer with tokens for images, each of which is an attribute too."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=character_tokenizer().backend_tokenizer, pad_token="<pad>",
        eos_token="<eos>", unk_token="<unk>", clean_up_tokenization_spaces=False,
        extra_special_tokens=names,
    )  # fmt: skip


class ProcessorOfImages(transformers.Qwen2_5_VLProcessor):
    """A processor without videos, which would need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.video_token, self.video_token_id = tokenizer.video_token, tokenizer.video_token_id
        transformers.ProcessorMixin.__init__(
            self, image_processor, tokenizer, chat_template=chat_template
        )


def qwen2_5_vl():
    tokenizer = tokenizer_with(
        image_token="<|image_pad|>", video_token="<|video_pad|>",
        start_token="<|vision_start|>", end_token="<|vision_end|>",
    )  # fmt: skip
    text = SIZES | {
        "vocab_size": len(tokenizer),
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 32, "spatial_merge_size": 1, "fullatt_block_indexes": [1],
        "window_size": 8, "initializer_range": 0.2,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id, vision_start_token_id=tokenizer.start_token_id,
        vision_end_token_id=tokenizer.end_token_id,
    )  # fmt: skip
    processor = ProcessorOfImages(
        transformers.Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=1, temporal_patch_size=2, min_pixels=64, max_pixels=64
        ),
        tokenizer,
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def gemma3():
    tokenizer = tokenizer_with(boi_token="<boi>", eoi_token="<eoi>", image_token="<image>")
    text = SIZES | {"vocab_size": len(tokenizer), "sliding_window": 8, "query_pre_attn_scalar": 8}
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, initializer_range=0.2,
        image_token_id=tokenizer.image_token_id, boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id, eos_token_id=1,
    )  # fmt: skip
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessorPil(size={"height": 8, "width": 8}),
        tokenizer,
        chat_template=TEMPLATE.replace("IMAGE", "<boi>"),
        image_seq_length=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def asked_about_images():
    colours = [(40 * i % 256, 90 * i % 256, 17 * i % 256) for i in range(12)]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"what is {i}"}],
            "images": [Image.new("RGB", (8, 8), colour)] * (i % 3),
        }
        for i, colour in enumerate(colours)
    ]
    return Dataset.from_list(rows)


def reward(completions, **_):
    texts = (x if isinstance(x, str) else x[0]["content"] for x in completions)
    return [float(sum(map(ord, text)) % 7) for text in texts]


# These lack top_entropy_quantile: the first tokens of a group have one entropy, and rounding
# decides where the quantile falls among them. test_trl_draws.py tests it.
SETTINGS = {
    "defaults": {},
    "KL": {"beta": 0.1, "num_iterations": 2},
    "of log-probs": {
        "loss_type": "vespo", "entropy_coef": 0.1, "off_policy_mask_threshold": 0.1,
        "num_iterations": 2,
    },
    "by TRL": {"use_adaptive_entropy": True, "entropy_coef": 0.1, "num_iterations": 2},
}  # fmt: skip


def assert_same_runs(model, processor, out, **options):
    """Check three steps of a saved model, as TRL loads the reference model from the same place."""
    model.save_pretrained(out / "model")
    logs = []
    for kind in (GRPOTrainer, GSPOTrainer):
        trainer = trainer_of(
            str(out / "model"), out, kind, processing_class=processor, reward_funcs=reward,
            learning_rate=1e-4, **options,
        )  # fmt: skip
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "loss" in row])
    assert len(logs[0]) == len(logs[1]) == 3
    assert any(row["grad_norm"] > 0 for row in logs[0])
    for theirs, ours in zip(*logs, strict=True):
        assert theirs.keys() <= ours.keys()
        for name in ("loss", "aux_loss", "kl", "entropy_coef", "policy_loss", "reward"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    return trainer.model


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("make", [qwen3_moe, gpt_oss, qwen2_5_vl, gemma3])
def test_three_steps(make, settings, tmp_path):
    torch.manual_seed(0)
    model, processor = make()
    sees = isinstance(processor, transformers.ProcessorMixin)
    trained = assert_same_runs(
        model, processor, tmp_path, train_dataset=asked_about_images() if sees else None,
        gradient_checkpointing=True, **settings,
    )  # fmt: skip
    for name, before in model.named_parameters():
        if "patch_embed" in name and name.endswith("weight"):  # of the vision tower
            assert not torch.equal(trained.get_parameter(name), before)


def llama():
    tokenizer = character_tokenizer()
    config = transformers.LlamaConfig(**SIZES, vocab_size=len(tokenizer))
    return transformers.LlamaForCausalLM(config), tokenizer


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning", "PromptEncoder"])
def test_prompt_learning(kind, settings, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert_same_runs(*llama(), tmp_path, peft_config=config, **settings)


@pytest.mark.parametrize("settings", ["defaults", "of log-probs"])
def test_compiled(settings, tmp_path):
    torch.manual_seed(0)
    torch._dynamo.reset()
    assert_same_runs(
        *llama(), tmp_path, torch_compile=True, torch_compile_backend="eager",
        **SETTINGS[settings],
    )  # fmt: skip
