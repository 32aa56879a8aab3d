"""The fused forward and the shorter updates compared with verl's own, on the same tensors."""

import contextlib
import copy
import functools
import importlib.util
import os
import re
import sys

import pytest
import torch
import torch.distributed as dist

from gspo_ops import reference
from gspo_ops.integrations import verl as ours
from gspo_ops.integrations import verl_losses
from gspo_ops.integrations.verl_losses import AGGREGATIONS
from gspo_ops.integrations.verl_skip import PROPORTIONAL
from gspo_ops.testing import relative

if importlib.util.find_spec("verl") is None:
    pytest.skip("needs verl: pip install --no-deps verl, and what it imports",
                allow_module_level=True)  # fmt: skip
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
transformers = pytest.importorskip("transformers")
import verl  # noqa: E402
from verl.models.transformers import dense_common, monkey_patch  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.workers.config import FSDPActorConfig, PolicyLossConfig  # noqa: E402
from verl.workers.utils import padding  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

MODES = list(AGGREGATIONS)

# The fused forward

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1, "initializer_range": 0.3, "attn_implementation": "eager",
}  # fmt: skip
FAMILIES = {
    "Llama": ("Llama", {}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"head_dim": 8}),
    "Qwen3, tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    # heads that verl's own backends treat as a plain product
    "Phi, bias": ("Phi", {}),
    "Gemma2, soft cap": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "Cohere, logit scale": ("Cohere", {"logit_scale": 0.25}),
}
KNOWN_TO_VERL = [family for family in FAMILIES if family.startswith(("Llama", "Qwen3"))]
TEMPERATURE = 0.7
LENGTHS = (5, 1, 7, 3)


def make_model(family, dtype=torch.float32):
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model.to(dtype)


def make_tokens(*shape, seed=0):
    return torch.randint(2, 50, shape, generator=torch.Generator().manual_seed(seed))


def make_packed():
    """Return concatenated sequences, as with verl's use_remove_padding."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    inputs = {"attention_mask": None, "position_ids": positions, "use_cache": False}
    return {"input_ids": make_tokens(1, sum(LENGTHS)), **inputs}


def make_padded():
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": make_tokens(*mask.shape), "attention_mask": mask.long()}


def upstream(x, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


def grads_of(model, log_probs, entropy, wanted=("log_probs", "entropy")):
    """Return the parameters' gradients of random combinations of the wanted outputs."""
    model.zero_grad()
    parts = {"log_probs": (log_probs, 1), "entropy": (entropy, 2)}
    sum((parts[name][0] * upstream(*parts[name])).sum() for name in wanted).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def eager(model, targets, **inputs):
    logits = model(**inputs).logits
    options = {"temperature": TEMPERATURE}
    return (
        reference.log_probs_from_logits(logits, targets, **options),
        reference.entropy_from_logits(logits, targets, **options),
    )


def fused(model, **inputs):
    out = model(**inputs, temperature=TEMPERATURE, return_dict=True)
    assert isinstance(out, dense_common.CausalLMOutputForPPO)
    assert out.logits is None
    return out.log_probs, out.entropy


