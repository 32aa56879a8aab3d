"""log_probs_from_model and loss_from_model match wrapped models' own logits."""

import contextlib
import itertools
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.nn.parallel import DistributedDataParallel

from gspo_ops.integrations.heads import unwrapped
from gspo_ops.integrations.transformers import log_probs_from_model, loss_from_model
from gspo_ops.testing import relative

transformers = pytest.importorskip("transformers")

T = 5
INVOCATION = [7, 3]  # for aLoRA


def make(tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, initializer_range=0.3, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def make_batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 48, (4, 11), generator=generator)
    ids[:, 4:6] = torch.tensor(INVOCATION)
    attention = torch.ones_like(ids)
    attention[0, :3] = 0
    return {"input_ids": ids, "attention_mask": attention}


def log_probs_of(model, batch):
    return log_probs_from_model(model, batch, T)


def log_probs_of_logits(model, batch):
    logits = model(**batch).logits[:, -T - 1 : -1].float().log_softmax(-1)
    return logits.gather(-1, batch["input_ids"][:, -T:, None]).squeeze(-1)


def loss_of(model, batch, rows=slice(4), denominator=4):
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])[rows]
    return loss_from_model(
        model, {name: x[rows] for name, x in batch.items()}, None, advantages,
        mask=torch.ones(len(advantages), T), denominator=denominator,
    ).loss  # fmt: skip


def assert_same(model, batch):
    """Check log-probs, and the gradients of everything that is trained."""
    weights = torch.randn(4, T, generator=torch.Generator().manual_seed(1))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values, grads = [], []
    for function in (log_probs_of, log_probs_of_logits):
        values.append(function(model, batch))
        found = [None] * len(trained)
        if values[-1].requires_grad:
            found = torch.autograd.grad(
                (weights * values[-1]).sum(), list(trained.values()), allow_unused=True
            )
        grads.append(dict(zip(trained, found, strict=True)))
    torch.testing.assert_close(values[0], values[1], atol=2e-5, rtol=2e-5)
    for name, theirs in grads[1].items():
        ours = grads[0][name]
        assert (ours is None) == (theirs is None), name
        if theirs is not None:
            assert relative(ours, theirs) <= 1e-4, name


# Adapters of peft

BODY, HEAD = ["q_proj", "down_proj"], ["q_proj", "lm_head"]
VIRTUAL = {"num_virtual_tokens": 3}
TOKENS = {"trainable_token_indices": [3, 9, 20]}
SAVED = {"modules_to_save": ["lm_head"]}
INVOKED = {"alora_invocation_tokens": INVOCATION}


class Kind(NamedTuple):
    """An adapter, what is done to the model afterwards, and the message if it is refused."""

    config: str
    options: dict
    is_tied: bool = False
    after: tuple = ()
    refused: str = ""


def lora(target_modules, is_tied=False, after=(), refused="", **options):
    options["target_modules"] = target_modules
    return Kind("Lora", options, is_tied, after, refused)


def ia3(target_modules, feedforward_modules=(), **options):
    modules = {"target_modules": target_modules, "feedforward_modules": [*feedforward_modules]}
    return Kind("IA3", modules, **options)


