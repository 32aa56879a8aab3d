"""Record every output and gradient of many calls, for changes that must not move a bit.

    python tests/bits.py record before.json         # on the old code, then on the new code
    python tests/bits.py compare before.json

Run both with TRITON_INTERPRET=1 as well, for the kernels. Only public names are called. The bits
depend on the machine: compare only files from the same one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import gspo_ops
from gspo_ops import GRPO, GSPO, GSPOToken, LoRA, Objective, testing

B, T, H, V = 4, 5, 24, 150
MANY = 2600  # the size of a vocabulary in three parts of 1024
LAYOUTS = ("padded", "packed", "packed with mask")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OBJECTIVES: dict[str, Objective] = {
    "GSPO": GSPO(),
    "GSPOToken": GSPOToken(),
    "GRPO": GRPO(),
    "GRPO token-sum, k1": GRPO(aggregation="token-sum", kl_coef=0.1, kl_estimator="k1"),
    "GRPO token-mean, k2": GRPO(aggregation="token-mean", kl_coef=0.1, kl_estimator="k2"),
    "GSPO seq-mean-token-sum, k3": GSPO(aggregation="seq-mean-token-sum", kl_coef=0.1),
}


class Batch(NamedTuple):
    """A batch with log-probs near those of its logits."""

    logits: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    advantages: Tensor
    rollout_weights: Tensor
    where: dict[str, Tensor]

    @property
    def loss(self) -> dict[str, Tensor]:
        return {"old_log_probs": self.old_log_probs, "advantages": self.advantages, **self.where}


def make_batch(layout: str, dtype: torch.dtype, *, vocabulary: int = V, rows: int = T) -> Batch:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    shape = (B, rows) if layout == "padded" else (B * rows,)
    hidden, weight = normal(*shape, H), 0.4 * normal(vocabulary, H)
    bias = normal(vocabulary)
    logits = hidden @ weight.T + bias
    noise = torch.rand(logits.shape, generator=random, dtype=torch.float64).log().neg().log()
    targets = (logits - noise).argmax(-1)  # sampled
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    log_probs = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    old = log_probs + 1e-3 * normal(*shape)
    ref = log_probs + 0.1 * normal(*shape)
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.5], dtype=stats_dtype)
    weights = 0.5 + torch.rand(B, generator=random, dtype=torch.float64)
    mask = torch.rand(shape, generator=random) < 0.8
    where: dict[str, Tensor] = {}
    if layout != "padded":
        borders = [0, 2, 2, rows * 3, rows * B]
        where["cu_seqlens"] = torch.tensor(borders, dtype=torch.int32)
    if layout != "packed":
        where["mask"] = mask
        hidden = hidden.masked_fill(~mask[..., None], torch.nan)
        logits = logits.masked_fill(~mask[..., None], torch.nan)
    return Batch(
        logits.to(dtype), hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets,
        old.to(stats_dtype), ref.to(stats_dtype), advantages, weights.to(stats_dtype), where,
    )  # fmt: skip


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def bits(x: Tensor | None) -> str:
    if x is None:
        return "none"
    x = x.detach().contiguous()
    raw = x.view(torch.uint8) if x.ndim else x[None].view(torch.uint8)
    told = f"{x.dtype} {tuple(x.shape)} {bool(x.isnan().any()) if x.is_floating_point() else ''}"
    return told + " " + hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]


def seen(result: Any, leaves: dict[str, Tensor]) -> dict[str, str]:
    """Return the bits of a call's outputs, and of its gradients for random upstream gradients."""
    if isinstance(result, gspo_ops.PolicyLoss):
        outputs = {"loss": result.loss, **result.stats}
    elif isinstance(result, tuple):
        outputs = dict(zip(("log_probs", "entropy"), result, strict=True))
    else:
        outputs = {"log_probs": result}
    random = torch.Generator().manual_seed(1)
    roots = [x for x in outputs.values() if x.requires_grad]
    if roots:
        upstream = [torch.randn(x.shape, generator=random).to(x.dtype) for x in roots]
        torch.autograd.backward(roots, upstream)
    grads = {f"d{name}": x.grad for name, x in leaves.items()}
    return {name: bits(x) for name, x in (outputs | grads).items()}


Call = Callable[[], dict[str, str]]


def from_logits(batch: Batch, **options: Any) -> Call:
    def call() -> dict[str, str]:
        logits = leaf(batch.logits)
        targets = batch.targets
        if "mask" in batch.where:
            targets = targets.masked_fill(~batch.where["mask"], -100)
        result = gspo_ops.log_probs_from_logits(logits, targets, **options)
        return seen(result, {"logits": logits})

    return call


