"""Every block of Python in README.md and docs/ works as described; doc_code.py explains how.

The recipes for slime and NeMo-RL are tested in test_integrations_recipes.py.
"""

import functools
import importlib.util
import re
from pathlib import Path

import doc_code
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gspo_ops
from gspo_ops import GSPO, Objective, reference
from gspo_ops.testing import relative

INTEGRATIONS, PARALLEL = "docs/integrations.md", "docs/parallel.md"
OBJECTIVES = "docs/objectives.md"
B, T, H, V = 4, 6, 16, 24
UPSTREAM = -1.7
OPERANDS = ("hidden", "weight")


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}: pip install 'gspo-ops[{package}]'")


@pytest.mark.example
@pytest.mark.parametrize("page", [*filter(doc_code.unclaimed, doc_code.pages())])
def test_examples_run_as_they_stand(page):
    scope = {}
    for block in doc_code.unclaimed(page):
        block.execute(scope)


@pytest.mark.example
def test_what_is_not_run_says_why():
    for page in doc_code.pages():
        for block in doc_code.blocks(page):
            assert block.is_run() or block.code.count("# not run") == 1
            assert block.is_run() == ("not run" not in block.code), f"{page}, {block.heading}"


@pytest.mark.example
def test_marked_tests_have_code_to_execute():
    headings = {(b.page, b.heading) for page in doc_code.pages() for b in doc_code.blocks(page)}
    assert set(doc_code.claims()) <= headings


@pytest.mark.example("docs/objectives.md", "Weights and masks from the rollout")
def test_objectives(python_blocks):
    """The table's objectives exist, and the code leaves out what it claims to."""
    text = (Path(__file__).parent.parent / OBJECTIVES).read_text()
    written = re.findall(r"`((?:[A-Z]\w+)\([^`]*\))`", text)
    assert len(written) == 9
    for code in written:
        assert isinstance(eval(code, vars(gspo_ops)), Objective)

    (code,) = python_blocks(OBJECTIVES)["Weights and masks from the rollout"]
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(B, T, generator=generator)
    rollout = old + 0.9 * torch.randn(B, T, generator=generator)
    scope = {
        "old_log_probs": old, "rollout_log_probs": rollout,
        "log_probs": torch.stack([old[0] - 1, old[1], old[2] - 1, old[3]]).requires_grad_(),
        "advantages": torch.tensor([1.0, 1.0, -1.0, -1.0]), "mask": torch.ones(B, T),
        "entropy": torch.rand(B, T, generator=generator),
        "policy_loss_from_log_probs": gspo_ops.policy_loss_from_log_probs,
    }  # fmt: skip
    exec(code, scope)
    scope["loss"].backward()
    assert scope["near"].tolist() == [1, 1, 0, 1]
    assert scope["truncated"].max() == 2
    assert scope["masked"].min() == 0
    assert scope["of_sequences"].shape == (B,)
    assert scope["uncertain"].sum() == round(0.2 * B * T)
    assert not scope["log_probs"].grad[2].any()


# docs/integrations.md