KINDS = {
    "prompt tuning": Kind("PromptTuning", VIRTUAL),
    "prefix tuning": Kind("PrefixTuning", VIRTUAL),
    "P-tuning": Kind("PromptEncoder", {**VIRTUAL, "encoder_hidden_size": 16}),
    "LoRA": lora(BODY),
    "rsLoRA": lora(BODY, use_rslora=True),
    "DoRA": lora(BODY, use_dora=True),
    "aLoRA": lora(BODY, **INVOKED),
    "IA3": ia3(BODY, ["down_proj"]),
    "VeRA": Kind("Vera", {"target_modules": ["q_proj"], "r": 8}),
    "OFT": Kind("OFT", {"target_modules": BODY, "oft_block_size": 8, "r": 0}),
    "CPT": Kind(
        "CPT", {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]}
    ),
    "LoRA on the embeddings, tied": lora(["embed_tokens"], True),
    "adaption prompt": Kind(
        "AdaptionPrompt",
        {"adapter_len": 3, "adapter_layers": 2},
        refused="PeftModelForCausalLM kept the forward that LlamaForCausalLM had",
    ),
    "LN tuning": Kind("LNTuning", {"target_modules": ["norm"]}),
    "modules_to_save with the head": lora(BODY, **SAVED),
    "modules_to_save with the head, tied": lora(BODY, True, **SAVED),
    "modules_to_save with the head, disabled": lora(BODY, after=("disable",), **SAVED),
    "trainable_token_indices": lora(BODY, **TOKENS),
    "trainable_token_indices, tied": lora(BODY, True, **TOKENS),
    "trainable_token_indices, tied, merged": lora(BODY, True, ("merge",), **TOKENS),
    "trainable_token_indices, tied, disabled": lora(BODY, True, ("disable",), **TOKENS),
    "trainable tokens by themselves, tied": Kind(
        "TrainableTokens", {"token_indices": [3, 9, 20]}, True
    ),
    "LoRA on the head": lora(HEAD),
    "LoRA on the head, tied": lora(HEAD, True),
    "LoRA on the head and embeddings, tied": lora(
        ["embed_tokens", "lm_head"], True, ensure_weight_tying=True
    ),
    "LoRA on the head, rsLoRA": lora(HEAD, use_rslora=True),
    "LoRA on the head, two adapters": lora(HEAD, after=("add",)),
    "LoRA on the head, merged": lora(HEAD, after=("merge",)),
    "LoRA on the head, disabled": lora(HEAD, after=("disable",)),
    "LoRA on the head, merged and disabled": lora(HEAD, after=("merge", "disable")),
    "LoRA on the head, dropout in evaluation": lora(HEAD, after=("eval",), lora_dropout=0.5),
    "LoRA on the head, dropout in training": lora(
        HEAD, lora_dropout=0.5, refused="LlamaForCausalLM has an adapter of peft with dropout"
    ),
    "LoRA on the head, with modules_to_save": lora(HEAD, **SAVED),
    "LoRA on the head, trainable_token_indices, tied": lora(
        HEAD, True, refused="LlamaForCausalLM .* on a weight that is trained too", **TOKENS
    ),
    "LoRA on the head by target_parameters": lora(
        BODY, target_parameters=["lm_head.weight"], refused="LlamaForCausalLM .*ParamWrapper"
    ),
    "LoRA on the head, bias": lora(
        HEAD, lora_bias=True, refused="LlamaForCausalLM has an adapter of peft with a bias"
    ),
    "DoRA on the head": lora(
        HEAD, use_dora=True, refused="LlamaForCausalLM has .* of the kind DoraLinearVariant"
    ),
    "DoRA on the head, merged": lora(HEAD, use_dora=True, after=("merge",)),
    "aLoRA on the head": lora(
        HEAD, refused="LlamaForCausalLM has .* of the kind ALoraLinearVariant", **INVOKED
    ),
    "AdaLoRA on the head": Kind(
        "AdaLora", {"target_modules": HEAD, "total_step": 9}, refused="LlamaForCausalLM .*adalora"
    ),
    "IA3 on the head": ia3(HEAD, refused="LlamaForCausalLM .*ia3"),
    "IA3 on the head, disabled": ia3(HEAD, after=("disable",)),
}