def loss_from_logits(batch: Batch, **options: Any) -> Call:
    def call() -> dict[str, str]:
        logits = leaf(batch.logits)
        result = gspo_ops.policy_loss_from_logits(logits, batch.targets, **(batch.loss | options))
        return seen(result, {"logits": logits})

    return call


def loss_from_log_probs(batch: Batch, **options: Any) -> Call:
    def call() -> dict[str, str]:
        log_probs = leaf(batch.old_log_probs + 4e-4 * batch.ref_log_probs)
        result = gspo_ops.policy_loss_from_log_probs(log_probs, **(batch.loss | options))
        return seen(result, {"log_probs": log_probs})

    return call


def from_hidden(
    batch: Batch, function: Callable = gspo_ops.log_probs_from_hidden, *, trains: str = "hw",
    bias: bool = False, lora: bool = False, main_grad: bool = False, **options: Any,
) -> Call:  # fmt: skip
    def call() -> dict[str, str]:
        leaves = {"hidden": batch.hidden.detach().clone(), "weight": batch.weight.detach().clone()}
        leaves["hidden"].requires_grad_("h" in trains)
        leaves["weight"].requires_grad_("w" in trains and not lora)
        given = dict(options)
        if bias:
            given["bias"] = leaves["bias"] = leaf(batch.bias)
        if lora:
            random = torch.Generator().manual_seed(2)
            a = leaf(torch.randn(3, H, generator=random).to(batch.hidden.dtype))
            b = leaf(0.1 * torch.randn(len(batch.weight), 3, generator=random))
            leaves |= {"a": a, "b": b}
            given["lora"] = LoRA(a, b, 0.7)
        buffer = torch.ones(batch.weight.shape) if main_grad else None
        if main_grad:
            given["main_grad"] = buffer
        targets = batch.targets
        if function is gspo_ops.log_probs_from_hidden:
            if "mask" in batch.where:
                targets = targets.masked_fill(~batch.where["mask"], -100)
        else:
            given = batch.loss | given
        result = function(leaves["hidden"], leaves["weight"], targets, **given)
        found = seen(result, leaves)
        return found | ({"main_grad": bits(buffer)} if main_grad else {})

    return call


def loss_from_hidden(batch: Batch, **options: Any) -> Call:
    return from_hidden(batch, gspo_ops.policy_loss_from_hidden, **options)


def squared(log_probs, old, advantages, ids):
    ratio = (log_probs - old).exp()
    return -ratio * advantages + (ids + 1) * (log_probs - old).square()


squared_by_token = type(
    "ByToken", (), {"aggregation": "token-mean", "__call__": lambda self, *x: squared(*x)}
)()