@pytest.mark.parametrize(
    "wanted", [("log_probs",), ("entropy",), ("log_probs", "entropy")], ids="+".join
)
@pytest.mark.parametrize("inputs", [make_packed(), make_padded()], ids=["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_forward_equals_the_model_s_logits(family, inputs, wanted):
    exact = make_model(family, torch.float64)
    targets = make_tokens(*inputs["input_ids"].shape, seed=1)
    expected = eager(exact, targets, **inputs)
    expected_grads = grads_of(exact, *expected, wanted)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        model = make_model(family, dtype)
        ours.fuse_forward(model)
        got = fused(model, **inputs, shift_labels=targets)
        for x, y in zip(got, expected, strict=True):
            assert (x.dtype, x.shape) == (dtype, targets.shape)
            assert relative(x.detach(), y.detach()) <= tolerance
        found = grads_of(model, *got, wanted)
        assert found.keys() == expected_grads.keys()
        for name, grad in found.items():
            assert relative(grad, expected_grads[name]) <= tolerance, name


@pytest.mark.parametrize("family", KNOWN_TO_VERL)
def test_fused_forward_equals_verl_s_own(family):
    """The error to float64 is at most twice verl's, or a rounding error."""
    model, exact, inputs = make_model(family), make_model(family, torch.float64), make_packed()
    targets = make_tokens(*inputs["input_ids"].shape, seed=1)
    expected = eager(exact, targets, **inputs)
    expected = [*expected, *grads_of(exact, *expected).values()]
    options = {"temperature": TEMPERATURE, "shift_labels": targets, "return_dict": True}
    out = dense_common.forward_with_torch_backend(model, **inputs, **options)
    theirs = [out.log_probs, out.entropy, *grads_of(model, out.log_probs, out.entropy).values()]
    ours.fuse_forward(model)
    got = fused(model, **inputs, shift_labels=targets)
    mine = [*got, *grads_of(model, *got).values()]
    for x, y, z in zip(
        *([x.detach() for x in part] for part in (mine, theirs, expected)), strict=True
    ):
        assert x.dtype == y.dtype
        assert relative(y, z) <= 2e-5
        assert relative(x, z) <= max(2 * relative(y, z), 2e-6)


def test_logits_of_bfloat16_are_not_rounded():
    model = make_model("Llama", torch.bfloat16)
    inputs, targets = make_packed(), make_tokens(1, sum(LENGTHS), seed=1)
    hidden = model.model(**inputs).last_hidden_state.double()
    logits = hidden @ model.lm_head.weight.double().mT
    expected = reference.log_probs_from_logits(logits, targets, temperature=TEMPERATURE)
    options = {"temperature": TEMPERATURE, "shift_labels": targets, "return_dict": True}
    theirs = dense_common.forward_with_torch_backend(model, **inputs, **options).log_probs
    ours.fuse_forward(model)
    mine, entropy = fused(model, **inputs, shift_labels=targets)
    assert (theirs - expected).abs().max() > 1e-3
    assert (mine - expected).abs().max() <= 4e-6
    assert mine.dtype == entropy.dtype == torch.float32


def test_labels_are_rolled_where_they_are_not_given():
    model = make_model("Llama")
    ours.fuse_forward(model)
    inputs, labels = make_padded(), make_tokens(len(LENGTHS), max(LENGTHS), seed=1)
    shifted = {"shift_labels": labels.roll(-1, dims=1)}
    assert torch.equal(
        fused(model, **inputs, labels=labels)[0], fused(model, **inputs, **shifted)[0]
    )
    by_ids = {"labels": inputs["input_ids"]}
    assert torch.equal(fused(model, **inputs)[0], fused(model, **inputs, **by_ids)[0])
    assert torch.equal(
        fused(model, **inputs, labels=labels, **shifted)[0], fused(model, **inputs, **shifted)[0]
    )
    embeddings = {"inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids"))}
    assert torch.equal(
        fused(model, **inputs, **embeddings, **shifted)[0],
        fused(model, input_ids=by_ids["labels"], **inputs, **shifted)[0],
    )
    with pytest.raises(ValueError, match="one of input_ids, labels and shift_labels must be given"):
        fused(model, **inputs, **embeddings)


@pytest.mark.parametrize("check", [True, False])
def test_the_check_of_the_model_can_be_left_out(check):
    model, seen = make_model("Qwen3"), []
    ours.fuse_forward(model, check_model=check)
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        fused(model, **make_packed())
    assert len(seen) == check


def test_a_model_wrapped_by_peft_and_a_copy():
    peft = pytest.importorskip("peft")
    inputs, config = make_packed(), peft.LoraConfig(target_modules="all-linear")
    model = make_model("Qwen3")
    ours.fuse_forward(model)
    expected, _ = fused(model, **inputs)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert torch.equal(fused(twin, **inputs)[0], expected)
    wrapped = peft.get_peft_model(twin, config)  # after fuse_forward, as verl does it
    log_probs, entropy = fused(wrapped, **inputs)
    assert torch.equal(log_probs, expected)  # b is 0
    trained = grads_of(wrapped, log_probs, entropy)
    assert any(grad.any() for grad in trained.values())
    assert all("lora" in name for name in trained)
    ours.fuse_forward(wrapped)
    assert torch.equal(fused(wrapped, **inputs)[0], expected)


