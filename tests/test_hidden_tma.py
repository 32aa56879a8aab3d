"""Products by kernels that copy boxes, in Triton's interpreter."""

import math
import os

import pytest
import torch
from hidden_inputs import assert_accurate, count_dots, make, sample, with_budget
from torch import Tensor

import gspo_ops
from gspo_ops import GSPO, head, log_probs_from_hidden, tiles_tma
from gspo_ops.testing import BOUNDS, relative, worst

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter only"
    ),
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Provide a list of the names of the kernels that the test has launched."""
    from gspo_ops.kernels import hidden, hidden_tma

    monkeypatch.setattr(head, "has_tma", lambda device, is_capped: True)
    found = []

    def counting(kernel):
        class Counting:
            def __getitem__(self, grid):
                found.append(kernel.__name__)
                return kernel[grid]

        return Counting()

    for module in (hidden, hidden_tma):
        for name in list(vars(module)):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, counting(getattr(module, name)))
    return found


def make_bf16(N, H, V, **options):
    torch.manual_seed(0)
    return make(N, H, V, CPU, **options).map(Tensor.bfloat16)


@pytest.mark.parametrize("plan", ["keep", "part", "recompute"])
@pytest.mark.parametrize("shape", [(1, 8, 5), (130, 24, 300), (5, 72, 2049)], ids=str)
def test_accuracy(shape, plan, launched):
    inputs = make_bf16(*shape, bias=shape[0] == 5)
    entropies = (False, True) if plan == "recompute" else (False,)
    options = with_budget(plan, inputs) | {"products": "triton", "entropies": entropies}
    assert_accurate(inputs, sample(inputs), {"temperature": 0.8}, **options)
    assert "tma_fwd_kernel" in launched
    assert "tma_dhidden_kernel" in launched or plan != "keep"
    assert "hidden_fwd_kernel" not in launched


@pytest.mark.parametrize("plan", ["keep", "recompute"])
def test_softcap(plan, launched):
    """Results are right with a soft cap, where tiles have half as many columns."""
    inputs = make_bf16(130, 24, 300, bias=True).map(lambda x: x * 3)
    entropies = (False, True) if plan == "recompute" else (False,)
    softmax = {"softcap": 5.0, "temperature": 0.8}
    options = {"plan": plan, "products": "triton", "entropies": entropies}
    assert_accurate(inputs, sample(inputs), softmax, **options)
    assert "tma_fwd_kernel" in launched
    assert "hidden_fwd_kernel" not in launched


@pytest.mark.parametrize(
    "change",
    [lambda x: x[..., :-1].contiguous(), Tensor.half, Tensor.float],
    ids=["H", "float16", "float32"],  # an H that is not a multiple of 8
)
def test_what_does_not_fit_takes_the_other_kernels(change, launched):
    inputs = make_bf16(9, 24, 50).map(change)
    assert_accurate(inputs, sample(inputs), products="triton")
    assert "hidden_fwd_kernel" in launched
    assert "tma_fwd_kernel" not in launched


def test_operands_that_start_anywhere_are_copied(launched):
    whole = make_bf16(20, 32, 60)
    inputs = whole.map(lambda x: x[:, 4:28])  # 8 bytes off; row strides are multiples of 16 bytes
    targets = sample(inputs)
    ours = log_probs_from_hidden(inputs.hidden, inputs.weight, targets, products="triton")
    clean = inputs.map(Tensor.contiguous)
    expected = log_probs_from_hidden(clean.hidden, clean.weight, targets, products="triton")
    assert torch.equal(ours, expected)
    assert launched.count("tma_fwd_kernel") == 2


def test_a_row_does_not_depend_on_the_batch():
    inputs = make_bf16(140, 40, 300)
    targets = sample(inputs)

    def log_probs(rows: Tensor) -> Tensor:
        hidden = inputs.hidden[rows]
        return log_probs_from_hidden(hidden, inputs.weight, targets[rows], products="triton")

    together = log_probs(torch.arange(140))
    order = torch.randperm(140)
    assert torch.equal(log_probs(order), together[order])
    assert torch.equal(log_probs(torch.tensor([139])), together[139:])
    kept = log_probs_from_hidden(
        inputs.hidden.clone().requires_grad_(), inputs.weight, targets, products="triton",
        return_entropy=True,
    )  # fmt: skip
    assert torch.equal(kept[0].detach(), together)


@pytest.mark.parametrize("plan", ["keep", "recompute"])
def test_rows_without_gradient_are_not_used(plan):
    """Dead rows may hold NaN, masked or not, in blocks of their own and beside live rows."""
    inputs = make_bf16(300, 24, 140)
    targets, upstream = sample(inputs), torch.randn(300)
    dead = torch.zeros(300, dtype=torch.bool)
    dead[100:260] = True
    dead[7] = dead[299] = True
    upstream[dead] = 0
    targets[120:130] = -100

    def grads(hidden: Tensor) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, inputs.weight)]
        log_probs = log_probs_from_hidden(*leaves, targets, products="triton", plan=plan)
        log_probs.backward(upstream)
        return [leaf.grad for leaf in leaves]

    expected = grads(inputs.hidden)
    poisoned = inputs.hidden.clone()
    poisoned[dead] = math.nan
    for ours, of_clean in zip(grads(poisoned), expected, strict=True):
        assert torch.equal(ours, of_clean)
    assert (expected[0][dead] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_with_a_gradient_shows(bad):
    inputs = make_bf16(140, 16, 40)
    targets = sample(inputs)
    hidden = inputs.hidden.clone()
    hidden[3, 0] = bad
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, inputs.weight)]
    log_probs = log_probs_from_hidden(*leaves, targets, products="triton")
    log_probs.backward(torch.ones(140))
    clean = log_probs_from_hidden(inputs.hidden, inputs.weight, targets, products="triton")
    others = torch.arange(140) != 3
    assert torch.equal(log_probs.detach()[others], clean[others])
    assert not log_probs[3].isfinite()
    assert leaves[0].grad[3].isnan().any()
    assert leaves[0].grad[others].isfinite().all()
    assert leaves[1].grad.isnan().any()


@pytest.mark.parametrize(
    ("plan", "frozen"), [("keep", False), ("keep", True), ("recompute", False), ("chunk", False)]
)
def test_dead_blocks_are_not_multiplied(plan, frozen, monkeypatch):
    """Live rows are rounded up to blocks: of 128 as rows of a product, of 64 in a sum."""
    spent = count_dots(monkeypatch)
    N, H, V, T = 256, 64, 256, 64
    inputs = make_bf16(N, H, V)
    targets = sample(inputs)
    for live_sequences in ((0, 1, 2, 3), (2,), ()):
        hidden = inputs.hidden.detach().requires_grad_()
        weight = inputs.weight.detach().requires_grad_(not frozen)
        advantages = torch.zeros(N // T)
        advantages[list(live_sequences)] = 1.0
        spent.clear()
        gspo_ops.policy_loss_from_hidden(
            hidden.view(-1, T, H), weight, targets.view(-1, T), torch.zeros(N // T, T), advantages,
            plan=plan, products="triton", memory_budget=1 << 30,
        ).loss.backward()  # fmt: skip
        of_rows = 128 * len({i * T // 128 for i in live_sequences})
        of_sums = 0 if frozen else T * len(live_sequences)
        again = of_rows if plan == "recompute" else 0
        # the columns of a gradient are padded to the 256 of a tile
        assert sum(spent) == 2 * V * (H * (N + again) + 256 * (of_rows + of_sums))


@pytest.mark.parametrize("plan", ["part", "chunk"])
def test_losses(plan, launched):
    """Losses and gradients, including those in main_grad, match those of torch.mm."""
    inputs = make_bf16(6 * 40, 32, 2100)
    targets = sample(inputs).view(6, 40)
    mask = torch.arange(40) < torch.tensor([40, 3, 17, 40, 1, 30])[:, None]
    old = log_probs_from_hidden(inputs.hidden.view(6, 40, 32), inputs.weight, targets)
    old = old + 3e-4 * torch.randn(6, 40)
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.7, 2.0, -0.3])
    found = []
    for products in ("mm", "triton"):
        hidden = inputs.hidden.detach().clone().requires_grad_()
        weight = inputs.weight.detach().clone().requires_grad_()
        main_grad = torch.ones(2100, 32)
        loss, stats = gspo_ops.policy_loss_from_hidden(
            hidden.view(6, 40, 32), weight, targets, old, advantages, mask=mask, objective=GSPO(),
            products=products, main_grad=main_grad, **with_budget(plan, inputs),
        )  # fmt: skip
        loss.backward()
        found.append((loss.detach(), stats["ratio_mean"], hidden.grad, main_grad - 1.0))
    for ours, other in zip(*found, strict=True):
        if ours.ndim:
            assert relative(ours, other) < 5e-3  # two roundings of exponentials
        else:
            assert worst(ours - other) <= BOUNDS["loss"]
    assert "tma_dweight_kernel" in launched


def test_live_blocks():
    live = torch.zeros(1000, dtype=torch.bool)
    live[[3, 64, 130, 999]] = True
    inputs = make_bf16(1000, 8, 5)
    tiles = tiles_tma.TmaTiles.__new__(tiles_tma.TmaTiles)
    tiles.of, tiles.live = inputs_of(inputs), live.view(torch.uint8)
    listed, number = tiles.live_inner
    assert listed[: number + 1].tolist() == [0, 1, 2, 15, 0]
    listed, number = tiles.live_rows
    assert listed[:number].tolist() == [0, 1, 7]


def inputs_of(inputs):
    from gspo_ops.head import Head, HeadOptions
    from gspo_ops.rows import AllRows
    from gspo_ops.softmax import Softmax
    from gspo_ops.tiles import Operands

    operands = Head(inputs.hidden, inputs.weight, None, None, None)
    options = HeadOptions(Softmax(1.0, None, False, None), "tma", False, 1.0, 0)
    return Operands.of(
        operands, torch.zeros(len(inputs.hidden), dtype=torch.long), AllRows(), options
    )