def make_llama(vocab_size):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=H, intermediate_size=2 * H, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.example("docs/integrations.md", "Any causal language model of transformers")
def test_transformers(python_blocks):
    (code,) = python_blocks(INTEGRATIONS)["Any causal language model of transformers"]
    model = make_llama(V)
    ids = torch.randint(2, V, (B, T + 3))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    mask, advantages = torch.ones(B, T), torch.randn(B)
    mask[1, 4:] = 0
    scope = {"torch": torch, "model": model, "mask": mask, "advantages": advantages, **inputs}
    exec(code, scope)
    exact = model.double()
    log_probs = reference.log_probs_from_logits(
        exact(**inputs, use_cache=False).logits[:, -T - 1 : -1], ids[:, -T:]
    )
    assert relative(scope["old_log_probs"], log_probs.detach()) <= 1e-5
    expected, _ = reference.policy_loss_from_log_probs(log_probs, None, advantages, mask=mask)
    assert scope["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.example("docs/integrations.md", "Sequences without a gradient")
def test_sequences_without_a_gradient(python_blocks):
    of_padded, of_packed = python_blocks(INTEGRATIONS)["Sequences without a gradient"]
    model = make_llama(V).train()
    ids = torch.randint(2, V, (B, T + 3))
    mask, advantages = torch.ones(B, T), torch.tensor([1.0, 0.0, -0.5, 0.0])
    from gspo_ops.integrations import transformers

    scope = vars(transformers) | {
        "torch": torch, "model": model, "mask": mask, "advantages": advantages, "GSPO": GSPO,
        "batch": {"input_ids": ids},
    }  # fmt: skip
    exec(of_padded, scope)
    assert model.is_gradient_checkpointing
    scope["loss"].backward()
    expected = model.lm_head.weight.grad.clone()
    packed = {
        "ids": ids.view(1, -1), "positions": torch.arange(T + 3).repeat(B)[None],
        "cu_seqlens": torch.arange(0, B * (T + 3) + 1, T + 3),
        "mask": torch.nn.functional.pad(mask, (3, 0)).flatten(),
    }  # fmt: skip
    model.zero_grad()
    found = {}
    exec(of_packed, scope | packed, found)
    found["loss"].backward()
    assert found["stats"]["computed"].tolist() == [True, False, True, False]
    torch.testing.assert_close(found["loss"], scope["loss"])
    assert relative(model.lm_head.weight.grad, expected) <= 1e-5


@pytest.mark.example("docs/integrations.md", "TRL")
@needs("trl")
@pytest.mark.filterwarnings("ignore")
def test_trl(python_blocks, tmp_path, monkeypatch):
    import trl
    from datasets import Dataset

    from gspo_ops.trainer.tiny import character_tokenizer

    (code,) = python_blocks(INTEGRATIONS)["TRL"]
    tokenizer = character_tokenizer()
    for part in (make_llama(len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "model")
    on_cpu = {"use_cpu": True, "bf16": False, "report_to": "none", "output_dir": str(tmp_path)}
    monkeypatch.setattr(trl, "GRPOConfig", functools.partial(trl.GRPOConfig, **on_cpu))
    rewards = {"reward": lambda completions, **_: [0.0] * len(completions)}
    dataset = Dataset.from_list([{"prompt": "1 + 1 ="}] * 8)
    scope = {"model": str(tmp_path / "model"), "dataset": dataset, **rewards}
    exec(code, scope)
    trainer = scope["trainer"]
    assert type(trainer).__module__ == "gspo_ops.integrations.trl"
    assert (trainer.epsilon_low, trainer.epsilon_high) == (3e-4, 4e-4)
    assert (trainer.importance_sampling_level, trainer.loss_type) == ("sequence", "grpo")


@pytest.mark.example("docs/integrations.md", "verl")
@needs("verl")
def test_verl(python_blocks, monkeypatch):
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.engine_workers import ActorRolloutRefWorker

    worker = ActorRolloutRefWorker.actor_worker_cls
    monkeypatch.setattr(ActorRolloutRefWorker, "actor_worker_cls", worker)
    register, skip = python_blocks(INTEGRATIONS)["verl"]
    scope = {}
    exec(register, scope)
    assert get_policy_loss_fn("gspo_ops") is scope["verl"].policy_loss
    assert ActorRolloutRefWorker.actor_worker_cls is worker
    exec(skip, scope)
    assert issubclass(ActorRolloutRefWorker.actor_worker_cls, worker)
    assert ActorRolloutRefWorker.actor_worker_cls is not worker


# docs/parallel.md, on two ranks that hold parts of the same batch


@pytest.mark.example("docs/parallel.md", "A vocabulary over ranks")
@pytest.mark.example("docs/parallel.md", "Sequences over ranks")
@pytest.mark.example("docs/parallel.md", "The batch over ranks")
@pytest.mark.example("docs/parallel.md", "Wrapped models")
@pytest.mark.parametrize(
    ("heading", "function"),
    [
        ("A vocabulary over ranks", "on_rank_vocabulary"),
        ("Sequences over ranks", "on_rank_sequences"),
        ("The batch over ranks", "on_rank_batch"),
        ("Wrapped models", "on_rank_wrapped"),
    ],
)
def test_parallel(ranks, python_blocks, heading, function):
    (code,) = python_blocks(PARALLEL)[heading]
    ranks(2)(globals()[function], code)


def make_batch():
    """Return a batch with ratios on both sides of the clip range and one shorter sequence."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) / 2
    targets = torch.randint(V, (B, T), generator=generator)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 4:] = False
    new = reference.log_probs_from_hidden(hidden.double(), weight.double(), targets)
    shift = torch.tensor([5e-4, -2e-4, -6e-4, 1e-4], dtype=torch.float64)
    return {
        "hidden": hidden, "weight": weight, "targets": targets, "mask": mask,
        "old_log_probs": (new - shift[:, None]).float(),
        "advantages": torch.tensor([1.0, -0.7, 1.3, 0.4]),
    }  # fmt: skip


def expected_of(batch):
    """Return the loss and gradients of one process with the whole batch, in float64."""
    exact = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    operands = [exact[name].requires_grad_() for name in OPERANDS]
    loss, _ = reference.policy_loss_from_hidden(**exact)
    grads = torch.autograd.grad(UPSTREAM * loss, operands)
    return loss.item(), dict(zip(OPERANDS, grads, strict=True))


def execute(code, **names):
    """Run code that sees the library's names and these; return all names afterwards."""
    scope = {name: getattr(gspo_ops, name) for name in gspo_ops.__all__} | {"torch": torch, **names}
    exec(code, scope)
    return scope


def leaf(x):
    return x.clone().requires_grad_()


def check(found, expected):
    assert relative(found, expected) <= 5e-6


def on_rank_vocabulary(code):
    rank, size = dist.get_rank(), dist.get_world_size()
    batch = make_batch()
    loss, grads = expected_of(batch)
    mine = {"hidden": leaf(batch["hidden"]), "weight": leaf(batch["weight"].chunk(size)[rank])}
    scope = execute(code, **batch | mine, vocab_group=dist.group.WORLD)
    (UPSTREAM * scope["loss"]).backward()
    assert scope["loss"].item() == pytest.approx(loss, rel=1e-5)
    check(mine["hidden"].grad, grads["hidden"])
    check(mine["weight"].grad, grads["weight"].chunk(size)[rank])


def on_rank_sequences(code):
    """Rank 0 has the first two tokens of each sequence, rank 1 the others."""
    batch = make_batch()
    loss, grads = expected_of(batch)
    own = batch["mask"] & ((torch.arange(T) < 2) == (dist.get_rank() == 0))
    mine = {name: batch[name][own] for name in ("hidden", "targets", "old_log_probs")}
    mine |= {"hidden": leaf(mine["hidden"]), "weight": leaf(batch["weight"])}
    ends = torch.nn.functional.pad(own.sum(-1).cumsum(0), (1, 0)).int()
    scope = execute(code, **batch | mine, cu_seqlens=ends, context_group=dist.group.WORLD)
    (UPSTREAM * scope["loss"]).backward()
    assert scope["loss"].item() == pytest.approx(loss, rel=1e-5)
    check(mine["hidden"].grad, grads["hidden"][own])
    dist.all_reduce(mine["weight"].grad)
    check(mine["weight"].grad, grads["weight"])


def on_rank_batch(code):
    """Rank 0 has one sequence, rank 1 three in two micro-batches."""
    rank, size = dist.get_rank(), dist.get_world_size()
    batch = make_batch()
    _, grads = expected_of(batch)
    weight = leaf(batch.pop("weight"))
    parts = [slice(0, 1)] if rank == 0 else [slice(1, 2), slice(2, 4)]
    micro_batches = [{name: x[part] for name, x in batch.items()} for part in parts]
    masks = [micro_batch.pop("mask") for micro_batch in micro_batches]
    execute(
        code, masks=masks, data_group=dist.group.WORLD,
        micro_batches=[{"weight": weight, **micro_batch} for micro_batch in micro_batches],
    )  # fmt: skip
    dist.all_reduce(weight.grad)
    check(UPSTREAM * weight.grad / size, grads["weight"])  # averaged, as DDP does


def on_rank_wrapped(code):
    """Each rank has two sequences, in DistributedDataParallel."""
    batch = make_batch()
    _, grads = expected_of(batch)
    body = torch.nn.Embedding.from_pretrained(batch.pop("hidden").view(-1, H), freeze=False)
    head = torch.nn.Linear(H, V, bias=False)
    head.weight.data = batch.pop("weight")
    model = DistributedDataParallel(execute(code)["PolicyModel"](body, head))
    batch["tokens"] = torch.arange(B * T).view(B, T)
    rows = slice(0, 2) if dist.get_rank() == 0 else slice(2, 4)
    mine = {name: x[rows] for name, x in batch.items()}
    (UPSTREAM * model(**mine).loss).backward()  # means over equally many sequences
    check(body.weight.grad.view(B, T, H), grads["hidden"])
    check(head.weight.grad, grads["weight"])