@pytest.mark.parametrize("alone", [True, False], ids=["head", "head and body"])
def test_an_adapter_on_the_head(alone):
    peft = pytest.importorskip("peft")
    targets = ["lm_head"] if alone else ["lm_head", "q_proj", "up_proj"]
    results = []
    for dtype in (torch.float64, torch.float32):
        config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
        model = make_model("Qwen3", dtype)
        is_exact = dtype == torch.float64
        if not is_exact:
            ours.fuse_forward(model)
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, config).to(dtype)
        inputs, labels = make_packed(), make_tokens(1, sum(LENGTHS), seed=1)
        found = (eager(wrapped, labels, **inputs) if is_exact
                 else fused(wrapped, **inputs, shift_labels=labels))  # fmt: skip
        results.append([*(x.detach() for x in found), grads_of(wrapped, *found)])
    *expected, expected_grads = results[0]
    *got, grads = results[1]
    for x, y in zip(got, expected, strict=True):
        assert relative(x, y) <= 2e-5
    assert grads.keys() == expected_grads.keys()
    assert any("lm_head" in name for name in grads)
    for name, grad in grads.items():
        assert grad.any(), name
        assert relative(grad, expected_grads[name]) <= 5e-5, name


IMAGE, START, END, VIDEO = 46, 47, 48, 49  # tokens
PATCHES = 4
VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
    "out_hidden_size": 32, "spatial_merge_size": 1, "initializer_range": 0.2,
}  # fmt: skip


def make_seeing(family):
    text = SIZES | {
        "head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = (
        VISION
        | {
            "Qwen2_5_VL": {"fullatt_block_indexes": [1], "window_size": 8},
            "Qwen3VL": {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        }[family]
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, attn_implementation="eager",
    )  # fmt: skip
    kind = getattr(transformers, f"{family}ForConditionalGeneration")
    return kind(config).eval().double()


def make_images():
    """Return a sequence with an image, and verl's positions: of text, time, height and width."""
    ids = torch.tensor([[5, START, *[IMAGE] * PATCHES, END, 7, 8, 9, 10]])
    grid = torch.tensor([[1, 2, 2]])
    before, after = torch.arange(2), torch.arange(4, 9)
    of_image = torch.tensor([[2, 2, 2, 2], [2, 2, 3, 3], [2, 3, 2, 3]])
    seen = torch.cat([before.expand(3, -1), of_image, after.expand(3, -1)], dim=1)
    positions = torch.cat([torch.arange(ids.shape[1])[None], seen])[:, None]
    pixels = upstream(torch.empty(PATCHES, 3 * 2 * 16, dtype=torch.float64), 5)
    return {"input_ids": ids, "position_ids": positions, "pixel_values": pixels,
            "image_grid_thw": grid}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "patched"), [("Qwen2_5_VL", False), ("Qwen3VL", False), ("Qwen3VL", True)]
)
def test_models_that_see_images(family, patched, monkeypatch):
    """Results are right with the forwards of transformers and with those of verl."""
    model = make_seeing(family)
    if patched:
        monkey_patch_of_verl(model, monkeypatch)
    text = {
        "input_ids": make_tokens(1, 5) % (IMAGE - 2) + 2,
        "position_ids": torch.arange(5).expand(4, 1, -1),
    }
    batches = [make_images(), text]
    labels = [make_tokens(*batch["input_ids"].shape, seed=1) for batch in batches]
    expected = [eager(model, y, **batch) for batch, y in zip(batches, labels, strict=True)]
    expected_grads = [grads_of(model, *x) for x in expected]
    assert any("visual" in name for name in expected_grads[0])
    ours.fuse_forward(model)
    for i, batch in enumerate(batches):
        got = fused(model, **batch, shift_labels=labels[i])
        for x, y in zip(got, expected[i], strict=True):
            assert relative(x.detach(), y.detach()) <= 1e-10
        found = grads_of(model, *got)
        assert found.keys() == expected_grads[i].keys()
        for name, grad in found.items():
            assert relative(grad, expected_grads[i][name]) <= 1e-10, name


