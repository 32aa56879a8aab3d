"""Small random models of transformers, compared with the log-probs of their own logits.

Every class for causal language modelling and for text from images is built, refused, or listed in
NOT_BUILT with the reason. `python tests/test_models.py --write` writes this into docs/models.md.
"""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

from gspo_ops.integrations.heads import last_layer
from gspo_ops.integrations.transformers import live_checkpointing, log_probs_from_model
from gspo_ops.testing import relative

transformers = pytest.importorskip("transformers")

NAMES = transformers.models.auto.modeling_auto
CAUSAL = set(NAMES.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
FROM_IMAGES = set(NAMES.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
CLASSES = sorted(CAUSAL | FROM_IMAGES)

T = 5
H, HEADS, V = 64, 4, 96

# by their names in configs
SIZES = {
    H: "d_model decoder_hidden_size emb_dim embed_dim embedding_dim embedding_size hidden_size "
       "hidden_size_global lru_width mamba_d_ssm n_embd out_hidden_size projection_dim",
    2: "decoder_layers depth encoder_layers kv_n_heads moe_k moe_top_k moe_topk n_layer "
       "n_layers num_blocks num_decoder_layers num_encoder_layers num_experts_per_tok "
       "num_experts_per_token num_global_layers num_hidden_layers num_key_value_heads "
       "num_kv_heads num_layers swa_num_key_value_heads",
    4: "attention_heads decoder_attention_heads encoder_attention_heads index_n_heads "
       "index_topk linear_num_heads linear_num_key_heads linear_num_value_heads mamba_n_heads "
       "mamba_num_heads moe_num_experts n_head n_heads n_mamba_heads n_routed_experts "
       "num_attention_heads num_decoder_attention_heads num_experts num_heads "
       "num_local_experts swa_num_attention_heads",
    16: "attention_head_dim d_head d_kv dim_head head_dim index_head_dim kv_channels "
        "kv_lora_rank linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head "
        "mamba_head_dim mamba_headdim q_lora_rank qk_rope_head_dim rotary_dim swa_head_dim "
        "v_head_dim",
    32: "qk_nope_head_dim",
    48: "d_ff d_inner decoder_ffn_dim dff dim_ff encoder_ffn_dim expert_ffn_hidden_size "
        "feed_forward_size ffn_dim ffn_hidden_size intermediate_size intermediate_size_mlp "
        "mlp_dim moe_intermediate_size moe_shared_expert_intermediate_size n_inner "
        "projection_hidden_size projector_hidden_size qk_head_dim "
        "shared_expert_intermediate_size shared_intermediate_size",
    8: "chunk_size mamba_chunk_size mamba_d_state sliding_window ssm_state_size state_size",
    V: "vocab_size vocab_size_per_layer_input",
    40: "max_position_embeddings max_seq_len n_ctx n_positions",
    0: "pad_token_id",
    1: "bos_token_id cls_token_id eos_token_id expand first_k_dense_replace mamba_expand "
       "mamba_n_groups mamba_ngroups n_group n_groups n_shared_experts num_expert_group "
       "num_groups num_query_groups num_shared_experts sep_token_id topk_group",
}  # fmt: skip
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
IMAGE = V - 1
SPECIAL = {
    IMAGE: "image_token_id image_token_index",
    V - 2: "video_token_id video_token_index",
    V - 3: "vision_start_token_id image_start_token_id boi_token_index",
    V - 4: "vision_end_token_id image_end_token_id eoi_token_index",
    V - 5: "video_start_token_id",
    V - 6: "video_end_token_id",
    V - 7: "audio_token_id",
}
SMALL |= {name: token for token, names in SPECIAL.items() for name in names.split()}
SMALL |= {"is_decoder": True}

ROPE = {"rope_type": "default", "rope_theta": 1e4}
TWO_ROPES = {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}
HALF_MROPE = {
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]},
}  # fmt: skip
SHARED = {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3}
VIT = {"vision_config": {"image_size": 16, "patch_size": 8}}
VIT_32 = {"vision_config": {"image_size": 32, "patch_size": 8}}
TILES = {**VIT, "image_grid_pinpoints": [[16, 32], [32, 16]]}
# what a class needs in addition
OVERRIDES = {
    "AyaVisionForConditionalGeneration": VIT_32,
    "Blip2ForConditionalGeneration": {**VIT, "num_query_tokens": 3},
    "BlipForConditionalGeneration": VIT,
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": 50},
    "ChameleonForConditionalGeneration": {
        "vocabulary_map": {"<image>": IMAGE, "IMGIMGAZ": V - 2},
        "vq_config": {"base_channels": 32}},
    "Cohere2VisionForConditionalGeneration": {**VIT_32, "alignment_intermediate_size": 64},
    "CohereCompassForCausalLM": TWO_ROPES,
    "CohereCompassForConditionalGeneration": {"text_config": TWO_ROPES},
    "Cosmos3EdgeForConditionalGeneration": {"text_config": MROPE},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "Emu3ForConditionalGeneration": {
        "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": V - 2},
        "vq_config": {"base_channels": 32}},
    "Ernie4_5_VLMoeForConditionalGeneration": {"text_config": {
        "moe_intermediate_size": [48, 48],
        "rope_parameters": {**ROPE, "mrope_section": [2, 2, 4]}}},
    "Florence2ForConditionalGeneration": {"vision_config": {
        "embed_dim": [8, 16, 32, 64], "num_heads": [1, 2, 4, 8], "num_groups": [1, 2, 4, 8],
        "depths": [1, 1, 1, 1]}},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3ForConditionalGeneration": {**VIT, "mm_tokens_per_image": 4},
    "Gemma3nForCausalLM": {
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0],
        "hidden_size_per_layer_input": 8},
    "Gemma4UnifiedForConditionalGeneration": {"vision_config": {
        "mm_embed_dim": 64, "output_proj_dims": 64, "mm_posemb_size": 16}},
    "Glm46VForConditionalGeneration": {"text_config": MROPE},
    "Glm4vForConditionalGeneration": {**VIT_32, "text_config": HALF_MROPE},
    "Glm4vMoeForConditionalGeneration": {"text_config": HALF_MROPE},
    "Glm5NextForConditionalGeneration": {"text_config": {
        "index_kpool": 2, "qk_rope_head_dim": 0, "head_dim": 0}},
    "GlmOcrForConditionalGeneration": {"text_config": MROPE},
    "GotOcr2ForConditionalGeneration": {"vision_config": {
        "image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1],
        "output_channels": 16}},
    "Granite4VisionForConditionalGeneration": {
        "deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "HunYuanVLForConditionalGeneration": {"text_config": {
        "rope_parameters": {**ROPE, "mrope_section": [2, 2, 2, 2]}}},
    "Idefics2ForConditionalGeneration": {**VIT, "perceiver_config": {
        "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 4,
        "resampler_head_dim": 16}},
    "Idefics3ForConditionalGeneration": VIT,
    "IdeficsForVisionText2Text": {**VIT, "cross_layer_interval": 1, "freeze_vision_layers": False},
    "Inkling2ForConditionalGeneration": {"vision_config": {"text_hidden_size": 64}},
    "InstructBlipForConditionalGeneration": {**VIT, "num_query_tokens": 3},
    "InternVLForConditionalGeneration": {"vision_config": {
        "image_size": [32, 32], "patch_size": [8, 8]}},
    "JanusForConditionalGeneration": {"vq_config": {"base_channels": 32, "num_embeddings": 64}},
    "Kosmos2ForConditionalGeneration": {**VIT, "latent_query_num": 3},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Llama4ForConditionalGeneration": {"vision_config": {
        "image_size": 32, "patch_size": 8, "intermediate_size": 256, "vision_output_dim": 64,
        "projector_input_dim": 64, "projector_output_dim": 64}},
    "LlavaForConditionalGeneration": VIT,
    "LlavaNextForConditionalGeneration": TILES,
    "LlavaOnevisionForConditionalGeneration": TILES,
    "Mistral3ForConditionalGeneration": VIT_32,
    "Mistral4ForCausalLM": {"rope_parameters": {
        **ROPE, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1}},
    "MllamaForConditionalGeneration": {
        "vision_config": {
            "image_size": 16, "patch_size": 8, "intermediate_layers_indices": [0],
            "max_num_tiles": 1, "vision_output_dim": 128, "supported_aspect_ratios": [[1, 1]]},
        "text_config": {"cross_attention_layers": [1]}},
    "Molmo2ForConditionalGeneration": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "MuseGlimmerForConditionalGeneration": {"vision_config": {
        "patch_size": 8, "pos_emb_height": 4, "pos_emb_width": 4}},
    "MuseSparkForConditionalGeneration": {"vision_config": {
        "patch_size": 8, "pos_emb_height": 4, "pos_emb_width": 4},
        "audio_config": {"patch_sizes": [4, 4], "hidden_sizes": [32, 64], "depths": [1, 1]}},
    "NemotronH_Omni_Reasoning_V3": {"vision_config": {"video_temporal_patch_size": 2}},
    "PaddleOCRVLForConditionalGeneration": {"text_config": MROPE},
    "PaliGemmaForConditionalGeneration": VIT,
    "Qwen2VLForConditionalGeneration": {"vision_config": {"patch_size": 8}, "text_config": MROPE},
    "Qwen2_5OmniThinkerForConditionalGeneration": {
        "vision_start_token_id": V - 3, "text_config": MROPE},
    "Qwen2_5_VLForConditionalGeneration": {
        "vision_config": {"patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]},
        "text_config": MROPE},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {"vision_start_token_id": V - 3},
    "Qwen3VLForConditionalGeneration": {
        "vision_config": {
            "patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        "text_config": MROPE},
    "Qwen3_5ForConditionalGeneration": {
        "vision_config": {"patch_size": 8, "num_position_embeddings": 16},
        "text_config": {"layer_types": ["linear_attention", "full_attention"]}},
    "ReformerModelWithLMHead": {
        "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "attention_head_size": 16,
        "hash_seed": 0, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
    "RoCBertForCausalLM": {
        "pronunciation_vocab_size": 16, "shape_vocab_size": 16, "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16},
    "SmolVLMForConditionalGeneration": VIT,
    "UnlimitedOcrForConditionalGeneration": {"text_config": {
        "mlp_layer_types": ["dense", "sparse"], "num_key_value_heads": HEADS}},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": SHARED,
    "ZambaForCausalLM": {**SHARED, "attention_hidden_size": 128, "attention_head_dim": 32},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}  # fmt: skip

# the reason, and a part of the message
TWO_PARTS = (
    "It has an encoder and a decoder, so that its logits are not those of input_ids.",
    "has a decoder, whose logits are not those of input_ids",
)
CODEBOOKS = ("It has several heads, one for each codebook.", "ModuleList, has no weight")
REFUSED = {
    "ChameleonForConditionalGeneration": (
        "It masks the logits of image tokens.", "treats the logits of some tokens differently"),
    "Florence2ForConditionalGeneration": TWO_PARTS,
    "MusicgenForCausalLM": CODEBOOKS,
    "MusicgenMelodyForCausalLM": CODEBOOKS,
    "PI0ForConditionalGeneration": (
        "It predicts actions, and has no head.", "has no output embeddings"),
    "PPFormulaNetForConditionalGeneration": TWO_PARTS,
    "Pix2StructForConditionalGeneration": TWO_PARTS,
    "ProphetNetForCausalLM": (
        "Its head predicts several tokens at once.", r"1 times, last with \(1, 2, 8, 64\)"),
    "T5Gemma2ForConditionalGeneration": TWO_PARTS,
    "UdopForConditionalGeneration": TWO_PARTS,
    "VisionEncoderDecoderModel": TWO_PARTS,
}  # fmt: skip
TIMM = "Its vision tower needs timm."
DRAFTER = "It drafts for another model, whose keys and values it reads."
NOT_BUILT = {
    "DiffusionGemmaForBlockDiffusion": "It denoises blocks, and predicts no next token.",
    "Dots3NoteForConditionalGeneration": "Its config has 46 layers; the text class is tested.",
    "FastVlmForConditionalGeneration": TIMM,
    "Gemma3nForConditionalGeneration": TIMM,
    "Gemma4AssistantForCausalLM": DRAFTER,
    "Gemma4UnifiedAssistantForCausalLM": DRAFTER,
    "InklingForConditionalGeneration": "It needs scipy; the text class is tested.",
    "InstructBlipVideoForConditionalGeneration": "It takes videos.",
    "PerceptionLMForConditionalGeneration": TIMM,
}
NEED_IMAGES = {
    "Blip2ForConditionalGeneration", "BlipForConditionalGeneration", "IdeficsForVisionText2Text",
    "InstructBlipForConditionalGeneration", "Kosmos2ForConditionalGeneration",
}  # fmt: skip
TEXT = [name for name in CLASSES if name not in REFUSED.keys() | NOT_BUILT.keys() | NEED_IMAGES]


def small_config(kind, overrides):
    """Return a config of this class, and of its parts, with every size small."""
    default = kind()
    known, parts = default.to_dict(), getattr(kind, "sub_configs", {})
    small = {name: SMALL[name] for name in known if name in SMALL}
    if "kv_lora_rank" in known:  # MLA has as many of these as heads
        small["num_key_value_heads"] = HEADS
    small |= {name: x for name, x in overrides.items() if name not in parts}
    for name, part in parts.items():
        if getattr(default, name, None) is not None:
            part = type(getattr(default, name))
        if part is not transformers.AutoConfig:
            small[name] = small_config(part, overrides.get(name, {}))
    return kind(**small)


def make(name, options=None):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = small_config(kind.config_class, merged(OVERRIDES.get(name, {}), options or {}))
    config._attn_implementation = "eager"
    with torch.device("meta"):  # a size that is missing above must not fill the memory
        size = sum(p.numel() for p in kind(config).parameters())
    assert size < 8e6, f"{name} has {size} parameters"
    model = kind(config).eval()
    randomise(model)
    return model


def merged(a, b):
    both = {name: merged(a[name], b[name]) for name in a.keys() & b.keys() if type(b[name]) is dict}
    return a | b | both


@torch.no_grad()
def randomise(model):
    """Change every parameter, as a value of 0 or 1 would hide what it does."""
    for name, part in [*model.named_parameters(), *model.named_buffers()]:
        if part.is_floating_point() and ("bias" in name or isinstance(part, torch.nn.Parameter)):
            part.add_(0.1 * torch.randn_like(part))


@torch.no_grad()
def widen(model, batch):
    """Give logits a standard deviation of about 2, and a bias of the head one of 1."""
    head = last_layer(model)
    head.weight.mul_(2 / own_logits(model, batch).std())
    if getattr(head, "bias", None) is not None:
        head.bias.normal_()


def make_batch(model):
    ids = torch.randint(2, V - 10, (2, 11))
    batch = {"input_ids": ids}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        batch["attention_mask"] = torch.ones_like(ids)
    return batch


def own_logits(model, batch):
    return model(**batch, use_cache=False).logits


def own_log_probs(model, batch):
    log_probs = own_logits(model, batch).double().log_softmax(-1)[:, -T - 1 : -1]
    return log_probs.gather(-1, batch["input_ids"][:, -T:, None])[..., 0]


# names in configs for a factor of logits, a soft cap of them, or a bias of the head
TRANSFORMS = {
    "logit_scale": 0.25, "logits_scaling": 3.0, "lm_head_multiplier": 0.5,
    "output_multiplier": 0.5, "logits_mup_width_multiplier": 3.0, "final_logit_softcapping": 2.0,
    "logits_soft_cap": 2.0, "output_logit_soft_cap": 2.0, "lm_head_bias": True,
    "unpadded_vocab_size": V - 3,
}  # fmt: skip


def variants(name):
    """Yield options of configs: none, and all that change logits, if there are any."""
    yield {}
    default = getattr(transformers, name).config_class()
    for part, wrap in ((default, dict), (default.get_text_config(), lambda x: {"text_config": x})):
        if found := {name: x for name, x in TRANSFORMS.items() if name in part.to_dict()}:
            yield wrap(found)
            return


def assert_same(model, batch, parameters):
    """Check that log-probs and a gradient of them equal those of the model's own logits."""
    expected = own_log_probs(model, batch)
    got = log_probs_from_model(model, batch, T)
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=0)
    weights = torch.randn(expected.shape)
    ours, theirs = (
        torch.cat([
            grad.flatten()
            for grad in torch.autograd.grad((x * weights).sum(), parameters, materialize_grads=True)
        ])
        for x in (got, expected)
    )  # fmt: skip
    assert theirs.norm() > 1e-2
    assert relative(ours, theirs) < 1e-4


NO_LAYERS = "has no layers that transformers checkpoints"
# the messages of live_checkpointing
NOT_LIVE = {
    "BltForCausalLM": r"BltTransformerLayer is given .*, which cannot be split",
    "CTRLLMHeadModel": NO_LAYERS, "CpmAntForCausalLM": NO_LAYERS,
    "GPTNeoXJapaneseForCausalLM": NO_LAYERS,
    "JetMoeForCausalLM": "does not support activation checkpointing",
    "Molmo2ForConditionalGeneration": "fails on a few tokens: `mm_token_type_ids` is required",
    "OpenAIGPTLMHeadModel": NO_LAYERS, "ReformerModelWithLMHead": NO_LAYERS,
    "XLMWithLMHeadModel": NO_LAYERS, "XLNetLMHeadModel": NO_LAYERS,
}  # fmt: skip


def assert_live_checkpointing(model, name):
    """Check that the gradient of two sequences is right, or that the model is refused."""
    ids = torch.randint(2, V - 10, (5, 11))
    batch = {"input_ids": ids}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, :3] = 0
    parameters = trained(model)
    model.train()

    def gradient():
        torch.manual_seed(1)
        logits = model(**batch, use_cache=False).logits[torch.tensor([0, 3])]
        weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape).sin()
        grads = torch.autograd.grad(
            (logits * weights).sum(), parameters, materialize_grads=True, allow_unused=True
        )
        return torch.cat([x.flatten() for x in grads])

    def live_gradient():
        live_checkpointing(model)
        return gradient()

    if name in NOT_LIVE:
        with pytest.raises(ValueError, match=NOT_LIVE[name]):
            live_gradient()
        return
    expected = gradient()
    assert relative(live_gradient(), expected) < 1e-5


def trained(model, pattern=""):
    return [
        p for name, p in model.named_parameters() if p.requires_grad and re.search(pattern, name)
    ]


@pytest.mark.parametrize("name", TEXT)
def test_text(name):
    for options in variants(name):
        model = make(name, options)
        batch = make_batch(model)
        widen(model, batch)
        assert own_logits(model, batch).std() > 0.5
        # Reformer's body has a gradient in training only
        assert_same(model, batch, trained(model, "lm_head" if "Reformer" in name else ""))
    assert_live_checkpointing(model, name)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    model = make(name)
    with pytest.raises(ValueError, match=f"{name}.*{REFUSED[name][1]}.*: use the ops"):
        log_probs_from_model(model, make_batch(model), T)


# With images


def grid():
    """Return two images for the Qwen-VL family: 4 by 4 patches each, merged two by two."""
    return {
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def tiles():
    """Return two images for the Llava family, each in two tiles and as a whole."""
    return {
        "pixel_values": torch.randn(2, 3, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 32]] * 2),
    }


