"""Every causal language model of transformers, small and random: log-probs are those of its logits.

`python tests/test_models.py --write` writes the table of docs/models.md from what stands here.
"""

import inspect

import pytest
import torch

from gspo_ops.integrations.transformers import log_probs_from_model

transformers = pytest.importorskip("transformers")
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)

T = 5
H, HEADS, KV_HEADS, HEAD_DIM, FFN, V = 64, 4, 2, 16, 48, 96

# by the names that configs have for them
SIZES = {
    H: "hidden_size hidden_size_global mamba_d_ssm embedding_dim qk_hidden_size d_model n_embd dim dim_model embedding_size embed_dim decoder_hidden_size "
       "hidden_dim emb_dim projection_dim output_hidden_size out_hidden_size d_embed "
       "decoder_embed_dim width proj_dim lru_width",
    2: "num_experts_per_token num_hidden_layers n_layers n_layer num_layers encoder_layers decoder_layers depth "
       "num_key_value_heads num_kv_heads multi_query_kv_heads num_experts_per_tok "
       "num_decoder_layers num_encoder_layers num_blocks vision_layers num_global_layers "
       "kv_n_heads moe_topk moe_k moe_top_k num_global_key_value_heads swa_num_key_value_heads",
    4: "num_attention_heads linear_num_heads n_mamba_heads attention_heads num_decoder_attention_heads n_heads n_head num_heads encoder_attention_heads "
       "decoder_attention_heads vision_heads num_experts n_routed_experts num_local_experts "
       "moe_num_experts mamba_n_heads mamba_num_heads "
       "linear_num_value_heads linear_num_key_heads index_n_heads index_topk "
       "swa_num_attention_heads num_moe_experts moe_num_local_experts num_moe_local_experts",
    16: "head_dim attention_heads_dim dim_head d_head kv_channels d_kv attention_head_dim v_head_dim qk_rope_head_dim "
        "linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim q_lora_rank "
        "kv_lora_rank index_head_dim global_head_dim rotary_dim swa_head_dim swa_v_head_dimlinear_head_dim mamba_headdim",
    32: "qk_nope_head_dim",
    48: "qk_head_dim intermediate_size n_inner ffn_dim ffn_hidden_size d_ff decoder_ffn_dim encoder_ffn_dim "
        "moe_intermediate_size shared_expert_intermediate_size dim_feedforward d_inner dff dim_ff "
        "expert_ffn_hidden_size shared_intermediate_size intermediate_size_mlp mlp_dim "
        "moe_shared_expert_intermediate_size feed_forward_size moe_ffn_hidden_size "
        "feed_forward_hidden_size projection_hidden_size",
    8: "state_size mamba_d_state ssm_state_size d_state chunk_size mamba_chunk_size sliding_window",
    V: "vocab_size n_words vocab_size_per_layer_input",
    40: "max_position_embeddings n_positions n_ctx n_embd_positions max_seq_len",
    0: "pad_token_id",
    1: "bos_token_id eos_token_id sep_token_id cls_token_id n_group n_groups num_groups mamba_n_groups mamba_ngroups num_query_groups expand mamba_expand topk_group n_shared_experts "
       "first_k_dense_replace num_group num_expert_group num_expert_groups num_shared_experts",
}  # fmt: skip
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
SMALL |= {"is_decoder": True}

ROPE = {"rope_type": "default", "rope_theta": 1e4}
OVERRIDES: dict[str, dict] = {
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": 50},
    "CohereCompassForCausalLM": {
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "DbrxForCausalLM": {
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nForCausalLM": {
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0],
        "hidden_size_per_layer_input": 8,
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "ReformerModelWithLMHead": {
        "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "attention_head_size": 16,
        "hash_seed": 0, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
    },
    "RoCBertForCausalLM": {
        "pronunciation_vocab_size": 16, "shape_vocab_size": 16, "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": {"layer_types": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3, "attention_hidden_size": 128, "attention_head_dim": 32},
    "Zamba2ForCausalLM": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "Gemma4UnifiedForConditionalGeneration": {
        "vision_config": {"mm_embed_dim": 64, "output_proj_dims": 64, "mm_posemb_size": 16}},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}  # fmt: skip


def small_config(kind, overrides):
    """A config of this class with every size small, and of its parts."""
    default = kind()
    known = default.to_dict()
    small = {name: SMALL[name] for name in known if name in SMALL}
    if "kv_lora_rank" in known:
        small["num_key_value_heads"] = HEADS
    for name, part in getattr(kind, "sub_configs", {}).items():
        if getattr(default, name, None) is not None:
            part = type(getattr(default, name))
        if part is not transformers.AutoConfig:
            small[name] = small_config(part, overrides.get(name, {}))
    parts = getattr(kind, "sub_configs", {})
    return kind(**small | {name: x for name, x in overrides.items() if name not in parts})


def make(name, options):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = small_config(kind.config_class, OVERRIDES.get(name, {}) | options)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    assert size < 5e6, f"too large: {size}"
    model = kind(config).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model):
    """No parameter is left at a value that hides what it does, and logits vary by 2."""
    for name, part in [*model.named_parameters(), *model.named_buffers()]:
        if part.is_floating_point() and ("bias" in name or isinstance(part, torch.nn.Parameter)):
            part.add_(0.1 * torch.randn_like(part))
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        head.bias.normal_()
    if hasattr(head, "weight"):
        head.weight.mul_(2 / own_logits(model, make_batch(model)).std())


def make_batch(model):
    ids = torch.randint(2, V, (2, 11), generator=torch.Generator().manual_seed(0))
    names = inspect.signature(model.forward).parameters
    batch = {"input_ids": ids}
    if "attention_mask" in names:
        batch["attention_mask"] = torch.ones_like(ids)
    return batch


def own_logits(model, batch):
    return model(**batch, use_cache=False).logits


def own_log_probs(model, batch):
    log_probs = own_logits(model, batch).double().log_softmax(-1)[:, -T - 1 : -1]
    return log_probs.gather(-1, batch["input_ids"][:, -T:, None])[..., 0]