def monkey_patch_of_verl(model, monkeypatch):
    """Apply verl's patch in this test; verl 0.9 needs a class that transformers 5 has renamed."""
    modeling = sys.modules[type(model).__module__]
    output = transformers.modeling_outputs.CausalLMOutputWithPast
    monkeypatch.setattr(modeling, "Qwen3VLCausalLMOutputWithPast", output, raising=False)
    for name in [name for name in vars(modeling) if name.startswith("Qwen3VL")]:
        kind = getattr(modeling, name)
        if isinstance(kind, type) and "forward" in vars(kind):
            monkeypatch.setattr(kind, "forward", kind.forward)  # put back afterwards
    monkeypatch.setattr(monkey_patch, "is_trl_available", lambda: False)
    monkey_patch.apply_monkey_patch(model, use_remove_padding=False)


def test_only_the_backend_of_this_name_is_ours():
    ours.register()
    model = make_model("Llama")
    monkey_patch.patch_forward_with_backends(model, False, ours.NAME)
    assert "forward" not in vars(model)
    with forward_kept(type(model)) as original:
        monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True,
                                                 fused_kernels_backend="torch")  # fmt: skip
        assert "forward" not in vars(model)
        assert type(model).forward is dense_common.forward_with_torch_backend
    monkey_patch.patch_forward_with_backends(model, True, ours.NAME)
    assert "forward" in vars(model)
    assert type(model).forward is original


@contextlib.contextmanager
def forward_kept(kind):
    """Restore a class's forward at the end, as verl's patch would affect all later tests."""
    original = kind.forward
    yield original
    kind.forward = original


def test_what_the_forward_is_not_for_is_refused(monkeypatch):
    model = make_model("Llama")
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        ours.fuse_forward(model.model)
    for version in ("0.8.2", "0.10.0", "1.0"):
        monkeypatch.setattr(verl, "__version__", version)
        for function, arguments in (
            (ours.register, ()), (ours.skip_zero_advantages, ()), (ours.fuse_forward, (model,))
        ):  # fmt: skip
            with pytest.raises(ImportError, match=f"is for verl 0.9, got {version}"):
                function(*arguments)


# The loss of verl's actor, with its KL and entropy terms

PARTS = ((2, 3), (1, 3), (4, 3), (2, 1))  # tokens of prompt and response


@pytest.mark.parametrize(
    ("mode", "kl"),
    [("gspo", "low_var_kl"), ("vanilla", "k1"), ("cispo", "abs"), ("sapo", "mse"), ("gpg", "k3+")],
)
def test_actor_s_loss_with_kl_and_entropy(mode, kl):
    """The fused forward with our loss matches logits with verl's own loss."""
    terms = {"use_kl_loss": True, "kl_loss_type": kl, "kl_loss_coef": 0.3, "entropy_coeff": 0.2}
    results = []
    for dtype, name in ((torch.float64, mode), (torch.float32, f"{ours.register()}_{mode}")):
        model, data = make_model("Llama, tied", dtype), make_actor_s_data(dtype)
        ids, positions = data["input_ids"].values()[None], data["position_ids"].values()[None]
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        labels = ids.roll(-1, dims=1)
        if dtype == torch.float64:
            found = eager(model, labels, **inputs)
        else:
            ours.fuse_forward(model)
            found = fused(model, **inputs, shift_labels=labels)
        offsets = data["input_ids"].offsets()
        output = {
            key: torch.nested.nested_tensor_from_jagged(x[0], offsets)
            for key, x in zip(("log_probs", "entropy"), found, strict=True)
        }
        loss, metrics = make_loss("token-mean", name, **terms)(model_output=output, data=data)
        loss.backward()
        terms_of = [metrics[key].values[0] for key in ("kl_loss", "actor/entropy_loss")]
        results.append(({n: p.grad for n, p in model.named_parameters()}, [loss.item(), *terms_of]))
    (expected_grads, expected), (grads, got) = results
    assert got == pytest.approx(expected, rel=1e-5)
    for name, grad in grads.items():
        assert relative(grad, expected_grads[name]) <= 2e-5, name