def pixels(*shape):
    return lambda: {"pixel_values": torch.randn(*shape)}


PIXELS = pixels(2, 3, 16, 16)
PIXELS_32 = pixels(2, 3, 32, 32)
# class: (image tokens in each of two rows, inputs)
IMAGES = {
    "AyaVisionForConditionalGeneration": (4, PIXELS_32),
    "Blip2ForConditionalGeneration": (3, PIXELS),
    "BlipForConditionalGeneration": (0, PIXELS),
    "Cohere2VisionForConditionalGeneration": (4, PIXELS_32),
    "Gemma3ForConditionalGeneration": (4, lambda: {
        **PIXELS(), "token_type_ids": (torch.arange(4 + 11) < 4).long().expand(2, -1)}),
    "Glm4vForConditionalGeneration": (4, grid),
    "GotOcr2ForConditionalGeneration": (4, pixels(2, 3, 64, 64)),
    "Idefics2ForConditionalGeneration": (3, pixels(2, 1, 3, 16, 16)),
    "Idefics3ForConditionalGeneration": (1, pixels(2, 1, 3, 16, 16)),
    "IdeficsForVisionText2Text": (0, lambda: {
        **pixels(2, 1, 3, 16, 16)(), "image_attention_mask": torch.ones(2, 11, 1).long()}),
    "InstructBlipForConditionalGeneration": (3, lambda: {
        **PIXELS(), "qformer_input_ids": torch.randint(2, V, (2, 4))}),
    "InternVLForConditionalGeneration": (4, PIXELS_32),
    "Kosmos2ForConditionalGeneration": (3, lambda: {
        **PIXELS(), "image_embeds_position_mask": (torch.arange(3 + 11) < 3).expand(2, -1)}),
    "Llama4ForConditionalGeneration": (4, PIXELS_32),
    "LlavaForConditionalGeneration": (4, PIXELS),
    "LlavaNextForConditionalGeneration": (14, tiles),
    "LlavaOnevisionForConditionalGeneration": (14, tiles),
    "Mistral3ForConditionalGeneration": (4, lambda: {
        **PIXELS_32(), "image_sizes": torch.tensor([[32, 32]] * 2)}),
    "MllamaForConditionalGeneration": (0, lambda: {
        "pixel_values": torch.randn(2, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(2, 1).long(),
        "aspect_ratio_mask": torch.ones(2, 1, 1).long(),
        "cross_attention_mask": torch.ones(2, 11, 1, 1).long()}),
    "PaliGemmaForConditionalGeneration": (4, PIXELS),
    "Qwen2VLForConditionalGeneration": (4, grid),
    "Qwen2_5_VLForConditionalGeneration": (4, grid),
    "Qwen3VLForConditionalGeneration": (4, grid),
    "Qwen3_5ForConditionalGeneration": (4, grid),
    "SmolVLMForConditionalGeneration": (1, pixels(2, 1, 3, 16, 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    count, inputs = IMAGES[name]
    model = make(name)
    ids = torch.cat([torch.full((2, count), IMAGE), make_batch(model)["input_ids"]], dim=1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | inputs()
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    widen(model, batch)
    assert_same(model, batch, trained(model, "vision|visual"))


# Models that the ops can't apply


class BiasAfterTheHead(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 1, V)
        return output


class NormalisedWeight(transformers.LlamaForCausalLM):
    class Linear(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, torch.nn.functional.normalize(self.weight, dim=1))

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = self.Linear(config.hidden_size, config.vocab_size, bias=False)


class HeadCalledTwice(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output, again = (super(HeadCalledTwice, self).forward(*args, **kwargs) for _ in range(2))
        output.logits = 0.5 * (output.logits + again.logits)
        return output


class WarmerByPosition(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / torch.arange(1, output.logits.shape[1] + 1)[:, None]
        return output


class WeightWithoutTheHead(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = self.model(*args, **kwargs)
        return transformers.modeling_outputs.CausalLMOutput(
            logits=output.last_hidden_state @ self.lm_head.weight.T
        )


WRONG = {
    BiasAfterTheHead: (
        "BiasAfterTheHead treats the logits of some tokens differently from others'"
    ),
    NormalisedWeight: (
        "the logits of NormalisedWeight differ by [0-9.]+ from those that its head's weight and "
        "bias give for its hidden states"
    ),
    HeadCalledTwice: (
        r"HeadCalledTwice calls its head, Linear, 2 times, last with \(1, 8, 64\), where the ops "
        r"need hidden states \(B, S, H\), once"
    ),
    WarmerByPosition: (
        r"WarmerByPosition applies neither a scale nor a soft cap to its logits: at "
        r"\[0.0, .*\] they become \[0.0, .*\]"
    ),
    WeightWithoutTheHead: "WeightWithoutTheHead calls its head, Linear, 0 times, last with None",
}


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_what_a_wrong_model_is_told(kind):
    torch.manual_seed(0)
    model = kind(small_config(transformers.LlamaConfig, {})).eval()
    batch = make_batch(model)
    widen(model, batch)
    for _ in range(2):  # a refused model is not remembered
        with pytest.raises(ValueError, match=f"{WRONG[kind]}.*: use the ops from logits for it$"):
            log_probs_from_model(model, batch, T)


def test_labels_are_refused():
    model = transformers.LlamaForCausalLM(small_config(transformers.LlamaConfig, {}))
    batch = make_batch(model)
    with pytest.raises(ValueError, match="batch must not contain labels"):
        log_probs_from_model(model, batch | {"labels": batch["input_ids"]}, T)


# docs/models.md

DOCUMENT = Path(__file__).parent.parent / "docs/models.md"
VERSION = transformers.__version__


def test_every_class_stands_in_one_list():
    assert not REFUSED.keys() & NOT_BUILT.keys()
    for names in (REFUSED.keys(), NOT_BUILT.keys(), OVERRIDES.keys(), IMAGES.keys(), NEED_IMAGES):
        assert names <= set(CLASSES)
    assert IMAGES.keys() >= NEED_IMAGES
    assert len(CAUSAL & {*TEXT}) >= 170


def test_the_document_is_up_to_date():
    text = DOCUMENT.read_text()
    if f"transformers {VERSION}" not in text:
        pytest.skip(f"docs/models.md is for another version than {VERSION}")
    assert text == document()


def result(name):
    if name in REFUSED:
        return f"refused: {REFUSED[name][0]}"
    if name in NOT_BUILT:
        return f"not built: {NOT_BUILT[name]}"
    if name in NEED_IMAGES:
        return "equal, with images"
    if "Reformer" in name:
        return "equal, with the gradient of its head"
    return "equal, also with images" if name in IMAGES else "equal"


def live(name):
    if name not in TEXT:
        return ""
    if "Gemma3n" in name:
        return "equal, without shared keys and values; refused with them"
    return "refused" if name in NOT_LIVE else "equal"


def table(names):
    return "\n".join(["| class | log-probs | live_checkpointing |", "|---|---|---|", *(
        f"| {name} | {result(name)} | {live(name)} |" for name in sorted(names))])  # fmt: skip


def document():
    equal = len({*TEXT} | NEED_IMAGES)
    return f"""# Models of transformers

`log_probs_from_model` and `loss_from_model` run a model's own forward up to its head, and learn
from a few tokens how the model transforms its logits. This page lists the classes of
transformers {VERSION} for which the tests compare the results with the model's own logits: {equal}
are equal, {len(REFUSED)} are refused, and {len(NOT_BUILT)} are not built.

- **equal**: A small random model of the class gives the log-probs of its own logits, within 2e-5
  in fp32, and their gradient in every parameter. If its config has a factor or a soft cap of
  logits, a second model sets it. With images, the gradient is that of the vision tower.
- **refused**: The first call raises a ValueError that names the class and says what differs. The
  ops from logits accept such a model's logits.
- **not built**: The tests have no small model of the class. The first call compares it with its
  own logits nevertheless, and raises a ValueError if they differ.

For `live_checkpointing`, **equal** means that the gradient of two sequences out of five is the one
without checkpointing, to 1e-5. **refused** means that it raises a ValueError that gives the reason;
with `strict=False`, the model is checkpointed as transformers does it.

A class that is not listed, for example one of your own, is compared in the same way. `python
tests/test_models.py --write` writes this page.

## Causal language models

{table(CAUSAL)}

## Text from images

Classes that are listed above are omitted.

{table(FROM_IMAGES - CAUSAL)}
"""


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    DOCUMENT.write_text(document())