def calls(group: dist.ProcessGroup) -> Iterator[tuple[str, Call]]:
    many = {"vocabulary": MANY, "rows": 3}
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        batch, wide = make_batch(layout, dtype), make_batch(layout, dtype, **many)
        name = f"{layout} {dtype}".replace("torch.", "")
        for options in (
            {}, {"return_entropy": True}, {"temperature": 0.7, "softcap": 20.0},
            {"temperature": 1.3, "softcap": 5.0, "return_entropy": True},
            {"vocab_group": group}, {"vocab_group": group, "return_entropy": True},
        ):  # fmt: skip
            told = f"{name} {sorted((k, str(v)[:5]) for k, v in options.items())}"
            yield f"log_probs_from_logits {told}", from_logits(batch, **options)
            if "return_entropy" not in options:
                yield f"log_probs_from_logits wide {told}", from_logits(wide, **options)
            yield f"loss_from_logits {told}", loss_from_logits(batch, **options)
            yield f"log_probs_from_hidden {told}", from_hidden(batch, bias=True, **options)
            yield f"loss_from_hidden {told}", loss_from_hidden(batch, **options)
        yield f"on-policy logits {name}", loss_from_logits(batch, old_log_probs=None)
        yield f"on-policy hidden {name}", loss_from_hidden(batch, old_log_probs=None)
        for plan, more in (
            ("keep", {}), ("recompute", {}), ("chunk", {"memory_budget": 100_000}),
            ("auto", {"memory_budget": 60_000}), ("chunk", {"trains": "h", "bias": True}),
            ("keep", {"trains": "w"}), ("auto", {"trains": "h", "memory_budget": 0}),
        ):  # fmt: skip
            told = f"{name} {plan} {more}"
            yield f"loss_from_hidden wide {told}", loss_from_hidden(wide, plan=plan, **more)
            if plan != "chunk":
                yield f"log_probs_from_hidden wide {told}", from_hidden(wide, plan=plan, **more)
            yield (
                f"lora {told}",
                loss_from_hidden(
                    batch, plan=plan, lora=True, softcap=9.0, return_entropy=True, **more
                ),
            )
    for layout, (name, objective) in itertools.product(LAYOUTS, OBJECTIVES.items()):
        batch = make_batch(layout, torch.float32)
        per_token = batch.advantages.repeat_interleave(T).view(batch.targets.shape)
        options: dict[str, Any] = {"objective": objective}
        if objective.kl_coef:
            options["ref_log_probs"] = batch.ref_log_probs
        told = f"{layout} {name}"
        for more in (
            {}, {"rollout_weights": batch.rollout_weights}, {"denominator": 3.0},
            {"context_group": group}, {"old_log_probs": None},
            {"ref_log_probs": batch.ref_log_probs, "denominator": torch.tensor(2.0)},
        ):  # fmt: skip
            if "context_group" in more and layout != "padded":
                continue
            given = options | more
            yield f"loss_from_log_probs {told} {sorted(more)}", loss_from_log_probs(batch, **given)
            yield f"loss_from_logits {told} {sorted(more)}", loss_from_logits(batch, **given)
            for plan in ("keep", "recompute", *(() if "context_group" in more else ("chunk",))):
                yield (
                    f"loss_from_hidden {told} {sorted(more)} {plan}",
                    loss_from_hidden(batch, plan=plan, **given),
                )
        if objective.ratio_level != "sequence":
            given = options | {"advantages": per_token, "rollout_weights": 1 + 0.1 * per_token}
            yield f"per token {told}", loss_from_log_probs(batch, **given)
            yield f"per token hidden {told}", loss_from_hidden(batch, plan="chunk", **given)
    for layout, dtype in itertools.product(LAYOUTS, (torch.bfloat16, torch.float32)):
        batch, name = make_batch(layout, dtype), f"{layout} {dtype}"
        for function in (squared, squared_by_token):
            given = {"objective": function, "rollout_weights": batch.rollout_weights}
            told = f"function {name} {getattr(function, 'aggregation', '')}"
            yield f"{told} log_probs", loss_from_log_probs(batch, **given)
            yield f"{told} logits", loss_from_logits(batch, **given)
            yield f"{told} hidden", loss_from_hidden(batch, old_log_probs=None, **given)
        for plan in ("keep", "recompute", "chunk"):
            yield f"main_grad {name} {plan}", loss_from_hidden(batch, main_grad=True, plan=plan)
        for products, sync in (("mm", True), ("mm", False), ("triton", False)):
            for plan in ("keep", "recompute"):
                yield (
                    f"{products} {sync} {plan} {name}",
                    loss_from_hidden(batch, products=products, allow_sync=sync, plan=plan),
                )
            yield (
                f"{products} {sync} log_probs {name}",
                from_hidden(
                    batch, products=products, allow_sync=sync, return_entropy=True, softcap=8.0
                ),
            )
    for dtype in DTYPES:
        empty = make_batch("padded", dtype, rows=0)
        yield f"no tokens {dtype} logits", loss_from_logits(empty)
        yield f"no tokens {dtype} hidden", loss_from_hidden(empty)
        far = make_batch("padded", dtype)
        far = far._replace(weight=far.weight * 20, logits=far.logits * 20)
        yield f"far {dtype} logits", loss_from_logits(far, return_entropy=True)
        for plan in ("keep", "chunk", "recompute"):
            yield f"far {dtype} hidden {plan}", loss_from_hidden(far, plan=plan)


def record() -> dict[str, dict[str, str]]:
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        testing.patch_interpreter()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = {}
        for name, call in calls(dist.group.WORLD):
            assert name not in found, name
            found[name] = call()
        return found
    finally:
        dist.destroy_process_group()


def main(command: str, path: str) -> int:
    found = record()
    if command == "record":
        with open(path, "w") as file:
            json.dump(found, file, indent=1)
        print(f"{len(found)} calls, {sum(map(len, found.values()))} tensors")
        return 0
    with open(path) as file:
        before = json.load(file)
    moved: dict[str, list[str]] = {}
    for name in before | found:
        then, now = before.get(name, {}), found.get(name, {})
        if differing := [x for x in then | now if then.get(x) != now.get(x)]:
            moved[name] = differing
    for name, tensors in moved.items():
        print(f"{name}: {', '.join(tensors)}")
    print(f"{len(before)} calls, {len(moved)} with other bits")
    return bool(moved)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