def make_actor_s_data(dtype):
    sequences = [make_tokens(sum(part), seed=i) for i, part in enumerate(PARTS)]
    longest = max(response for _, response in PARTS)
    mask = torch.arange(longest) < torch.tensor([response for _, response in PARTS])[:, None]
    old, ref, advantages = (upstream(torch.empty(mask.shape, dtype=dtype), i) for i in range(3))
    data = {
        "input_ids": nested(sequences),
        "position_ids": nested([torch.arange(len(x)) for x in sequences]),
        "prompts": nested([x[:p] for x, (p, _) in zip(sequences, PARTS, strict=True)]),
        "responses": nested([x[p:] for x, (p, _) in zip(sequences, PARTS, strict=True)]),
        "response_mask": mask.long(), "advantages": advantages,
        "old_log_probs": old - 4, "ref_log_prob": ref - 4,
    }  # fmt: skip
    numbers = {"dp_size": 1, "batch_num_tokens": 23, "global_batch_size": 7}
    return tensordict_utils.get_tensordict(data, numbers)


# verl's engine, on a CPU


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3, tied"])
def test_verl_s_engine(ranks, tmp_path, family, packed, dtype):
    make_model(family).save_pretrained(tmp_path)
    ranks(2)(on_rank_engine, str(tmp_path), packed, dtype)


def on_rank_engine(directory, packed, dtype):
    """Our backend under FSDP2 matches logits, and verl's own backend on the whole model.

    All of them run in verl's engine, on different sequences on each rank.
    """
    engine = make_engine(directory, dtype, ours.register())
    mine = step(engine, packed)
    expected = [step(make_engine(directory, dtype, None), packed)]
    if dtype == "fp32":
        auto = transformers.AutoModelForCausalLM
        engine.module = auto.from_pretrained(directory, attn_implementation="eager")
        with forward_kept(type(engine.module)):
            monkey_patch.patch_forward_with_backends(engine.module, True, "torch")
            expected.append(step(engine, packed))
    for theirs in expected:
        assert mine.keys() == theirs.keys()
        for name, x in mine.items():
            assert relative(x, theirs[name]) <= {"fp32": 5e-6, "bf16": 0.1}[dtype], name


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_verl_s_engine_with_adapters(ranks, tmp_path, packed):
    pytest.importorskip("peft")
    make_model("Llama, tied").save_pretrained(tmp_path)
    ranks(2)(on_rank_adapters, str(tmp_path), packed)


def on_rank_adapters(directory, packed):
    """Our backend matches logits under FSDP2, with LoRA on the head and in the body.

    The head is tied: verl would shard an untied one by itself, which FSDP2 can't for peft's layer.
    """
    mine, theirs = (
        step(make_engine(directory, "fp32", backend, ["lm_head", "q_proj"]), packed)
        for backend in (ours.register(), None)
    )
    assert any("lm_head" in name for name in mine)
    assert mine.keys() == theirs.keys()
    for name, x in mine.items():
        assert x.any()
        assert relative(x, theirs[name]) <= 5e-6, name


def on_a_cpu():
    """Make verl use a CPU, and ignore TRL, as it can't use TRL 1.16."""
    from verl.plugin.platform import set_platform
    from verl.plugin.platform.platform_cuda import PlatformCUDA

    class PlatformCPU(PlatformCUDA):
        device_name, device_module = "cpu", torch.cpu

        def current_device(self):
            return torch.device("cpu")

    set_platform(PlatformCPU())
    monkey_patch.is_trl_available = lambda: False


def make_engine(directory, dtype, backend, adapted=None):
    """Return verl's engine, made from its configs, with LoRA if `adapted` is given."""
    on_a_cpu()
    from verl.workers.config import FSDPEngineConfig, HFModelConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    model = HFModelConfig(
        path=directory, load_tokenizer=False, override_config={"attn_implementation": "eager"},
        use_fused_kernels=backend is not None, fused_kernel_options={"impl_backend": backend},
        lora_rank=4, target_modules=adapted,
    )  # fmt: skip
    settings = FSDPEngineConfig(
        strategy="fsdp2", use_torch_compile=False, mixed_precision={"param_dtype": dtype}
    )
    engine = FSDPEngineWithLMHead(model, settings, None, None)
    module = engine._build_module()
    if adapted is not None:
        module = engine._build_lora_module(module)
        torch.manual_seed(0)
        for name, p in module.named_parameters():
            if "lora_" in name:  # B is 0 at first
                torch.nn.init.normal_(p, std=0.1)
    engine.module = engine._build_fsdp_module(module)
    return engine


