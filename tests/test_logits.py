import math
import os

import pytest
import torch

from gspo_ops import log_probs_from_logits, logits_cpu, reference
from gspo_ops.testing import BOUNDS, grad_errors, synthetic_logits, worst

pytestmark = pytest.mark.kernels
cpu_path = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="tests how the CPU path processes rows"
)

# 1, 2: at most one other logit; 127 to 129, 1000: tails, 8-aligned; 4097: a partial block
SMALL_V = [1, 2, 127, 128, 129, 1000, 4097]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sample(logits):
    return torch.distributions.Categorical(logits=logits.double()).sample()


def assert_accurate(logits, targets, **options):
    """Check log-probs, entropy and, for random upstream gradients, dlogits."""
    upstream = torch.randn(2, *targets.shape, device=logits.device)
    upstream[:, ..., ::3] = 0
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    log_probs, entropy = log_probs_from_logits(ours, targets, return_entropy=True, **options)
    log_probs64 = reference.log_probs_from_logits(exact, targets, **options)
    entropy64 = reference.entropy_from_logits(exact, targets, **options)
    assert worst(log_probs - log_probs64) <= BOUNDS["log_prob"]
    assert worst(entropy - entropy64) <= BOUNDS["entropy"]
    (log_probs * upstream[0] + entropy * upstream[1]).sum().backward()
    (log_probs64 * upstream[0] + entropy64 * upstream[1]).sum().backward()
    for quantity, error in grad_errors(ours.grad, exact.grad, targets).items():
        # with an entropy, p * log(p) and not g sets the size of a row's gradient
        if quantity != "grad row sum / g":
            assert error <= BOUNDS[quantity], quantity

    ours.grad = exact.grad = None
    (log_probs_from_logits(ours, targets, **options) * upstream[0]).sum().backward()
    log_probs64 = reference.log_probs_from_logits(exact, targets, **options)
    (log_probs64 * upstream[0]).sum().backward()
    for quantity, error in grad_errors(ours.grad, exact.grad, targets).items():
        assert error <= BOUNDS[quantity], quantity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", SMALL_V)
@pytest.mark.parametrize("N", [0, 1, 3, 17])
def test_accuracy(device, N, V, dtype):
    torch.manual_seed(N * V)
    logits = synthetic_logits(1, N, V, device=device, seed=V)[0].to(dtype)
    assert_accurate(logits, sample(logits) if N else torch.zeros(0, dtype=torch.long))


def test_a_row_alone_is_bitwise_the_row_in_a_batch(device):
    """The bits are equal even if a reduction over one large row may be split among threads."""
    logits = synthetic_logits(1, 5, 151936, device=device)[0]
    targets = sample(logits)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = log_probs_from_logits(logits, targets)
        alone = [log_probs_from_logits(logits[i : i + 1], targets[i : i + 1]) for i in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_at_a_real_vocabulary(device, dtype):
    logits = synthetic_logits(1, 3, 151936, device=device)[0].to(dtype)
    assert_accurate(logits, sample(logits))


@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"temperature": 1.7}])
def test_temperature(device, options):
    logits = synthetic_logits(2, 5, 1000, device=device).bfloat16()
    assert_accurate(logits, sample(logits / options["temperature"]), **options)


def test_softcap(device):
    # this keeps |log_prob| small: otherwise, the rounding of softcap * tanh itself matters
    logits = synthetic_logits(2, 5, 300, device=device).div(4)
    assert_accurate(logits, sample(logits), softcap=30.0, temperature=0.9)
    assert_accurate(logits.bfloat16(), sample(logits), softcap=5.0)


def test_relative_accuracy_of_a_certain_target(device):
    """log_prob and 1 - p keep their digits where p rounds to 1."""
    logits = torch.zeros(4, 129, device=device)
    logits[:, 7] = torch.tensor([10.0, 20.0, 30.0, 60.0], device=device)
    targets = torch.full((4,), 7, device=device)
    ours = logits.clone().requires_grad_()
    log_probs = log_probs_from_logits(ours, targets)
    log_probs.sum().backward()
    others = 128 * (-logits[:, 7].double()).exp()
    rest = others / (1 + others)
    torch.testing.assert_close(log_probs.double(), torch.log1p(-rest), rtol=4e-6, atol=0)
    torch.testing.assert_close(ours.grad[:, 7].double(), rest, rtol=4e-6, atol=0)


