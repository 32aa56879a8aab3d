"""Launches of our kernels on meta tensors, in the variants that are compiled for each target."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gspo_ops import GRPO, GSPO, GSPOToken, Objective, head, passes
from gspo_ops.head import Head, HeadGrads, HeadOptions, Wanted
from gspo_ops.layout import resolve_layout
from gspo_ops.logits import triton_bwd, triton_fwd
from gspo_ops.logits_cpu import LogitPart, LogitStats, SavedLogits
from gspo_ops.passes import make_tiles as make_implementation
from gspo_ops.plan import kept_width
from gspo_ops.policy import ObjectiveOptions, make_policy
from gspo_ops.policy_loss import triton_policy_loss
from gspo_ops.rows import AllRows, FlaggedRows, OrderedRows
from gspo_ops.softmax import Softmax, TargetRows, Upstream
from gspo_ops.testing import FURTHER_OBJECTIVES, said
from gspo_ops.tiles import Kept, RowGrads, RowSums, Sums, Tile, Tiles, Weighting
from gspo_ops.tiles_gpu import BLOCKS

# These make more than 2 GiB of logits: below that, AMD's compiler assumes 32-bit offsets.
B, T, V = 8, 4096, 49152
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def per_row(dtype: torch.dtype = FP32) -> Tensor:
    return empty(B * T, dtype=dtype)


def make_logits(
    dtype: torch.dtype, V: int, row_stride: int | None = None, first: int = 0
) -> Tensor:
    return empty(B, T, row_stride or V, dtype=dtype)[:, first:, :V]


def softmax(softcap: float | None = None, entropy: bool = False, part: bool = False) -> Softmax:
    return Softmax(1.0, softcap, entropy, "ranks" if part else None)


def launch_fwd(
    dtype: torch.dtype,
    V: int = V,
    row_stride: int | None = None,
    first: int = 0,
    has_mask: bool = True,
    part: bool = False,
    **options: Any,
) -> None:
    logits = make_logits(dtype, V, row_stride, first)
    targets = per_row(torch.int64)
    mask = per_row(torch.uint8) if has_mask else None
    log_sum = per_row() if options.get("entropy") else None
    of_part = LogitPart(per_row(), per_row(), per_row(), log_sum)
    out = of_part if part else LogitStats(*[per_row() for _ in LogitStats._fields])
    triton_fwd(logits, targets, mask, softmax(part=part, **options), out)


def launch_bwd(
    dtype: torch.dtype,
    V: int = V,
    softcap: float | None = None,
    entropy: bool = False,
    recompute: bool = False,
    has_mask: bool = True,
    loss: bool = True,
    part: bool = False,
) -> None:
    saved = SavedLogits(
        logits=make_logits(dtype, V),
        targets=per_row(torch.int64),
        mask=per_row(torch.uint8) if has_mask else None,
        row_max=None if recompute else per_row(),
        row_sum=None if recompute else per_row(),
        entropy=per_row() if entropy else None,
        target_logit=per_row() if part else None,
    )
    upstream = Upstream(per_row(), per_row() if entropy else None)
    if loss:
        upstream = upstream._replace(grad_loss=empty(), inv_denominator=empty())
    triton_bwd(saved, upstream, softmax(softcap, entropy, part), empty(B, T, V, dtype=dtype))


def launch_loss(
    objective: Objective,
    packed: bool = False,
    has_mask: bool = False,
    old: bool = True,
    ref: bool = False,
    per_token: bool = False,
    weights: str | None = None,
) -> None:
    cu_seqlens = empty(B + 1, dtype=torch.int32) if packed else None
    shape = (B * T,) if packed else (B, T)
    mask = empty(*shape, dtype=torch.bool) if has_mask else None
    layout = resolve_layout("log_probs", torch.Size(shape), torch.device("meta"), mask, cu_seqlens)
    policy = make_policy(
        layout,
        FP32,
        ObjectiveOptions.of(objective),
        old_log_probs=empty(*shape) if old else None,
        advantages=empty(*shape) if per_token else empty(B),
        ref_log_probs=empty(*shape) if ref else None,
        rollout_weights={"token": empty(*shape), "sequence": empty(B), None: None}[weights],
        denominator=None,
        context_group=None,
    )
    log_probs = per_row() if policy.reads_log_probs() else None
    triton_policy_loss(log_probs, per_row() if objective.entropy_coef else None, policy)


FWD, BWD, LOSS = launch_fwd, launch_bwd, launch_loss
# shown for every target, each with a launch and its options
VARIANTS = {
    "fwd bf16": (FWD, {"dtype": BF16}),
    "fwd fp16": (FWD, {"dtype": FP16}),
    "fwd fp32": (FWD, {"dtype": FP32}),
    "fwd bf16 V%8": (FWD, {"dtype": BF16, "V": V + 8}),
    "fwd bf16 V odd stride%16": (FWD, {"dtype": BF16, "V": V + 1, "row_stride": V + 16}),
    "fwd bf16 V odd": (FWD, {"dtype": BF16, "V": V + 1}),
    "fwd bf16 entropy": (FWD, {"dtype": BF16, "entropy": True}),
    "fwd bf16 softcap": (FWD, {"dtype": BF16, "softcap": 30.0}),
    "fwd bf16 part": (FWD, {"dtype": BF16, "part": True}),  # of the vocabulary
    "fwd bf16 part entropy": (FWD, {"dtype": BF16, "part": True, "entropy": True}),
    "bwd bf16": (BWD, {"dtype": BF16}),
    "bwd fp32": (BWD, {"dtype": FP32}),
    "bwd bf16 part": (BWD, {"dtype": BF16, "part": True}),
    "bwd bf16 V%8": (BWD, {"dtype": BF16, "V": V + 8}),
    "bwd bf16 V odd": (BWD, {"dtype": BF16, "V": V + 1}),
    "bwd bf16 recompute": (BWD, {"dtype": BF16, "recompute": True}),
    "bwd bf16 entropy": (BWD, {"dtype": BF16, "entropy": True}),
    "bwd bf16 softcap": (BWD, {"dtype": BF16, "softcap": 30.0}),
    "loss sequence packed": (LOSS, {"objective": GSPO(), "packed": True}),
    "loss token padded kl weights": (
        LOSS,
        {"objective": GRPO(kl_coef=0.1), "has_mask": True, "ref": True, "weights": "token"},
    ),
}
# Optional arguments change what is compiled, and the interpreter accepts more than the compiler.
COMBINATIONS = {
    "fwd no mask": (FWD, {"dtype": BF16, "has_mask": False}),
    "fwd V%4 first row apart": (FWD, {"dtype": BF16, "V": V + 4, "first": 1}),
    "fwd entropy softcap no mask": (
        FWD,
        {"dtype": FP32, "entropy": True, "softcap": 30.0, "has_mask": False},
    ),
    "bwd no mask no loss": (BWD, {"dtype": BF16, "has_mask": False, "loss": False}),
    "bwd recompute softcap": (BWD, {"dtype": FP32, "recompute": True, "softcap": 30.0}),
    "bwd entropy softcap no loss": (
        BWD,
        {"dtype": FP32, "entropy": True, "softcap": 30.0, "loss": False},
    ),
    "loss on-policy": (LOSS, {"objective": GSPO(), "old": False}),
    "loss on-policy packed mask": (
        LOSS,
        {"objective": GSPO(), "old": False, "packed": True, "has_mask": True},
    ),
    "loss on-policy ref k1": (
        LOSS,
        {"objective": GSPO(kl_coef=0.1, kl_estimator="k1"), "old": False, "ref": True},
    ),
    "loss token k2 token-mean": (
        LOSS,
        {
            "objective": GRPO(kl_coef=0.1, kl_estimator="k2", aggregation="token-mean"),
            "ref": True,
            "weights": "sequence",
        },
    ),
    "loss sequence weights": (LOSS, {"objective": GSPO(), "weights": "token"}),
    "loss sequence_token per token": (
        LOSS,
        {
            "objective": GSPOToken(aggregation="token-sum"),
            "packed": True,
            "per_token": True,
            "weights": "token",
        },
    ),
}
# every further objective, padded and packed in turn, with weights of every shape
FURTHER_LOSSES = {
    f"loss {said(objective)}": (
        LOSS,
        {
            "objective": objective,
            "packed": i % 2 == 0,
            "has_mask": i % 2 == 1,
            "ref": objective.kl_coef > 0,
            "per_token": objective.ratio_level in ("sequence_token", "sequence_shared"),
            "weights": (None, "token", "sequence")[i % 3],
        },
    )
    for i, objective in enumerate(FURTHER_OBJECTIVES)
}


N, H, HEAD_V, COLUMNS = 8192, 4096, 151936, slice(8192, 16384)


# one tile of logits, and one launch
TILE = {"products": "mm", "n": BLOCKS.rows, "vocabulary": BLOCKS.columns}


def make_tiles(
    dtype: torch.dtype,
    products: str = "triton",
    bias: bool = False,
    live: bool = False,
    n: int = N,
    vocabulary: int = HEAD_V,
    **options: Any,
) -> Tiles:
    operands = Head(
        hidden=empty(n, H, dtype=dtype),
        weight=empty(vocabulary, H, dtype=dtype),
        bias=empty(vocabulary, dtype=dtype) if bias else None,
        lora_a=None,
        lora_b=None,
    )
    rows = FlaggedRows(empty(n, dtype=torch.bool)) if live or products == "tma" else AllRows()
    with mock.patch.object(head, "use_triton", return_value=True):
        return make_implementation(
            operands,
            empty(n, dtype=torch.int64),
            rows,
            HeadOptions(
                softmax(**options), products, allow_sync=False, lora_scale=1.0, kept_columns=0
            ),
        )


def make_kept(tiles: Tiles, columns: int = HEAD_V) -> Kept:
    n, width = (tiles.of.n, HEAD_V + 64) if columns else (0, 0)
    return Kept(empty(n, width, dtype=tiles.of.grad_dtype), columns)


def call_from_hidden(products: str, n: int, hidden_size: int) -> None:
    """Run forward and backward of one call that keeps everything; all of its n rows may be dead."""
    shape, vocabulary = (n, hidden_size), (HEAD_V, hidden_size)
    operands = Head(empty(*shape, dtype=BF16), empty(*vocabulary, dtype=BF16), None, None, None)
    options = HeadOptions(softmax(), products, False, 1.0, HEAD_V)
    rows = TargetRows(empty(n, dtype=torch.int64), None)
    kept = Kept(empty(n, kept_width(HEAD_V), dtype=BF16), HEAD_V)
    out = HeadGrads(empty(*shape, dtype=BF16), empty(*vocabulary, dtype=BF16), None, None, None)
    with (
        mock.patch.object(head, "use_triton", return_value=True),
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(passes, "device_guard", return_value=nullcontext()),
        mock.patch.object(passes, "no_autocast", return_value=nullcontext()),
    ):
        _, sums = passes.forward(operands, rows, None, options, kept)
        passes.backward(operands, rows, sums, empty(n), None, options, kept, out, add=Wanted())


def make_sums(tiles: Tiles) -> Sums:
    entropy = tiles.of.options.softmax.return_entropy
    return Sums.empty(tiles.blocks.entries(tiles.of.V), empty(tiles.of.n), entropy)


def launch_fold(
    dtype: torch.dtype, kept: bool = True, has_keep: bool = True, **options: Any
) -> None:
    tiles = make_tiles(dtype, **options)
    n = tiles.of.n
    keep = empty(n, dtype=torch.bool) if has_keep else None
    kept_e = make_kept(tiles, HEAD_V if kept else 0)
    tiles.fold(empty(n), kept_e, keep, make_sums(tiles), empty(n))


def launch_weigh(dtype: torch.dtype, slope: bool = False, **options: Any) -> None:
    tiles = make_tiles(dtype, **options)
    n = tiles.of.n
    constant, slopes = (empty(n), empty(n)) if slope else (None, None)
    weighting = Weighting(empty(n), empty(n), constant, slopes)
    columns = slice(tiles.of.V - BLOCKS.columns, tiles.of.V)
    tiles.weigh(columns, weighting, empty(n, BLOCKS.columns, dtype=tiles.of.grad_dtype))


def live_tile(tiles: Tiles, listed: bool) -> Tile:
    e = make_kept(tiles).e[:, COLUMNS] if listed else empty(N, 8192, dtype=tiles.of.grad_dtype)
    return Tile(e, empty(N, dtype=torch.int64) if listed else None)


def launch_dhidden(
    dtype: torch.dtype, add: bool = False, listed: bool = True, products: str = "triton"
) -> None:
    tiles = make_tiles(dtype, products)
    tile = live_tile(tiles, listed)
    tiles.add_to_rows(empty(N, H), tile, tiles.of.weight[COLUMNS], add=add)


def launch_dweight(
    dtype: torch.dtype, add: bool = False, listed: bool = True, products: str = "triton"
) -> None:
    tiles = make_tiles(dtype, products)
    out = empty(8192, H, dtype=FP32 if add else dtype)
    x = empty(N, H, dtype=tiles.of.grad_dtype)
    tiles.add_to_columns(out, live_tile(tiles, listed), x, add=add)


def launch_column_sums(products: str, add: bool = False) -> None:
    tiles = make_tiles(BF16, products)
    tile = live_tile(tiles, listed=products == "triton")
    tiles.add_to_columns(empty(8192, 1, dtype=BF16), tile, empty(N, 1), add=add)


def launch_rescale(products: str) -> None:
    tiles = make_tiles(BF16, products)
    tiles.rescale(make_kept(tiles), make_sums(tiles), empty(N))


def launch_finish(entropy: bool = False, n: int = N) -> None:
    tiles = make_tiles(BF16, "triton", n=n, entropy=entropy)
    tiles.finish(make_sums(tiles), empty(n), empty(n))


def launch_row_grads(slope: bool = False, listed: bool = False, **options: Any) -> None:
    tiles = make_tiles(BF16, "triton", **options)
    if listed:
        order = OrderedRows(empty(N, dtype=torch.int64), empty(dtype=torch.int32))
        tiles.of = tiles.of._replace(rows=order)
    sums, h = RowSums(*[empty(N) for _ in RowSums._fields]), empty(N) if slope else None
    tiles.row_grads(sums, empty(N), h, empty(N, dtype=torch.bool))


def launch_scale_rows() -> None:
    tiles = make_tiles(BF16, "mm")
    grads = RowGrads(empty(N), empty(N), Weighting(empty(N), empty(N), None, None))
    tiles.scale_rows(empty(N, H), tiles.of.weight, grads)


def launch_add_targets(dtype: torch.dtype) -> None:
    out = empty(HEAD_V, H, dtype=dtype)
    make_tiles(BF16, "mm").add_targets(out, empty(N, H, dtype=BF16), empty(N))


def launch_target_logits(**options: Any) -> None:
    make_tiles(BF16, "mm", **options).target_logits()


DHIDDEN, DWEIGHT = launch_dhidden, launch_dweight
FOLD, WEIGH = launch_fold, launch_weigh
RESCALE, TARGET, ADD_TARGETS = launch_rescale, launch_target_logits, launch_add_targets
COLUMN_SUMS = launch_column_sums
# shown for every target
PRODUCTS = {
    f"{name} {label}": (pair, options | {"dtype": dtype})
    for label, dtype in (("bf16", BF16), ("fp32", FP32))
    for name, pair, options in (
        ("hidden fwd", FOLD, {}),
        ("hidden recompute", WEIGH, {}),
        ("dhidden", DHIDDEN, {}),
        ("dhidden add", DHIDDEN, {"add": True}),
        ("dweight", DWEIGHT, {}),
        ("dweight add", DWEIGHT, {"add": True}),
    )
}
TMA = {
    f"tma {name}": (launch, options | {"dtype": BF16, "products": "tma"})
    for name, launch, options in (
        ("fwd", FOLD, {}),
        ("fwd no kept", FOLD, {"kept": False, "has_keep": False}),
        ("fwd entropy", FOLD, {"entropy": True}),
        ("fwd bias entropy", FOLD, {"bias": True, "entropy": True}),
        ("fwd softcap", FOLD, {"softcap": 30.0}),
        ("fwd softcap no kept", FOLD, {"softcap": 30.0, "kept": False}),
        ("fwd bias softcap entropy", FOLD, {"bias": True, "softcap": 30.0, "entropy": True}),
        ("recompute", WEIGH, {}),
        ("recompute bias entropy", WEIGH, {"bias": True, "slope": True}),
        ("recompute bias softcap entropy", WEIGH, {"bias": True, "softcap": 30.0, "slope": True}),
        ("dhidden", DHIDDEN, {"listed": False}),
        ("dhidden add", DHIDDEN, {"listed": False, "add": True}),
        ("dweight", DWEIGHT, {"listed": False}),
        ("dweight add", DWEIGHT, {"listed": False, "add": True}),
    )
}
EPILOGUES = {
    name: (launch, options | {"dtype": BF16} | TILE)
    for name, launch, options in (
        ("fold", FOLD, {}),
        ("fold no kept", FOLD, {"kept": False}),
        ("fold live", FOLD, {"live": True}),
        ("fold entropy", FOLD, {"entropy": True}),
        ("fold entropy softcap no kept", FOLD, {"entropy": True, "softcap": 30.0, "kept": False}),
        ("fold softcap live", FOLD, {"softcap": 30.0, "live": True}),
        ("weigh", WEIGH, {}),
        ("weigh entropy softcap live", WEIGH, {"slope": True, "softcap": 30.0, "live": True}),
    )
} | {
    "rescale mm": (RESCALE, {"products": "mm"}),
    "rescale triton": (RESCALE, {"products": "triton"}),
    "row sums": (launch_finish, {}),
    "row sums entropy": (launch_finish, {"entropy": True}),
    "row sums N%4": (launch_finish, {"n": N + 4}),
    "row grads": (launch_row_grads, {}),
    "row grads entropy softcap listed": (
        launch_row_grads,
        {"slope": True, "softcap": 30.0, "listed": True},
    ),
    "scale rows": (launch_scale_rows, {}),
    "column sums mm": (COLUMN_SUMS, {"products": "mm"}),
    "column sums triton add": (COLUMN_SUMS, {"products": "triton", "add": True}),
    "add targets": (ADD_TARGETS, {"dtype": BF16}),
    "add targets fp32": (ADD_TARGETS, {"dtype": FP32}),
    "target": (TARGET, {}),
    "target bias softcap live": (TARGET, {"bias": True, "softcap": 30.0, "live": True}),
}
PRODUCT_COMBINATIONS = {
    "hidden fwd no kept": (FOLD, {"dtype": BF16, "kept": False, "has_keep": False}),
    "hidden fwd entropy": (FOLD, {"dtype": BF16, "entropy": True}),
    "hidden fwd fp16 bias softcap entropy": (
        FOLD,
        {"dtype": FP16, "bias": True, "softcap": 30.0, "entropy": True},
    ),
    "hidden recompute bias softcap entropy": (
        WEIGH,
        {"dtype": BF16, "bias": True, "softcap": 30.0, "slope": True},
    ),
    "dhidden all rows": (DHIDDEN, {"dtype": BF16, "listed": False}),
    "dweight all rows": (DWEIGHT, {"dtype": BF16, "listed": False}),
}
ALL = VARIANTS | COMBINATIONS | FURTHER_LOSSES | PRODUCTS | TMA | EPILOGUES | PRODUCT_COMBINATIONS