def nested(parts):
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def step(engine, packed):
    """Return what verl's loss function gets, and gradients averaged over ranks."""
    rank = dist.get_rank()
    lengths = LENGTHS if rank == 0 else (2, 9)
    batch = tensordict_utils.get_tensordict(
        {
            "input_ids": nested([make_tokens(n, seed=10 * rank + n) for n in lengths]),
            "position_ids": nested([torch.arange(n) for n in lengths]),
        },
        {
            "temperature": TEMPERATURE, "calculate_entropy": True, "use_remove_padding": packed,
            "use_fused_kernels": engine.model_config.use_fused_kernels,
        },
    )  # fmt: skip
    found = {}

    def loss_function(model_output, data, dp_group):
        # a sequence's last row predicts another sequence's token or padding, and is in no loss
        rows = torch.cat([torch.arange(n) + 1 < n for n in lengths])
        found.update({name: x.values()[rows] for name, x in model_output.items()})
        return sum((x * upstream(x, 3)).sum() for x in found.values()), {}

    engine.module.train()  # for gradient checkpointing
    engine.module.zero_grad()
    loss, _ = engine.forward_step(batch, loss_function, forward_only=False)
    loss.backward()
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    for name, p in trained:
        if hasattr(p.grad, "full_tensor"):
            found[name] = p.grad.full_tensor()
        else:
            dist.all_reduce(p.grad)
            found[name] = p.grad / dist.get_world_size()
    return {name: x.detach() for name, x in found.items()}


# Updates without zero advantages, by verl's workers

# Two mini-batches on each rank: which sequences have an advantage, and the responses' lengths
WITH_ADVANTAGE = [[1, 0, 1, 1, 0, 0] + [0] * 6, [0] * 12]
RESPONSES = [5, 3, 8, 1, 4, 2, 6, 7, 2, 1, 8, 5]
PROMPT, RESPONSE, MINI_BATCH = 3, max(RESPONSES), 6
NAMES = 38  # the first token of sequence i is NAMES + i
CUTS = {
    "by tokens": {"use_dynamic_bsz": True, "max_token_len_per_gpu": PROMPT + RESPONSE},
    "by rows": {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2},
}
# What verl calls on a device and torch.cpu lacks
MEASURED = ("empty_cache", "memory_allocated", "memory_reserved", "max_memory_allocated",
            "max_memory_reserved")  # fmt: skip
# The sequences that run, on each rank and in each mini-batch
RUN = {
    "by tokens": [[[0, 2, 3], [9]], [[3, 3, 3], [9]]],
    "by rows": [[[0, 2, 3, 5], [9, 9]], [[3, 3, 3, 3], [9, 9]]],
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("size", "layout"), [(1, "packed"), (2, "packed"), (2, "padded"), (2, "nested")]
)
def test_updates_without_zero_advantages(ranks, tmp_path, python_blocks, size, layout, cut):
    make_model("Llama").save_pretrained(tmp_path)
    library = "\n".join(python_blocks("docs/integrations.md")["verl"])
    (tmp_path / "external.py").write_text(library)
    assert ranks(size)(on_rank_update, str(tmp_path), layout, cut) == RUN[cut][:size]


def on_rank_update(directory, layout, cut):
    """Compare updates with and without zero advantages; return which sequences the latter ran."""
    plain, skipping = make_worker(directory), make_worker(directory, external_lib="external")
    old = old_log_probs(plain, layout, cut)
    assert torch.equal(old_log_probs(skipping, layout, cut), old)  # for all sequences
    old += torch.linspace(-2e-4, 2e-4, old.numel()).view_as(old)
    cases = [(mode, ours.NAME) for mode in MODES]
    cases += [("token-mean", name) for name in PROPORTIONAL]
    cases += [("token-mean", f"{ours.NAME}_{name}") for name in ("vanilla", "sapo", "cispo", "gpg")]
    for mode, name in cases:
        (theirs, everyone), (mine, ran) = (
            update(worker, make_loss(mode, name), make_sequences(layout, cut, old))
            for worker in (plain, skipping)
        )
        assert everyone == [[*range(MINI_BATCH)], [*range(MINI_BATCH, 2 * MINI_BATCH)]]
        assert mine.keys() == theirs.keys()
        for key, (first, second) in mine.items():
            assert relative(first, theirs[key][0]) <= 2e-5, (mode, name, key)
            assert theirs[key][0].any()
            assert not second.any()
            assert not theirs[key][1].any()
    return ran