@pytest.mark.parametrize("V", [9, 9000])  # 9000: the whole first block is -inf
def test_minus_infinity(device, V):
    logits = torch.randn(4, V, device=device)
    logits[0, : V - 3] = -math.inf
    logits[1, V - 1] = -math.inf
    logits[2, : V - 1] = -math.inf
    targets = torch.full((4,), V - 1, device=device)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    log_probs, entropy = log_probs_from_logits(ours, targets, return_entropy=True)
    log_probs64 = reference.log_probs_from_logits(exact, targets)
    torch.testing.assert_close(log_probs.double(), log_probs64, rtol=0, atol=2e-6)
    entropy64 = reference.entropy_from_logits(exact, targets)
    torch.testing.assert_close(entropy.double(), entropy64, rtol=0, atol=1e-5)
    assert log_probs[1] == -math.inf
    assert log_probs[2] == 0
    log_probs.backward(torch.ones_like(log_probs))
    log_probs64.backward(torch.ones_like(log_probs64))
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_show_in_their_row_only(device, bad):
    logits = torch.randn(3, 1000, device=device)
    clean = logits.clone()
    logits[1, 500] = bad
    targets = torch.tensor([0, 999, 3], device=device)
    logits.requires_grad_()
    log_probs = log_probs_from_logits(logits, targets)
    log_probs.sum().backward()
    assert log_probs[1].isnan()
    assert logits.grad[1].isnan().any()
    assert torch.equal(log_probs[::2], log_probs_from_logits(clean, targets)[::2])
    assert logits.grad[::2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_are_zero_whatever_they_hold(device, dtype):
    logits = torch.randn(4, 129, device=device).to(dtype)
    logits[1:3] = math.nan
    targets = torch.tensor([0, -100, -100, 128], device=device, dtype=torch.int32)
    logits.requires_grad_()
    log_probs, entropy = log_probs_from_logits(logits, targets, return_entropy=True)
    (log_probs.sum() + entropy.sum()).backward()
    for x in (log_probs, entropy, logits.grad):
        assert (x[1:3] == 0).all()
        assert (x[::3] != 0).any()


def test_rows_without_gradient_are_not_read(device):
    logits = torch.randn(3, 1000, device=device)
    targets = torch.tensor([1, 2, 3], device=device)
    logits[1] = math.nan  # would poison the gradient if the backward read it
    logits.requires_grad_()
    log_probs = log_probs_from_logits(logits, targets)
    log_probs.backward(torch.tensor([0.5, 0.0, -2.0], device=device))
    assert (logits.grad[1] == 0).all()
    assert logits.grad[::2].isfinite().all()


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_edge_targets(device, ids):
    logits = synthetic_logits(1, 2, 1000, device=device)[0]
    assert_accurate(logits, torch.tensor([0, 999], device=device, dtype=ids))


def layouts(device):
    wide = synthetic_logits(3, 6, 520, device=device)
    return {
        "shifted": wide[:, :-1],
        "every other row": wide[:, ::2],
        "sliced vocabulary": wide[..., :512],
        "odd offset": wide[..., 1:500],
        "transposed batch": wide.transpose(0, 1),
        "expanded": wide[:1].expand(4, -1, -1),
        "packed slice": wide[0, 1:4, :129],
    }


@pytest.mark.parametrize("name", layouts(torch.device("cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_logits_are_read_in_place(device, name, dtype):
    logits = layouts(device)[name]
    # keep the strides while converting
    storage = logits.to(dtype) if name == "expanded" else None
    view = (
        storage
        if storage is not None
        else torch.empty_strided(logits.shape, logits.stride(), dtype=dtype, device=device).copy_(
            logits
        )
    )
    targets = sample(view)
    ours, plain = view.detach().requires_grad_(), view.detach().contiguous().requires_grad_()
    log_probs = log_probs_from_logits(ours, targets)
    expected = log_probs_from_logits(plain, targets)
    assert torch.equal(log_probs, expected)
    upstream = torch.randn(targets.shape, device=device)
    log_probs.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(ours.grad, plain.grad)


@cpu_path
@pytest.mark.parametrize("rows", [2, 4, 12, 100])
@pytest.mark.parametrize("name", layouts(torch.device("cpu")))
def test_chunks_of_strided_logits(monkeypatch, name, rows):
    """Chunks on a CPU may be parts of sequences of 3 to 6 rows, or span several of them."""
    logits = layouts(torch.device("cpu"))[name]
    monkeypatch.setattr(logits_cpu, "_CHUNK_ELEMENTS", rows * logits.shape[-1])
    targets = sample(logits).masked_fill(torch.rand(logits.shape[:-1]) < 0.3, -100)
    results = []
    for x in (logits, logits.contiguous()):
        leaf = x.detach().requires_grad_()
        y = log_probs_from_logits(leaf, targets)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@cpu_path
def test_gradients_do_not_depend_on_the_place_in_a_chunk(monkeypatch):
    """The bits are equal, though torch may treat a partly filled vector register differently."""
    logits = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.zeros(1000, dtype=torch.long)
    together = torch.autograd.grad(log_probs_from_logits(logits, targets).sum(), logits)[0]
    monkeypatch.setattr(logits_cpu, "_CHUNK_ELEMENTS", 3 * 5)
    apart = torch.autograd.grad(log_probs_from_logits(logits, targets).sum(), logits)[0]
    assert torch.equal(apart, together)


@cpu_path
def test_short_sequences_share_chunks():
    """`logits[:, :-1]` needs few more chunks than contiguous logits, and no copy of the whole."""
    short = torch.randn(512, 3, 128)[:, :-1]
    live = torch.rand(1024) < 0.9
    chunks = list(logits_cpu._row_chunks(short, live))
    assert len(chunks) == 1
    assert torch.equal(torch.cat([index for index, _ in chunks]), live.nonzero().squeeze(1))
    assert torch.equal(chunks[0][1], short.flatten(0, 1)[live])
    # sequences that are no shorter than a chunk are not copied
    long = torch.empty(2, 65, logits_cpu._CHUNK_ELEMENTS // 64)[:, :-1]
    chunks = [rows for _, rows in logits_cpu._row_chunks(long, torch.ones(128, dtype=torch.bool))]
    assert [rows.data_ptr() for rows in chunks] == [x.data_ptr() for x in long]
