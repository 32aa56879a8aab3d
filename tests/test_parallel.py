"""One process compared with a split over ranks of vocabulary, sequences, both, or the batch.

The functions that begin with `on_rank_` run in every process of a gloo group; they build the whole
problem there, take their part of it, and compare with the whole and with float64.
"""

import os
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from gspo_ops import (
    GRPO,
    GSPO,
    GSPOToken,
    LoRA,
    Objective,
    global_denominator,
    group_advantages,
    log_probs_from_hidden,
    log_probs_from_logits,
    policy_loss_from_hidden,
    policy_loss_from_log_probs,
    policy_loss_from_logits,
    reference,
    top_entropy_weights,
)
from gspo_ops.head import Head, HeadOptions
from gspo_ops.hidden import hidden_fwd
from gspo_ops.logits import logits_fwd
from gspo_ops.parallel import ELSEWHERE, NOWHERE, Vocabulary
from gspo_ops.softmax import Softmax, TargetRows
from gspo_ops.testing import (
    ALLOWED,
    BOUNDS,
    FURTHER_OBJECTIVES,
    OBJECTIVES,
    make_case,
    relative,
    synthetic_head,
    synthetic_logits,
    worst,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
V, H = 104, 24
# the kernels see a part of the vocabulary or all of it, however many ranks there are
sizes = pytest.mark.parametrize("size", [2] if INTERPRETED else [2, 4])
# the collectives are gloo's, whichever code computes the products
pytestmark = pytest.mark.kernels


def everyone(x: Tensor, group=None) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def assert_same_everywhere(*values: Tensor) -> None:
    """Check for equal bits, as ranks that differ could take different clip decisions."""
    for x in values:
        assert all(torch.equal(x, y) for y in everyone(x.detach()))


def joined(x: Tensor, dim: int = 0, group=None) -> Tensor:
    """Join the parts of all ranks, which may differ in size."""
    parts = [torch.empty(0)] * dist.get_world_size(group)
    dist.all_gather_object(parts, x, group=group)
    return torch.cat(parts, dim)


def part_of(x: Tensor, dim: int = 0, group=None) -> Tensor:
    size = dist.get_world_size(group)
    return x.chunk(size, dim)[dist.get_rank(group)].contiguous()


def any_part_of(x: Tensor, dim: int = 0, seed: int = 0) -> Tensor:
    """Return this rank's part: of the others' size for even seeds, of any size for odd ones."""
    if seed % 2 == 0:
        return part_of(x, dim)
    size = dist.get_world_size()
    total, shares = x.shape[dim], [100, 200, 7, 200][:size]
    sizes = [total * share // sum(shares) for share in shares]
    sizes[-1] += total - sum(sizes)
    return x.split(sizes, dim)[dist.get_rank()].contiguous()


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def assert_stats(stats: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert stats.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(
            stats[name], x, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_grad(grad: Tensor, exact: Tensor, of_one_process: Tensor, bound: float) -> None:
    """Check a gradient's error; in 16 bits, only the last bit may be worse than in one process."""
    if grad.dtype.itemsize == 2:
        bound = ALLOWED * relative(of_one_process, exact)
    assert relative(grad, exact) <= bound
    assert torch.equal(grad == 0, of_one_process == 0)


# A vocabulary over ranks


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_over_ranks(ranks, size, dtype):
    ranks(size)(on_rank_logits, dtype)


def on_rank_logits(dtype: torch.dtype) -> None:
    group = dist.group.WORLD
    variants = [{}, {"temperature": 0.7}, {"softcap": 15.0, "temperature": 1.3}]
    for seed, (objective, packed) in enumerate((o, p) for o in OBJECTIVES for p in (False, True)):
        options = variants[seed % 3] | {"return_entropy": seed % 2 == 0}
        source = synthetic_logits(9, 5, V, device=CPU, seed=seed).to(dtype).float()
        case = make_case(source, objective, packed=packed, seed=seed)
        exact = case.double()
        whole, leaf64 = leaf(case.logits.to(dtype)), leaf(exact.logits)
        mine = leaf(any_part_of(whole, -1, seed))
        given = case.targets, case.old_log_probs, case.advantages
        loss, stats = policy_loss_from_logits(
            mine, *given, vocab_group=group, **options, **case.options()
        )
        expected = policy_loss_from_logits(whole, *given, **options, **case.options())
        loss64, _ = reference.policy_loss_from_logits(
            leaf64,
            case.targets,
            exact.old_log_probs,
            exact.advantages,
            **options,
            **exact.options(),
        )
        assert abs(loss.double() - loss64) <= 2e-6
        assert_stats(stats, expected.stats)
        assert_same_everywhere(loss, *stats.values())
        for x in (loss, expected.loss, loss64):
            (x * -1.7).backward()
        assert_grad(joined(mine.grad, -1), leaf64.grad, whole.grad, 2e-6)


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_entropy_over_ranks(ranks, size, dtype):
    ranks(size)(on_rank_log_probs, dtype)


def on_rank_log_probs(dtype: torch.dtype) -> None:
    V = 507  # 127, 127, 127 and 126, or 100, 200, 7 and 200
    source = synthetic_logits(1, 12, V, device=CPU)[0].to(dtype)
    source[3, V // 2 :] = -torch.inf  # the parts of some ranks have nothing else
    source[4, : V - 3] = -torch.inf
    targets = source.float().argmax(1)
    targets[:3] = torch.tensor([0, V - 1, -100])
    targets[4] = V - 1
    for seed in range(2):
        check_log_probs(source, any_part_of(source, -1, seed), targets)


def check_log_probs(source: Tensor, part: Tensor, targets: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(2, 12, generator=generator)
    upstream[:, 5] = 0
    whole, mine = leaf(source), leaf(part)
    exact = leaf(source.double().clamp(min=-1e4))  # -inf has no derivative in float64
    ours = log_probs_from_logits(mine, targets, vocab_group=dist.group.WORLD, return_entropy=True)
    expected = log_probs_from_logits(whole, targets, return_entropy=True)
    exactly = (
        reference.log_probs_from_logits(exact, targets),
        reference.entropy_from_logits(exact, targets),
    )
    assert worst(ours[0] - exactly[0]) <= BOUNDS["log_prob"]
    assert worst(ours[1] - exactly[1]) <= BOUNDS["entropy"]
    assert_same_everywhere(*ours)
    for values in (ours, expected, exactly):
        sum((x * up).sum() for x, up in zip(values, upstream, strict=True)).backward()
    assert_grad(joined(mine.grad, -1), exact.grad, whole.grad, 4e-6)


PLANS = ["keep", "part", "chunk", "recompute"]


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", ["mm", "triton"] if INTERPRETED else ["auto"])
def test_hidden_over_ranks(ranks, size, dtype, products):
    ranks(size)(on_rank_hidden, dtype, products)


def budget(plan: str, rows: int, vocabulary: int, itemsize: int) -> dict:
    """Return options for a plan; "part" keeps 1024 of each rank's columns."""
    if plan != "part":
        return {"plan": plan, "memory_budget": rows * vocabulary * itemsize // 3}
    return {"plan": "auto", "memory_budget": 1030 * rows * itemsize}


def on_rank_hidden(dtype: torch.dtype, products: str) -> None:
    group = dist.group.WORLD
    for seed, plan in enumerate(PLANS):
        objective = OBJECTIVES[seed % len(OBJECTIVES)]
        size = 1100 * dist.get_world_size() if plan == "part" else V
        head = synthetic_head(4, 3, H, size, device=CPU, seed=seed).to(dtype)
        case = make_case(head, objective, packed=seed % 2 == 0, seed=seed)
        exact = case.double()
        options = {
            "softcap": [None, 20.0][seed % 2], "temperature": [1.0, 1.2][seed % 2],
            "return_entropy": plan != "part",
        }  # fmt: skip
        whole = case.head.map(leaf)
        mine = whole._replace(
            hidden=leaf(whole.hidden), weight=leaf(any_part_of(whole.weight, 0, 1)),
            bias=leaf(any_part_of(whole.bias, 0, 1)),
        )  # fmt: skip
        clean = torch.where(case.valid.unsqueeze(-1), case.head.hidden, 0.0)
        of_64 = case.head._replace(hidden=clean).to(torch.float64).map(leaf)
        given = case.targets, case.old_log_probs, case.advantages
        rows = case.targets.numel()
        as_planned = budget(
            plan, rows, size // dist.get_world_size(), 2 if dtype == torch.bfloat16 else 4
        )
        loss, stats = policy_loss_from_hidden(
            mine.hidden, mine.weight, *given, bias=mine.bias, vocab_group=group, products=products,
            **as_planned, **options, **case.options(),
        )  # fmt: skip
        expected = policy_loss_from_hidden(
            whole.hidden, whole.weight, *given, bias=whole.bias,
            plan="keep" if plan == "part" else plan, products=products, **options, **case.options(),
        )  # fmt: skip
        loss64, _ = reference.policy_loss_from_hidden(
            of_64.hidden, of_64.weight, case.targets, exact.old_log_probs, exact.advantages,
            bias=of_64.bias, **options, **exact.options(),
        )  # fmt: skip
        assert abs(loss.double() - loss64) <= 4e-6
        assert_stats(stats, expected.stats)
        assert_same_everywhere(loss, *stats.values())
        for x in (loss, expected.loss, loss64):
            (x * 0.7).backward()
        assert_same_everywhere(mine.hidden.grad)
        bound = BOUNDS["dweight, rel L2"]
        assert_grad(mine.hidden.grad, of_64.hidden.grad, whole.hidden.grad, bound)
        assert_grad(joined(mine.weight.grad), of_64.weight.grad, whole.weight.grad, bound)
        assert_grad(joined(mine.bias.grad), of_64.bias.grad, whole.bias.grad, bound)


@sizes
def test_lora_entropy_and_main_grad_over_ranks(ranks, size):
    ranks(size)(on_rank_lora)


def on_rank_lora() -> None:
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(3)
    hidden, weight, _ = synthetic_head(1, 10, H, V, device=CPU)[:3]
    hidden, targets = hidden[0], torch.randint(V, (10,), generator=generator)
    targets[4] = -100
    a, b = (torch.randn(s, generator=generator) / 5 for s in ((3, H), (V, 3)))
    upstream = torch.randn(2, 10, generator=generator)
    part, part_of_b = any_part_of(weight, 0, 1), any_part_of(b, 0, 1)
    both = [[leaf(x) for x in (hidden, a, b)], [leaf(x) for x in (hidden, a, part_of_b)]]
    for leaves, w, g in zip(both, (weight, part), (None, group), strict=True):
        x, a, b = leaves
        values = log_probs_from_hidden(
            x, w, targets, lora=LoRA(a, b, 0.5), vocab_group=g, return_entropy=True
        )
        sum((x * up).sum() for x, up in zip(values, upstream, strict=True)).backward()
    (x, a, b), (my_x, my_a, my_b) = both
    assert_same_everywhere(my_x.grad, my_a.grad)
    for ours, expected in ((my_x.grad, x.grad), (my_a.grad, a.grad), (joined(my_b.grad), b.grad)):
        assert relative(ours, expected) <= 1e-5

    # a buffer to which gradients are added
    mine = leaf(part_of(weight))
    main_grad = torch.full_like(mine, 0.25)
    log_probs_from_hidden(
        hidden, mine, targets, main_grad=main_grad, vocab_group=group
    ).sum().backward()
    assert mine.grad is None
    whole = leaf(weight)
    log_probs_from_hidden(hidden, whole, targets).sum().backward()
    assert relative(joined(main_grad) - 0.25, whole.grad) <= 1e-5


@sizes
def test_dtensors_of_any_length(ranks, size):
    ranks(size)(on_rank_dtensor)


def on_rank_dtensor() -> None:
    """No number of ranks divides the vocabulary; the gradient is a DTensor again."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    group = mesh.get_group()
    hidden, weight, bias = synthetic_head(1, 8, H, 103, device=CPU)[:3]
    hidden = hidden[0]
    targets = torch.arange(8) * 14
    expected = [leaf(x) for x in (hidden, weight, bias)]
    log_probs_from_hidden(*expected[:2], targets, bias=expected[2]).sum().backward()

    x = leaf(hidden)
    w, b = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (weight, bias))
    log_probs_from_hidden(x, w, targets, bias=b, vocab_group=group).sum().backward()
    for grad, leaf_ in zip(
        (x.grad, w.grad.full_tensor(), b.grad.full_tensor()), expected, strict=True
    ):
        assert relative(grad, leaf_.grad) <= 1e-5
    assert w.grad.placements == (Shard(0),)

    logits = reference.logits_from_hidden(hidden, weight)
    whole = leaf(logits)
    log_probs_from_logits(whole, targets).sum().backward()
    split = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_()
    log_probs = log_probs_from_logits(split, targets, vocab_group=group)
    torch.testing.assert_close(log_probs, log_probs_from_logits(logits, targets))
    log_probs.sum().backward()
    assert relative(split.grad.full_tensor(), whole.grad) <= 2e-6

    with pytest.raises(ValueError, match=r"weight is a DTensor .* pass vocab_group=.*full_tensor"):
        log_probs_from_hidden(hidden, w, targets)
    for placement in (Replicate(), Shard(1)):
        other = distribute_tensor(weight, mesh, [placement])
        with pytest.raises(
            ValueError, match=r"weight must be sharded over vocab_group by Shard\(0\)"
        ):
            log_probs_from_hidden(hidden, other, targets, vocab_group=group)
    few = distribute_tensor(weight[: dist.get_world_size() - 1], mesh, [Shard(0)])
    with pytest.raises(ValueError, match="weight must give each of"):
        log_probs_from_hidden(hidden, few, targets * 0, vocab_group=group)
    with pytest.raises(ValueError, match="hidden must be the same on all ranks"):
        log_probs_from_hidden(
            distribute_tensor(hidden, mesh, [Shard(0)]), w, targets, vocab_group=group
        )


def test_groups_that_are_none(ranks):
    ranks(2)(on_rank_no_group)


def on_rank_no_group() -> None:
    hidden, weight, _ = synthetic_head(1, 8, H, V, device=CPU)[:3]
    hidden, targets = hidden[0], torch.zeros(8, dtype=torch.long)
    with pytest.raises(
        TypeError, match=r"vocab_group must be a torch.distributed.ProcessGroup .* got str"
    ):
        log_probs_from_hidden(hidden, weight, targets, vocab_group="world")
    alone = [dist.new_group([r]) for r in range(2)]
    with pytest.raises(TypeError, match=r"vocab_group must be .* that this rank belongs to"):
        log_probs_from_hidden(hidden, weight, targets, vocab_group=alone[1 - dist.get_rank()])


@sizes
def test_a_target_of_no_rank_is_nan_on_all(ranks, size):
    ranks(size)(on_rank_nowhere)


def on_rank_nowhere() -> None:
    """Targets of no rank, unchecked as on a GPU, are NaN on all, even if only one rank has them."""
    group, columns = dist.group.WORLD.group_name, any_part_of(torch.arange(V), 0, 1)
    hidden, weight, _ = synthetic_head(2, 4, H, V, device=CPU)[:3]
    hidden, weight = hidden[0], any_part_of(weight, 0, 1)
    everywhere = torch.tensor([0, V - 1, 50, 60])
    targets = everywhere.clone()
    if dist.get_rank() == 1:
        targets[2:] = torch.tensor([V, -1])
    local = Vocabulary.of(group, len(columns)).local(targets, None)
    assert local.tolist() == [
        NOWHERE if not 0 <= y < V else y - columns[0] if y in columns else ELSEWHERE
        for y in targets.tolist()
    ]
    expected = log_probs_from_logits(hidden @ joined(weight).mT, everywhere)
    products = "mm" if INTERPRETED else "torch"
    rows, softmax = TargetRows(local, None), Softmax(1.0, None, False, group)
    of_logits = logits_fwd(hidden @ weight.mT, rows, softmax)
    head, options = (
        Head(hidden, weight, None, None, None),
        HeadOptions(softmax, products, False, 1.0, 0),
    )
    of_hidden = hidden_fwd(head, rows, None, options)
    for found in (of_logits.log_probs, of_hidden.log_probs):
        torch.testing.assert_close(found[:2], expected[:2])
        assert found[2:].isnan().all()


# What is wrong on one rank is an error on all, within seconds


class Refusals:
    """Valid calls, made with a change on one rank."""

    def __init__(self, culprit: int) -> None:
        self.culprit, self.is_culprit = culprit, dist.get_rank() == culprit

    def __call__(self, function, good: dict, own: str, others: str = "", **bad) -> None:
        """Check for one error on the rank with the bad arguments, and for another one elsewhere."""
        others = others or rf"rank {self.culprit} of \w*group refused its input"
        start = time.monotonic()
        with pytest.raises(Exception, match=own if self.is_culprit else others):
            function(**(good | bad if self.is_culprit else good))
        assert time.monotonic() - start < 20, f"{function.__name__}, {bad.keys()}"


def a_batch() -> tuple[dict, Tensor, Tensor]:
    """Return arguments of a policy loss except its source, hidden states, and a head."""
    hidden, weight, _ = synthetic_head(2, 4, H, V, device=CPU)[:3]
    targets = torch.arange(8).view(2, 4) * 14
    old, advantages = torch.full((2, 4), -4.0), torch.tensor([1.0, -1.0])
    mask = torch.ones(2, 4, dtype=torch.bool)
    given = {"old_log_probs": old, "advantages": advantages, "mask": mask, "objective": GRPO()}
    return {"targets": targets} | given, hidden, weight


@sizes
def test_one_rank_refuses_its_part_of_a_vocabulary(ranks, size):
    ranks(size)(on_rank_bad_part)


def on_rank_bad_part() -> None:
    group = dist.group.WORLD
    batch, hidden, weight = a_batch()
    weight = any_part_of(weight, 0, 1)
    targets, logits = batch["targets"], hidden @ weight.mT
    batch["vocab_group"] = group
    from_hidden = batch | {"hidden": leaf(hidden), "weight": weight}
    from_logits = batch | {"logits": logits}
    names = ("targets", "vocab_group")
    hidden_only = {name: from_hidden[name] for name in ("hidden", "weight", *names)}
    logits_only = {name: from_logits[name] for name in ("logits", *names)}
    calls = [
        (log_probs_from_logits, logits_only),
        (log_probs_from_hidden, hidden_only),
        (policy_loss_from_logits, from_logits),
        (policy_loss_from_hidden, from_hidden | {"plan": "chunk"}),
    ]
    outside, other = targets.clone(), targets.clone()
    outside[1, 2], other[1, 2] = V, 0
    refused = Refusals(dist.get_world_size() - 1)
    for function, good in calls:
        if not INTERPRETED:  # kernels return NaN for it, as on a GPU
            refused(
                function, good, r"targets must lie in \[0, 104\).*got 104 at row 6", targets=outside
            )
        same = "must be the same on all ranks of vocab_group"
        refused(function, good, same, same, targets=other)
        refused(function, good, "targets must be int32 or int64", targets=targets.float())
        refused(function, good, r"targets must have shape \(2, 4\)", targets=targets[:1])
        refused(function, good, "targets must be a torch.Tensor, got list", targets=[1])
        refused(function, good, "temperature must be finite and > 0", temperature=0.0)
        source = "hidden" if "hidden" in good else "logits"
        refused(function, good, f"{source} must be float16", **{source: good[source].long()})
        rows = {source: good[source][:1], "targets": targets[:1]}
        if "mask" not in good:
            number = f"the number of rows of {source} must be the same .*got .*8.*4"
            refused(function, good, number, number, **rows)
            entropy = "return_entropy must be the same"
            refused(function, good, entropy, entropy, return_entropy=True)
            continue
        refused(function, good, "mask must have shape", mask=batch["mask"][:1])
        refused(function, good, "mask must contain only 0 and 1", mask=batch["mask"] * 2)
        refused(function, good, same, same, mask=targets != 0)
        refused(function, good, "advantages must have shape", advantages=torch.ones(3))
        refused(function, good, same, same, advantages=-batch["advantages"])
        bf16 = batch["old_log_probs"].bfloat16()
        refused(function, good, "old_log_probs must be float32", old_log_probs=bf16)
        refused(function, good, "denominator must be finite and > 0", denominator=-1.0)
        refused(function, good, "denominator must be > 0", denominator=torch.tensor(-1.0))
        refused(function, good, "objective must be an Objective", objective="GSPO")
        refused(function, good, same, same, objective=GSPO())
    log_probs = log_probs_from_hidden(**hidden_only)
    assert_same_everywhere(log_probs)
    refused(
        log_probs_from_hidden, hidden_only, "whether hidden requires grad must be the same",
        "whether hidden requires grad must be the same", hidden=hidden,
    )  # fmt: skip
    refused(
        policy_loss_from_hidden, from_hidden, "whether plan is 'chunk' must be the same",
        "whether plan is 'chunk' must be the same", plan="chunk",
    )  # fmt: skip
    refused(log_probs_from_hidden, hidden_only, "plan must be one of", plan="none")
    refused(log_probs_from_hidden, hidden_only, "weight must have shape", weight=weight[:, 1:])
    # a function as objective, whose rows follow the log-probs
    custom = from_logits | {"objective": lambda new, old, advantages, ids: new * advantages}
    refused(
        policy_loss_from_logits, custom, "mask must contain only 0 and 1", mask=batch["mask"] * 2
    )
    refused(policy_loss_from_logits, custom, "advantages must have", advantages=torch.ones(3))


@sizes
def test_one_rank_refuses_its_part_of_sequences(ranks, size):
    ranks(size)(on_rank_bad_sequences)


def on_rank_bad_sequences() -> None:
    batch, hidden, weight = a_batch()
    rows = {name: x.view(-1) for name, x in batch.items() if name in ("targets", "old_log_probs")}
    cu_seqlens = torch.tensor([0, 3, 8])
    common = rows | {
        "advantages": batch["advantages"], "cu_seqlens": cu_seqlens,
        "context_group": dist.group.WORLD, "objective": GSPO(),
    }  # fmt: skip
    no_targets = {name: x for name, x in common.items() if name != "targets"}
    hidden = hidden.view(8, H)
    calls = [
        (policy_loss_from_log_probs, no_targets | {"log_probs": rows["old_log_probs"] - 0.1}),
        (policy_loss_from_logits, common | {"logits": hidden @ weight.mT}),
        (policy_loss_from_hidden, common | {"hidden": hidden, "weight": weight}),
    ]
    refused = Refusals(0)
    for function, good in calls:
        refused(
            function, good, "cu_seqlens must be non-decreasing", cu_seqlens=torch.tensor([0, 9, 8])
        )
        refused(function, good, "cu_seqlens is needed", cu_seqlens=None)
        refused(function, good, "cu_seqlens must be int32", cu_seqlens=cu_seqlens.float())
        refused(function, good, "mask must contain only 0 and 1", mask=torch.full((8,), 2))
        refused(function, good, "advantages must have shape", advantages=torch.ones(3))
        refused(function, good, "denominator must be > 0", denominator=torch.tensor(0.0))
        other = "the objective's options must be the same on all ranks of context_group"
        refused(function, good, other, other, objective=lambda new, *_: new)
        refused(function, good, other, other, objective=GRPO())
        number = r"the number of sequences must be the same on all ranks of context_group"
        fewer = {"cu_seqlens": torch.tensor([0, 8]), "advantages": torch.ones(1)}
        refused(function, good, number, number, **fewer)
        if "targets" not in good:
            continue
        entropy = "return_entropy must be the same on all ranks of context_group"
        refused(function, good, entropy, entropy, return_entropy=True)
        if not INTERPRETED:
            outside = rows["targets"] + V
            refused(function, good, r"targets must lie in \[0, 104\)", targets=outside)
    assert_same_everywhere(policy_loss_from_log_probs(**calls[0][1]).loss)

    batches = {"batches": [{"cu_seqlens": cu_seqlens}], "context_group": dist.group.WORLD}
    for good in (batches, {"batches": batches["batches"], "group": dist.group.WORLD}):
        refused(global_denominator, good, "batches must contain at least one", batches=[])
        refused(global_denominator, good, "cu_seqlens must be a torch", batches=[{"cu_seqlens": 3}])
    number = "the number of sequences in batches must be the same on all ranks of context_group"
    refused(global_denominator, batches, number, number, batches=[{"cu_seqlens": cu_seqlens[1:]}])


def test_one_of_all_ranks_refuses(ranks):
    ranks(4)(on_rank_bad_both)


def on_rank_bad_both() -> None:
    """On 2 x 2 ranks, those that share no group with the culprit raise an error too."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "vocab"))
    batch, hidden, weight = a_batch()
    good = batch | {
        "hidden": hidden, "weight": part_of(weight, 0, mesh.get_group("vocab")),
        "context_group": mesh.get_group("context"), "vocab_group": mesh.get_group("vocab"),
    }  # fmt: skip
    for culprit in range(4):
        refused = Refusals(culprit)
        there = r"rank \d of (vocab|context)_group refused its input"
        mask = batch["mask"] * 2
        refused(policy_loss_from_hidden, good, "mask must contain only 0 and 1", there, mask=mask)
        refused(policy_loss_from_hidden, good, "plan must be one of", there, plan="none")
        refused(policy_loss_from_hidden, good, "targets must be int32", there, targets=hidden)
    assert_same_everywhere(policy_loss_from_hidden(**good).loss)


def test_dtensors_where_plain_tensors_belong(ranks):
    ranks(2)(on_rank_plain)


def on_rank_plain() -> None:
    mesh = init_device_mesh("cpu", (2,))
    batch, hidden, weight = a_batch()
    old = batch["old_log_probs"]
    given = batch | {"ref_log_probs": old, "rollout_weights": -old, "denominator": torch.ones(())}
    buffer = {"main_grad": torch.zeros_like(weight), "weight": leaf(weight)}
    sources = [
        (policy_loss_from_hidden, given | {"hidden": hidden} | buffer),
        (policy_loss_from_logits, given | {"logits": hidden @ weight.mT}),
        (
            policy_loss_from_log_probs,
            {k: x for k, x in given.items() if k != "targets"} | {"log_probs": old},
        ),
        (group_advantages, {"rewards": torch.ones(4), "group_ids": torch.arange(4)}),
        (global_denominator, {"batches": [{"cu_seqlens": torch.tensor([0, 1])}]}),
    ]
    for function, good in sources:
        function(**good)
        for name, x in good.items():
            if not isinstance(x, Tensor):
                continue
            placement = Shard(0) if x.ndim else Replicate()
            other = distribute_tensor(x.detach(), mesh, [placement])
            with pytest.raises(
                (TypeError, ValueError), match=f"^{name} .* DTensor with placements"
            ):
                function(**good | {name: other})
    as_dtensor = distribute_tensor(torch.tensor([0, 1]), mesh, [Replicate()])
    with pytest.raises(TypeError, match="cu_seqlens must be a plain tensor, got a DTensor"):
        global_denominator([{"cu_seqlens": as_dtensor}])


# Sequences over ranks


def splits(rows: int, size: int) -> dict[str, list[Tensor]]:
    """Return the rows of each rank, by the names of the usual orders."""
    generator = torch.Generator().manual_seed(rows)
    halves = torch.arange(rows).chunk(2 * size)
    halves = [*halves, *[torch.arange(0)] * (2 * size - len(halves))]
    owner = torch.randint(size, (rows,), generator=generator)
    last = [torch.arange(0)] * (size - 1)
    return {
        "contiguous": [torch.cat(halves[2 * r : 2 * r + 2]) for r in range(size)],
        "zigzag": [torch.cat([halves[r], halves[2 * size - 1 - r]]) for r in range(size)],
        "scattered": [(owner == r).nonzero().squeeze(1) for r in range(size)],
        "all on the last": [*last, torch.arange(rows)],
    }


def lengths_of(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return cu_seqlens of the sequences' tokens among these rows, which are in order."""
    return torch.searchsorted(rows, cu_seqlens.long()).int()


CONTEXTS = [
    (objective, weights, kl, old)
    for objective in ("GSPO", "GSPOToken", "GRPO", "token-mean", "token-sum", "seq-mean-token-sum")
    for weights, kl, old in (
        ("token", None, True), ("sequence", "k3", True), (None, "k2", False), (None, None, True),
    )
] + [
    (objective, ("token", "sequence", None)[i % 3], None, True)
    for i, objective in enumerate(FURTHER_OBJECTIVES) if objective.entropy_coef == 0
]  # fmt: skip


def objective_of(name: str | Objective, kl: str | None) -> Objective:
    if isinstance(name, Objective):
        return name
    options = {} if kl is None else {"kl_coef": 0.1, "kl_estimator": kl}
    kinds = {"GSPO": GSPO, "GSPOToken": GSPOToken, "GRPO": GRPO}
    return kinds[name](**options) if name in kinds else GRPO(aggregation=name, **options)


@sizes
def test_sequences_over_ranks(ranks, size):
    ranks(size)(on_rank_sequences)


def on_rank_sequences() -> None:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    for seed, (name, weights, kl, old) in enumerate(CONTEXTS):
        objective = objective_of(name, kl)
        generator = torch.Generator().manual_seed(seed)
        case = make_case(synthetic_logits(9, 6, 11, device=CPU), objective, packed=True, seed=seed)
        rows, batch = len(case.targets), len(case.cu_seqlens) - 1
        log_probs = torch.where(
            case.valid, log_probs_from_logits(case.logits, case.targets), torch.nan
        )
        per_token = {
            "old_log_probs": case.old_log_probs if old else None,
            "mask": case.mask,
            "ref_log_probs": case.ref_log_probs,
            "rollout_weights": case.rollout_weights if weights == "token" else None,
        }
        per_sequence = {}
        if weights == "sequence":
            per_sequence["rollout_weights"] = torch.rand(batch, generator=generator) + 0.5
            del per_token["rollout_weights"]
        (per_sequence if len(case.advantages) == batch else per_token)["advantages"] = (
            case.advantages
        )

        def loss_of(
            log_probs, rows, cu_seqlens, group, *, o=objective, p=per_token, q=per_sequence
        ):
            own = {k: None if x is None else x[rows] for k, x in p.items()}
            for either in {"advantages", "rollout_weights"} & own.keys():
                # as many tokens as sequences, by chance, must not be read as one value per sequence
                own[either] = own[either] if own[either] is None else own[either][None]
            return policy_loss_from_log_probs(
                log_probs, cu_seqlens=cu_seqlens, objective=o, context_group=group, **own, **q
            )

        whole = leaf(log_probs)
        expected = loss_of(whole, slice(None), case.cu_seqlens, None)
        (expected.loss * 1.3).backward()
        for order, parts in splits(rows, size).items():
            # tokens of a sequence stay together on a rank, in order
            own = parts[rank].sort().values
            mine = leaf(log_probs[own])
            loss, stats = loss_of(mine, own, lengths_of(own, case.cu_seqlens), group)
            (loss * 1.3).backward()
            torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-7, msg=order)
            assert_stats(stats, expected.stats)
            assert_same_everywhere(loss, *stats.values())
            torch.testing.assert_close(mine.grad, whole.grad[own], rtol=2e-6, atol=0, msg=order)


def test_top_entropy_weights_over_ranks(ranks):
    ranks(2)(on_rank_top_entropy)


def on_rank_top_entropy() -> None:
    """Ranks with different numbers of tokens, even none, have a quantile in common."""
    entropy = torch.rand(20, generator=torch.Generator().manual_seed(0))
    expected = top_entropy_weights(entropy, 0.3)
    for border in (7, 20):
        mine = [slice(None, border), slice(border, None)][dist.get_rank()]
        found = top_entropy_weights(entropy[mine], 0.3, group=dist.group.WORLD)
        assert torch.equal(found, expected[mine])


@sizes
def test_log_probs_do_not_depend_on_the_split(ranks, size):
    ranks(size)(on_rank_bitwise)


def on_rank_bitwise() -> None:
    """Log-probs from logits and hidden states do not depend on the split, and losses agree."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    products = "triton" if INTERPRETED else "auto"
    for objective in OBJECTIVES:
        head = synthetic_head(5, 7, H, V, device=CPU)
        case = make_case(head, objective, packed=True)
        hidden, targets = case.head.hidden, case.targets
        logits = (hidden @ head.weight.mT).detach()
        given = [targets, case.old_log_probs, case.advantages]
        options = {"cu_seqlens": case.cu_seqlens, "mask": case.mask, "objective": objective}
        of_logits = log_probs_from_logits(logits, targets)
        of_hidden = log_probs_from_hidden(hidden, head.weight, targets, products=products)
        w, z = leaf(head.weight), leaf(logits)
        hidden_loss = policy_loss_from_hidden(
            hidden, w, *given, products=products, return_entropy=True, **options
        )
        logits_loss = policy_loss_from_logits(z, *given, return_entropy=True, **options)
        (hidden_loss.loss + logits_loss.loss).backward()
        for parts in splits(len(targets), size).values():
            own = parts[rank].sort().values
            assert torch.equal(log_probs_from_logits(logits[own], targets[own]), of_logits[own])
            ours = log_probs_from_hidden(hidden[own], head.weight, targets[own], products=products)
            if INTERPRETED:
                assert torch.equal(ours, of_hidden[own])
            else:  # a BLAS may add up in any order
                assert worst(ours - of_hidden[own]) <= BOUNDS["log_prob from hidden"]

            per_token = case.advantages.shape == targets.shape
            mine = [targets[own], case.old_log_probs[own]]
            mine.append(case.advantages[own][None] if per_token else case.advantages)
            spread = {
                "cu_seqlens": lengths_of(own, case.cu_seqlens), "mask": case.mask[own],
                "objective": objective, "context_group": group, "return_entropy": True,
            }  # fmt: skip
            my_w, my_z = leaf(head.weight), leaf(logits[own])
            a = policy_loss_from_hidden(hidden[own], my_w, *mine, products=products, **spread)
            b = policy_loss_from_logits(my_z, *mine, **spread)
            (a.loss + b.loss).backward()
            assert_stats(a.stats, hidden_loss.stats)
            assert_stats(b.stats, logits_loss.stats)
            assert relative(my_z.grad, z.grad[own]) <= 2e-6 or not z.grad[own].any()
            dist.all_reduce(my_w.grad)  # gradients of parameters are added up over the ranks
            assert relative(my_w.grad, w.grad) <= 2e-6


def test_padded_sequences_over_ranks(ranks):
    ranks(2)(on_rank_padded)


def on_rank_padded() -> None:
    """Padded sequences (B, T) may be split along T, as some trainers do."""
    group = dist.group.WORLD
    case = make_case(synthetic_logits(9, 6, 11, device=CPU), GSPO(), packed=False)
    log_probs = log_probs_from_logits(case.logits, case.targets)
    old, mask = case.old_log_probs, case.mask
    for objective in (GSPO(), long_sequences_weigh_more):
        whole, mine = leaf(log_probs), leaf(part_of(log_probs, 1))
        expected = policy_loss_from_log_probs(
            whole, old, case.advantages, mask=mask, objective=objective
        )
        loss, stats = policy_loss_from_log_probs(
            mine, part_of(old, 1), case.advantages, mask=part_of(mask, 1), objective=objective,
            context_group=group,
        )  # fmt: skip
        (expected.loss * 0.7).backward()
        (loss * 0.7).backward()
        torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-7)
        assert_same_everywhere(loss, *stats.values())
        assert_stats(stats, expected.stats)
        torch.testing.assert_close(joined(mine.grad, 1), whole.grad, rtol=2e-6, atol=0)


def long_sequences_weigh_more(log_probs, old, advantages, sequence_ids, *, mask, lengths):
    log_ratio = log_probs - old
    clipped = mask & (log_ratio.abs() > 3e-4)
    terms = -log_ratio.exp() * advantages * lengths[sequence_ids]
    return torch.where(clipped, terms.detach(), terms), clipped


def test_what_context_group_refuses(ranks):
    ranks(2)(on_rank_refusals)


def on_rank_refusals() -> None:
    group = dist.group.WORLD
    hidden, weight, _ = synthetic_head(2, 3, H, V, device=CPU)[:3]
    targets, old, advantages = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match=r"plan='chunk' needs whole sequences"):
        policy_loss_from_hidden(
            hidden, weight, targets, old, advantages, plan="chunk", context_group=group
        )
    packed = {"cu_seqlens": torch.tensor([0, 3, 6]), "context_group": group}
    with pytest.raises(ValueError, match=r"advantages must have shape \(2,\).* or \(1, 6\)"):
        policy_loss_from_log_probs(
            old.view(-1), old.view(-1), torch.ones(6), objective=GRPO(), **packed
        )
    with pytest.raises(
        TypeError, match=r"context_group must be a torch\.distributed\.ProcessGroup"
    ):
        policy_loss_from_log_probs(old, old, advantages, context_group=2)


# Both


def test_vocabulary_and_sequences_over_ranks(ranks):
    ranks(4)(on_rank_both)


def on_rank_both() -> None:
    """Losses and gradients on 2 x 2 ranks are those of one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "vocab"))
    context, vocab = mesh.get_group("context"), mesh.get_group("vocab")
    for seed, objective in enumerate(OBJECTIVES):
        head = synthetic_head(6, 5, H, V, device=CPU, seed=seed)
        case = make_case(head, objective, packed=True, seed=seed)
        x, w = leaf(case.head.hidden), leaf(head.weight)
        expected = policy_loss_from_hidden(
            x, w, case.targets, case.old_log_probs, case.advantages, return_entropy=True,
            **case.options(),
        )  # fmt: skip
        expected.loss.backward()
        own = splits(len(case.targets), 2)["zigzag"][dist.get_rank(context)].sort().values
        per_token = case.advantages.shape == case.targets.shape
        for plan in ("keep", "recompute"):
            my_x, my_w = leaf(case.head.hidden[own]), leaf(part_of(head.weight, 0, vocab))
            loss, stats = policy_loss_from_hidden(
                my_x, my_w, case.targets[own], case.old_log_probs[own],
                case.advantages[own][None] if per_token else case.advantages,
                mask=case.mask[own], cu_seqlens=lengths_of(own, case.cu_seqlens),
                rollout_weights=case.rollout_weights[own][None], objective=objective, plan=plan,
                context_group=context, vocab_group=vocab, return_entropy=True,
            )  # fmt: skip
            loss.backward()
            assert_stats(stats, expected.stats)
            assert_same_everywhere(loss, *stats.values())
            assert relative(my_x.grad, x.grad[own]) <= 5e-6
            dist.all_reduce(my_w.grad, group=context)
            assert relative(joined(my_w.grad, 0, vocab), w.grad) <= 5e-6


# The batch over ranks


@sizes
@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean", "token-sum"])
def test_batch_over_ranks(ranks, size, aggregation):
    ranks(size)(on_rank_batch, aggregation)


def on_rank_batch(aggregation: str) -> None:
    """Gradients of uneven micro-batches, averaged as DDP does, are those of the whole batch."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    objective = GRPO(aggregation=aggregation)
    batch = 5 * size
    head = synthetic_head(batch, 6, H, V, device=CPU)
    case = make_case(head, objective, packed=False)
    weight = leaf(head.weight)

    def loss_of(b: slice, denominator: Tensor | None) -> Tensor:
        return policy_loss_from_hidden(
            case.head.hidden[b], weight, case.targets[b], case.old_log_probs[b],
            case.advantages[b], mask=case.mask[b], objective=objective, denominator=denominator,
        ).loss  # fmt: skip

    whole = loss_of(slice(0, batch), None)
    (expected,) = torch.autograd.grad(whole, weight)
    micro = [slice(5 * rank, 5 * rank + 2), slice(5 * rank + 2, 5 * rank + 5)]
    denominator = global_denominator(
        [{"mask": case.mask[b]} for b in micro], objective=objective, group=group
    )
    losses = torch.stack([loss_of(b, denominator) for b in micro])
    losses.sum().backward()
    gradient, loss = weight.grad / size, losses.detach().sum() / size
    dist.all_reduce(gradient)
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-6, atol=1e-7)
    assert relative(gradient, expected) <= 1e-6


def test_global_denominator_counts(ranks):
    ranks(4)(on_rank_counts)


def on_rank_counts() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    groups = {"group": mesh.get_group("data"), "context_group": mesh.get_group("context")}
    context = dist.get_rank(groups["context_group"])
    # three sequences on each: the second is empty, the third has tokens on one rank only
    cu_seqlens = torch.tensor([0, 2, 2, 2 + context])
    mask = torch.ones(2 + context, dtype=torch.bool)
    mask[0] = False
    batches = [{"cu_seqlens": cu_seqlens}, {"cu_seqlens": cu_seqlens, "mask": mask}]
    counts = {"seq-mean-token-mean": 8, "token-mean": 2 * (2 + 3 + 1 + 2), "token-sum": 1}
    for aggregation, count in counts.items():
        options = groups | {"objective": GRPO(aggregation=aggregation)}
        assert global_denominator(batches, gradients="sum", **options) == count
        assert global_denominator(batches, **options) == count / 4
    alone = {"objective": GRPO(aggregation="token-mean")}
    assert global_denominator([{"mask": torch.tensor([[1, 1, 0], [0, 0, 0]])}], **alone) == 2
    assert global_denominator([{"mask": torch.tensor([[1, 1, 0], [0, 0, 0]])}]) == 1
    assert global_denominator([{"mask": torch.zeros(2, 3)}], **alone) == 1

    def function(log_probs, old_log_probs, advantages, sequence_ids):
        return -log_probs * advantages

    padded = [{"mask": torch.tensor([[1, 1, 0], [0, 0, 0]])}]
    assert global_denominator(padded, objective=function) == 1
    function.aggregation = "token-mean"
    assert global_denominator(padded, objective=function) == 2
    with pytest.raises(TypeError, match="objective must be an Objective"):
        global_denominator(padded, objective="gspo")
    for batches, message in (
        ([], "batches must contain at least one micro-batch"),
        ([{"mask": None}], r"batches\[0\] must have mask or cu_seqlens"),
        ([{"mask": mask, "masks": mask}], r"batches\[0\] must have mask or cu_seqlens"),
    ):
        with pytest.raises(ValueError, match=message):
            global_denominator(batches)
    with pytest.raises(ValueError, match="gradients must be 'mean' or 'sum', got 'avg'"):
        global_denominator([{"cu_seqlens": cu_seqlens}], gradients="avg")
    with pytest.raises(TypeError, match="group must be a torch"):
        global_denominator([{"cu_seqlens": cu_seqlens}], group=3)


# Bytes


def test_bytes(ranks):
    """Each rank sends the bytes expected; gathering log-probs, as others do, takes many more."""
    for size in (2, 4):
        sent, gathered = ranks(size)(on_rank_bytes)[0]
        print(
            f"\n{size} ranks, 32 sequences, 8192 tokens: {sent} bytes sent by each rank per loss,"
        )
        print(f"{gathered} bytes to gather fp32 log-probs ({gathered / sent:.0f} times as many)")


def on_rank_bytes() -> tuple[int, int]:
    group, size = dist.group.WORLD, dist.get_world_size()
    B, T = 32, 256
    messages: list[int] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def counting_gather(out: list[Tensor], x: Tensor, group=None) -> None:
        messages.append(x.nbytes)
        gather(out, x, group=group)

    def counting_reduce(x: Tensor, group=None) -> None:
        messages.append(x.nbytes)
        reduce(x, group=group)

    def bytes_of(function, *arguments, **options) -> list[int]:
        messages.clear()
        with (
            mock.patch.object(dist, "all_gather", counting_gather),
            mock.patch.object(dist, "all_reduce", counting_reduce),
        ):
            function(*arguments, **options).loss.backward()
        return messages.copy()

    agreement = 8 * 20
    log_probs = -torch.rand(B, T // size)
    of_context = bytes_of(
        policy_loss_from_log_probs, leaf(log_probs), log_probs, torch.ones(B), context_group=group
    )
    assert of_context == [agreement, 8 * 3 * B, 8 * (B + 7 + 4 + 2)]
    # over a vocabulary: 3 numbers per row of logits; from hidden states 4, and dhidden
    batch, hidden, weight = a_batch()
    batch |= {"mask": None, "old_log_probs": None}  # so that all rows have a gradient
    weight, N = any_part_of(weight, 0, 1), batch["targets"].numel()
    logits = leaf(hidden @ weight.mT)
    assert bytes_of(policy_loss_from_logits, logits, **batch, vocab_group=group) == [
        agreement, 4 * 3 * N
    ]  # fmt: skip
    for plan, extra in (("keep", []), ("recompute", []), ("chunk", [8])):
        assert bytes_of(
            policy_loss_from_hidden, leaf(hidden), weight, **batch, vocab_group=group, plan=plan
        ) == [agreement, *extra, 4 * N, 4 * 3 * N, 4 * N * H]
    return (size - 1) * sum(of_context), (size - 1) * log_probs.nbytes


def test_compiled(ranks):
    ranks(2)(on_rank_compiled)


def on_rank_compiled() -> None:
    """Groups are constants of a graph; collectives are inside operators."""
    group = dist.group.WORLD
    head = synthetic_head(4, 3, H, V, device=CPU)
    case = make_case(head, GSPO(), packed=False)
    given = case.old_log_probs, case.advantages
    logits = case.head.hidden.detach() @ head.weight.mT

    def both(y: Tensor, x: Tensor, w: Tensor, z: Tensor) -> Tensor:
        options = {"mask": case.mask, "vocab_group": group}
        from_hidden = policy_loss_from_hidden(x, w, y, *given, **options).loss
        return from_hidden + policy_loss_from_logits(z, y, *given, **options).loss

    def context(y: Tensor, z: Tensor) -> Tensor:
        return policy_loss_from_logits(z, y, *given, mask=case.mask, context_group=group).loss

    outside = case.targets + V
    leaves = [case.head.hidden, any_part_of(head.weight, 0, 1), any_part_of(logits, -1, 1)]
    for function, operands in ((both, leaves), (context, [logits])):
        eager, compiled = [leaf(x) for x in operands], [leaf(x) for x in operands]
        expected = function(case.targets, *eager)
        of_graph = torch.compile(function, fullgraph=True, backend="aot_eager")
        loss = of_graph(case.targets, *compiled)
        if not INTERPRETED:
            with pytest.raises((IndexError, ValueError), match=r"in \[0, 104\)|refused its input"):
                of_graph(outside if dist.get_rank() == 1 else case.targets, *compiled)
        assert torch.equal(loss, expected)
        for x in (loss, expected):
            x.backward()
        for x, y in zip(compiled, eager, strict=True):
            assert torch.equal(x.grad, y.grad)