def make_worker(directory, external_lib="null"):
    """Return verl's worker, made from its configuration files as its trainer does."""
    import hydra

    on_a_cpu()
    register_engine()
    from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

    for name in MEASURED:
        setattr(torch.cpu, name, lambda: 0)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    settings = (
        f"model.path={directory}", f"model.external_lib={external_lib}",
        "+model.load_tokenizer=False", "+model.override_config.attn_implementation=eager",
        "rollout.name=vllm", "rollout.log_prob_micro_batch_size_per_gpu=1",
        "actor.strategy=fsdp2", "actor.ppo_micro_batch_size_per_gpu=1",
        "actor.fsdp_config.use_torch_compile=False",
        "+actor.fsdp_config.mixed_precision.param_dtype=fp32",
    )  # fmt: skip
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        names = [re.sub(r"^\+?", r"\g<0>actor_rollout_ref.", setting) for setting in settings]
        config = hydra.compose("ppo_trainer", names).actor_rollout_ref
    ActorRolloutRefWorker.actor_worker_cls = TrainingWorker
    sys.modules.pop(external_lib, None)  # left by another test
    worker = ActorRolloutRefWorker(config, "actor")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        worker.init_model()
    return worker


@functools.cache  # registers once
def register_engine():
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    EngineRegistry.register("language_model", "fsdp2", device="cpu")(FSDPEngineWithLMHead)


def make_loss(mode="token-mean", name=ours.NAME, **options):
    config = FSDPActorConfig(
        rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode,
        clip_ratio_low=3e-4, clip_ratio_high=4e-4, policy_loss=PolicyLossConfig(loss_mode=name),
        **{"strategy": "fsdp2", "loss_scale_factor": 50} | options,
    )  # fmt: skip
    return functools.partial(ppo_loss, config=config)