def adapted(kind, model=None):
    """Return a model with an adapter of random weights, so that leaving one out would show."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, f"{kind.config}Config")(task_type="CAUSAL_LM", **kind.options)
    model = peft.get_peft_model(make(kind.is_tied) if model is None else model, config)
    if "add" in kind.after:
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p) * p.requires_grad
    if "eval" in kind.after:
        model.eval()
    if "merge" in kind.after:
        model.merge_adapter()
    if "disable" in kind.after:
        model.base_model.disable_adapter_layers()
    return model


@pytest.mark.filterwarnings("ignore")  # peft warns about tied weights
@pytest.mark.parametrize("name", KINDS)
def test_adapters(name):
    kind, batch = KINDS[name], make_batch()
    model = adapted(kind)
    if kind.refused:
        with pytest.raises(ValueError, match=kind.refused):
            log_probs_of(model, batch)
        return
    assert_same(model, batch)
    with torch.no_grad():
        change = log_probs_of(model, batch) - log_probs_from_model(make(kind.is_tied), batch, T)
    assert ("disable" in kind.after) == (change.abs().max() < 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["LoRA on the head", "LoRA on the head, merged and disabled", "IA3 on the head"]
)
def test_an_adapter_that_a_known_model_gets(name):
    """What is learnt about a model at its first call concerns its base, not its adapters."""
    kind, batch, plain = KINDS[name], make_batch(), make()
    log_probs_of(plain, batch)
    model = adapted(kind, plain)
    if kind.refused:
        with pytest.raises(ValueError, match=kind.refused):
            log_probs_of(model, batch)
    else:
        assert_same(model, batch)


def test_one_adapter_for_each_row():
    model, batch = adapted(KINDS["LoRA on the head, two adapters"]).eval(), make_batch()
    names = ["default", "second", "__base__", "default"]
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .*adapter_names"):
        log_probs_of(model, {**batch, "adapter_names": names})
    model, batch = adapted(KINDS["LoRA"]).eval(), make_batch()
    names = ["default", "default", "__base__", "default"]
    assert_same(model, {**batch, "adapter_names": names})


def test_the_documented_kinds():
    text = (Path(__file__).parent.parent / "docs/adapters.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (equal|refused)(?: \(.+\))? \|$", text, re.M)
    assert len(rows) == len(KINDS)
    expected = {name: "refused" if kind.refused else "equal" for name, kind in KINDS.items()}
    assert dict(rows) == expected


# torch.compile


class Backend:
    """A backend that runs graphs as they are, and counts the graphs and their calls."""

    def __init__(self, name):
        self.compiled = torch._dynamo.lookup_backend(name)
        self.graphs = self.calls = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        function = self.compiled(module, inputs)

        def counted(*arguments):
            self.calls += 1
            return function(*arguments)

        return counted


def compiled(model, how, backend, **options):
    torch._dynamo.reset()
    if how == "torch.compile(model)":
        return torch.compile(model, backend=backend, **options)
    model.compile(backend=backend, **options)
    return model


HOWS = ["torch.compile(model)", "model.compile()"]


@pytest.mark.parametrize("name", ["", "LoRA on the head"])
@pytest.mark.parametrize("how", HOWS)
def test_the_compiled_body_runs(how, name):
    batch, backend = make_batch(), Backend("aot_eager")
    twin, model = (adapted(KINDS[name]) if name else make() for _ in range(2))
    eager, loss = log_probs_of(twin, batch), loss_of(twin, batch)
    model = compiled(model, how, backend)  # before its head is learnt, which happens outside graphs
    counts = []
    for _ in range(3):
        torch.testing.assert_close(log_probs_of(model, batch), eager)
        torch.testing.assert_close(loss_of(model, batch), loss)
        model(**batch)
        counts.append((backend.graphs, backend.calls))
    # one graph up to the head, and one of the plain forward; each call runs one
    assert counts == [(2, 3), (2, 6), (2, 9)]
    assert_same(model, batch)
    assert backend.graphs == 2


@pytest.mark.parametrize("how", HOWS)
def test_one_graph_is_refused(how):
    model, batch = make(), make_batch()
    model = compiled(model, how, Backend("eager"), fullgraph=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM .* leave fullgraph out"):
            log_probs_of(model, batch)
    model(**batch)


@pytest.mark.parametrize("how", ["eager", *HOWS])
def test_hooks_fire_once(how):
    model, batch = make(), make_batch()
    log_probs_of(model, batch)
    fired = Counter()
    expected = {}
    for name, part in model.named_modules():
        part.register_forward_pre_hook(lambda *_, key=(name, "before"): fired.update([key]))
        part.register_forward_hook(lambda *_, key=(name, "after"): fired.update([key]))
        is_called = not isinstance(part, torch.nn.ModuleList) and name != "lm_head"
        expected |= dict.fromkeys([(name, "before"), (name, "after")], 1) if is_called else {}
    if how != "eager":
        model = compiled(model, how, "eager")
    for function in (log_probs_of, loss_of):
        fired.clear()
        function(model, batch)
        assert fired == expected


# Over ranks: each takes half of the rows, and together they give the gradient of all

HEADS = [
    "untied", "tied", "LoRA on the head", "LoRA on the head, tied", "modules_to_save with the head"
]  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("stage", [1, 2, 3, "3, bare module"])
def test_deepspeed(ranks, stage, head):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    need_peft(head)
    ranks(2)(on_rank_deepspeed, stage, head)


@pytest.mark.parametrize(
    ("wrapper", "head"),
    [*itertools.product(["DDP", "FSDP1", "FSDP2"], HEADS), ("DDP, compiled", "untied")],
)
def test_data_parallel(ranks, wrapper, head):
    need_peft(head)
    ranks(2)(on_rank, wrapper, head)


def test_frozen_and_trained_weights_in_one_unit_of_fsdp1(ranks):
    pytest.importorskip("peft")
    ranks(2)(on_rank_one_unit)


def need_peft(head):
    if head in KINDS:
        pytest.importorskip("peft")


def make_head(head):
    return adapted(KINDS[head]) if head in KINDS else make(head == "tied")


def on_rank_deepspeed(stage, head):
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": os.environ["RANK"]}
    import deepspeed

    model = make_head(head)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained(model), lr=0.1),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": int(str(stage)[0]), "stage3_param_persistence_threshold": 0
            },
        },
    )  # fmt: skip

    def grads():
        get = deepspeed.utils.safe_get_full_grad
        return {name: get(p) for name, p in model.named_parameters() if p.requires_grad}

    called = engine if isinstance(stage, int) else engine.module
    if head == "untied":  # the vocabulary's size is that of the gathered weight
        with torch.no_grad():
            log_probs_from_model(called, make_batch(), T, check_model=False)
    assert_same_steps(called, head, grads, engine)
    engine.destroy()


def on_rank(wrapper, head):
    plain = make_head(head)
    model = {"FSDP1": fsdp1, "FSDP2": fsdp2}.get(wrapper, DistributedDataParallel)(plain)
    called = torch.compile(model, backend="aot_eager") if "compiled" in wrapper else model

    def grads():
        context = contextlib.nullcontext()
        if wrapper == "FSDP1":
            context = FullyShardedDataParallel.summon_full_params(model, with_grads=True)
        with context:
            return {
                name.removeprefix("module."): full(p.grad)
                for name, p in model.named_parameters()
                if p.requires_grad
            }

    assert_same_steps(called, head, grads, Steps(model))


def on_rank_one_unit():
    layers = CustomPolicy(lambda part: hasattr(part, "lora_A"))
    model = FullyShardedDataParallel(
        make_head("LoRA on the head"), auto_wrap_policy=layers, use_orig_params=True,
        device_id=torch.device("cpu"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .* on a weight that is trained too"):
        log_probs_of(model, make_batch())


def full(grad):
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()


def fsdp1(model):
    is_adapted = hasattr(model, "peft_config")

    def is_unit(part):  # as in peft's policy: layers, and trained parts apart from frozen ones
        is_trained = any(p.requires_grad for p in part.parameters(recurse=False))
        return type(part).__name__ == "LlamaDecoderLayer" or (is_adapted and is_trained)

    return FullyShardedDataParallel(
        model, auto_wrap_policy=CustomPolicy(is_unit), use_orig_params=True,
        device_id=torch.device("cpu"),
    )  # fmt: skip


def fsdp2(model):
    inner = unwrapped(model)
    separate = [] if inner.config.tie_word_embeddings else [inner.lm_head]
    for part in [*inner.model.layers, *separate, model]:
        fully_shard(part)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


class Steps:
    """The methods `backward` and `step` of DeepSpeed's engine, in PyTorch."""

    def __init__(self, model):
        self.optimizer = torch.optim.SGD(trained(model), lr=0.1)

    def backward(self, loss):
        self.optimizer.zero_grad()
        loss.backward()

    def step(self):
        self.optimizer.step()


def assert_same_steps(model, head, grads, steps):
    """Check that two steps of a wrapped model are those of one process."""
    batch, of_one = make_batch(), make_head(head)
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    mine = {name: x[own] for name, x in batch.items()}
    steps_of_one = Steps(of_one)
    for _ in range(2):
        with torch.no_grad():
            expected = log_probs_of_logits(of_one, batch)[own]
            for function in (log_probs_of, log_probs_of_logits):
                torch.testing.assert_close(function(model, mine), expected, atol=2e-5, rtol=2e-5)
        steps.backward(loss_of(model, batch, own, denominator=2))
        steps_of_one.backward(loss_of(of_one, batch))
        ours = grads()
        theirs = {name: p.grad for name, p in of_one.named_parameters() if p.requires_grad}
        assert ours.keys() == theirs.keys()
        for name, grad in theirs.items():
            assert relative(ours[name], grad) <= 1e-5, name
        steps.step()
        steps_of_one.step()