def make_sequences(layout, cut, old_log_probs=None):
    """Return a rank's part of a batch as verl's trainers pass it: padded, or nested throughout."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = range(len(RESPONSES))
    prompts, responses = (
        [make_tokens(lengths[i], seed=20 * rank + i) % (NAMES - 2) + 2 for i in rows]
        for lengths in ([PROMPT - i % 2 for i in rows], RESPONSES)
    )
    for i, prompt in enumerate(prompts):
        prompt[0] = NAMES + i
    mask = torch.arange(RESPONSE) < torch.tensor(RESPONSES)[:, None]
    live = torch.tensor(WITH_ADVANTAGE[rank]).float()[:, None]
    per_token = {
        "response_mask": mask.long(),
        "advantages": live * upstream(live, 7 + rank) * torch.ones(RESPONSE),
    }
    per_token["advantages"][~mask] = 5.0  # must not be read
    if old_log_probs is not None:
        per_token["old_log_probs"] = old_log_probs
    if layout == "nested":
        per_token["loss_mask"] = per_token["response_mask"]
        data = {name: nested([x[:n] for x, n in zip(values, RESPONSES, strict=True)])
                for name, values in per_token.items()}  # fmt: skip
        ids = [torch.cat(parts) for parts in zip(prompts, responses, strict=True)]
        data |= {
            "prompts": nested(prompts), "responses": nested(responses), "input_ids": nested(ids),
            "position_ids": nested([torch.arange(len(x)) for x in ids]),
        }  # fmt: skip
        data = tensordict_utils.get_tensordict(data)
    else:
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        parts = {"prompts": pad(prompts, padding_side="left"), "responses": pad(responses)}
        ids = torch.cat([*parts.values()], dim=1)
        attention_mask = (ids != 0).long()
        parts |= {
            "input_ids": ids, "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        }  # fmt: skip
        data = padding.left_right_2_no_padding(tensordict_utils.get_tensordict(parts | per_token))
    tensordict_utils.assign_non_tensor(
        data, temperature=TEMPERATURE, use_remove_padding=layout != "padded",
        global_batch_size=MINI_BATCH * size, mini_batch_size=MINI_BATCH * size, epochs=1, seed=42,
        dataloader_kwargs={"shuffle": False}, compute_loss=old_log_probs is not None, **CUTS[cut],
    )  # fmt: skip
    return data


def old_log_probs(worker, layout, cut):
    data = make_sequences(layout, cut)
    log_probs = tensordict_utils.get(worker.compute_log_prob(data), "log_probs")
    return padding.no_padding_2_padding(log_probs, data)


def update(worker, loss_function, data):
    """Return the gradients and losses of an update's mini-batches, and the sequences that ran."""
    worker.set_loss_fn(loss_function)
    engine, grads, ran = worker.actor.engine, [], [[]]

    def optimizer_step():  # skips the step, so that all cases have the same weights
        parameters = engine.module.named_parameters()
        grads.append({name: p.grad.full_tensor().clone() for name, p in parameters})
        ran.append([])
        return 0.0

    def before_body(_, args, batch):
        ids = batch["input_ids"]
        ran[-1] += (ids[ids >= NAMES] - NAMES).tolist()

    engine.optimizer_step = optimizer_step
    hook = engine.module.model.register_forward_pre_hook(before_body, with_kwargs=True)
    metrics = tensordict_utils.get(worker.update_actor(data), "metrics")
    hook.remove()
    found = {name: [of_step[name] for of_step in grads] for name in grads[0]}
    found["loss"] = torch.tensor(metrics["loss"])
    return found, [sorted(names) for names in ran[:-1]]


def test_what_can_t_be_skipped_exactly_is_trained(monkeypatch, caplog):
    from verl.workers.engine_workers import ActorRolloutRefWorker

    plain = ActorRolloutRefWorker.actor_worker_cls
    monkeypatch.setattr(ActorRolloutRefWorker, "actor_worker_cls", plain)
    monkeypatch.setattr(plain, "train_batch", lambda self, data: data)
    assert plain.__module__.startswith("verl.")  # importing patches nothing
    ours.skip_zero_advantages()
    skipping = ActorRolloutRefWorker.actor_worker_cls
    assert issubclass(skipping, plain)
    ours.skip_zero_advantages()
    assert ActorRolloutRefWorker.actor_worker_cls is skipping
    worker = object.__new__(skipping)
    assert worker.train_batch("all of it") == "all of it"  # the loss is not known yet
    kept = [
        ("strategy='megatron'", {"strategy": "megatron"}),
        ("use_kl_loss=True", {"use_kl_loss": True}),
        ("entropy_coeff=0.001", {"entropy_coeff": 1e-3}),
        ("loss_agg_mode='seq-mean-token-sum-norm' without loss_scale_factor",
         {"mode": "seq-mean-token-sum-norm", "loss_scale_factor": None}),
    ]  # fmt: skip
    names = {name for name in core_algos.POLICY_LOSS_REGISTRY if not name.startswith(ours.NAME)}
    others = names - set(PROPORTIONAL)
    assert others == {"bypass_mode", "clip_cov", "dro", "geo_mean", "kl_cov"}
    others |= {f"{ours.NAME}_{name}" for name in others}
    losses = [(setting, make_loss(**options)) for setting, options in kept]
    losses += [(f"loss_mode={name!r}", make_loss(name=name)) for name in others]
    losses.append(("distillation", functools.partial(print, config=None)))
    verl_losses.say_once.cache_clear()
    for setting, loss in losses:
        caplog.clear()
        for _ in range(2):
            worker.set_loss_fn(loss)
            assert worker.loss_fn is loss
        assert worker.train_batch("all of it") == "all of it"
        (said,) = caplog.messages
        assert setting in said
    caplog.clear()
    worker.set_loss_fn(make_loss())
    assert worker.loss_fn.args[0].func is ppo_loss
    assert not caplog.messages
