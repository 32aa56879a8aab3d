"""What ranks exchange when a vocabulary, or the tokens of sequences, are spread over them.

Numbers per row or per sequence, never logits or log-probs, and the gradient of hidden states that
all ranks share. What decisions depend on is gathered, and every rank adds it up in the order of the
ranks, so that all see the same bits and take the same clip decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import resolve_layout, segment_sum
from .objective import GSPO, Objective

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import ProcessGroup
else:  # a torch that was built without
    ProcessGroup = object


class VocabShard(NamedTuple):
    """The part of a vocabulary that this rank holds, in terms that an operator takes.

    Attributes:
        group: name of the group of ranks that share the vocabulary; None when all of it is here.
        start: the first token that this rank holds.
        size: tokens of the whole vocabulary.
    """

    group: str | None
    start: int
    size: int

    def contains(self, targets: Tensor) -> Tensor:
        return (targets >= 0) & (targets < self.size)

    def local(self, targets: Tensor, columns: int) -> Tensor:
        """Targets counted from the first token of this rank; -1 for those of other ranks."""
        if self.group is None:
            return targets
        targets = targets - self.start
        return torch.where((targets >= 0) & (targets < columns), targets, -1)


# of an operator; the fields of VocabShard
VOCAB_SHARD = "str? vocab_group, SymInt vocab_start, SymInt vocab_size"


def vocab_shard(
    name: str, x: Tensor, dim: int, group: ProcessGroup | None
) -> tuple[Tensor, VocabShard]:
    """A head's weight or logits as this rank holds them, and which part of the vocabulary it is.

    Parts of plain tensors are equally large and in the order of the ranks; a DTensor knows.
    """
    if is_dtensor(x):
        return _shard_of_dtensor(name, x, dim, group)
    if not isinstance(x, Tensor) or x.ndim < 2:
        return x, VocabShard(None, 0, 0)  # refused by the checks that follow
    columns = x.shape[dim]
    if group is None:
        return x, VocabShard(None, 0, columns)
    ranks, rank = _size_and_rank("vocab_group", group)
    return x, VocabShard(group.group_name, rank * columns, ranks * columns)


def widest_part(shard: VocabShard, group: ProcessGroup | None) -> int:
    """Tokens of the largest part of the vocabulary: what ranks plan with, to plan the same."""
    return shard.size if group is None else -(-shard.size // group.size())


def context_group_name(group: ProcessGroup | None) -> str | None:
    if group is None:
        return None
    _size_and_rank("context_group", group)
    return group.group_name


def is_dtensor(x: object) -> bool:
    return isinstance(x, Tensor) and hasattr(x, "device_mesh")


def local_part(name: str, x: Tensor, like: VocabShard, group: ProcessGroup | None) -> Tensor:
    """Another operand that is split like the weight, along its first dimension."""
    local, shard = vocab_shard(name, x, 0, group) if is_dtensor(x) else (x, like)
    if shard != like:
        raise ValueError(f"{name} must be split like weight: {like}, got {shard}")
    return local


def replicated(name: str, x: Tensor) -> Tensor:
    """An operand that every rank holds as a whole."""
    if not is_dtensor(x):
        return x
    if not all(placement.is_replicate() for placement in x.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} must be the same on all ranks, got a DTensor with placements "
            f"{tuple(x.placements)}"  # type: ignore[attr-defined]
        )
    return x.to_local()  # type: ignore[attr-defined]


def _shard_of_dtensor(
    name: str, x: Tensor, dim: int, group: ProcessGroup | None
) -> tuple[Tensor, VocabShard]:
    mesh, placements = x.device_mesh, tuple(x.placements)  # type: ignore[attr-defined]
    if group is None:
        raise ValueError(
            f"{name} is a DTensor with placements {placements}: where its ranks see the same rows, "
            f"pass vocab_group={name}.device_mesh.get_group(); where each has rows of its own, as "
            f"with FSDP, pass {name}.full_tensor()"
        )
    ranks, rank = _size_and_rank("vocab_group", group)
    dim = dim % x.ndim
    for i, placement in enumerate(placements):
        is_group = mesh.get_group(i).group_name == group.group_name
        if not (placement.is_shard(dim) if is_group else placement.is_replicate()):
            raise ValueError(
                f"{name} must be split over vocab_group by Shard({dim}) and by nothing else, got a "
                f"DTensor with placements {placements}"
            )
    if all(mesh.get_group(i).group_name != group.group_name for i in range(mesh.ndim)):
        raise ValueError(f"{name} is a DTensor over other ranks than those of vocab_group")
    size = x.shape[dim]
    widest = -(-size // ranks)
    if (ranks - 1) * widest >= size:
        raise ValueError(f"{name} must give each of {ranks} ranks a part of the vocabulary {size}")
    return x.to_local(), VocabShard(group.group_name, rank * widest, size)  # type: ignore[attr-defined]


def _size_and_rank(name: str, group: ProcessGroup) -> tuple[int, int]:
    if not hasattr(group, "group_name"):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup that this rank belongs to, got "
            f"{type(group).__name__}"
        )
    return group.size(), dist.get_rank(group)


def global_denominator(
    batches: Iterable[Mapping[str, Tensor | None]],
    *,
    objective: Objective = GSPO(),
    group: ProcessGroup | None = None,
    context_group: ProcessGroup | None = None,
    gradients: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The `denominator` that makes losses of parts of a batch add up to that of the whole.

        D = (non-empty sequences, or tokens for "token-mean", on all ranks) / ranks

    Each rank calls the loss with it on each of its micro-batches, and adds the gradients up; what
    averages them over the ranks, as DDP and FSDP do, then has the gradient of the whole batch.

    Args:
        batches: for each micro-batch of this rank, the `mask` and `cu_seqlens` that its loss gets,
            by these names; at least one of them.
        objective: whose `aggregation` says what is counted.
        group: ranks that have other sequences; None for no others.
        context_group: ranks over which the tokens of the sequences are spread.
        gradients: `"mean"` where they are averaged over the ranks of both groups, `"sum"` where
            they are added up.

    Returns:
        0-dim float64 on the device of the batches, without a host synchronisation.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if gradients not in ("mean", "sum"):
        raise ValueError(f"gradients must be 'mean' or 'sum', got {gradients!r}")
    lengths = [_lengths(i, batch) for i, batch in enumerate(batches)]
    if not lengths:
        raise ValueError("batches must hold one micro-batch at least")
    n = torch.cat(lengths)
    ranks = 1
    if context_group is not None:
        ranks *= _size_and_rank("context_group", context_group)[0]
        n = gathered(n, context_group.group_name).sum(0)
    count = n.sum() if objective.aggregation == "token-mean" else (n > 0).sum().double()
    if group is not None:
        ranks *= _size_and_rank("group", group)[0]
        count = summed(count, group.group_name)
    if objective.aggregation == "token-sum":
        count = torch.ones_like(count)
    return count / ranks if gradients == "mean" else count


def _lengths(i: int, batch: Mapping[str, Tensor | None]) -> Tensor:
    """(B,) tokens that count, in each sequence of a micro-batch."""
    mask, cu_seqlens = batch.get("mask"), batch.get("cu_seqlens")
    unknown = sorted(batch.keys() - {"mask", "cu_seqlens"})
    if unknown or (mask is None and cu_seqlens is None):
        raise ValueError(f"batches[{i}] must have mask or cu_seqlens, or both, got {sorted(batch)}")
    if mask is None and cu_seqlens is not None:
        return cu_seqlens.diff().double()
    assert mask is not None
    layout = resolve_layout(mask.shape, mask.device, mask, cu_seqlens)
    return segment_sum((mask.reshape(-1) != 0).double(), layout.batch, layout.cu_seqlens)


# Collectives, by the name of a group: inside of operators


def group_named(name: str) -> ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def gathered(x: Tensor, group: str) -> Tensor:
    """(G, *x.shape): x of every rank, in their order."""
    ranks = group_named(group)
    out = x.new_empty(ranks.size() * x.numel())
    dist.all_gather(list(out.chunk(ranks.size())), x.reshape(-1).contiguous(), group=ranks)
    return out.view(ranks.size(), *x.shape)


def summed(x: Tensor, group: str) -> Tensor:
    """x added up over the ranks, in place."""
    dist.all_reduce(x, group=group_named(group))
    return x


def sum_in_order(x: Tensor) -> Tensor:
    """x.sum(0), in one order of additions whatever the shape."""
    return reduce(torch.add, x.unbind(0))


def gathered_rows(x: Tensor, shard: VocabShard, columns: int) -> Tensor:
    """(G, *x.shape): numbers per row of every part of the vocabulary.

    Parts that do not make up one vocabulary are an error; on a GPU, where nobody looks, all NaN.
    """
    assert shard.group is not None
    ends = x.new_full((2,), shard.start)
    ends[1] += columns
    parts = gathered(torch.cat([x.reshape(-1), ends]), shard.group)
    first, last = parts[:, -2], parts[:, -1]
    fits = (first[1:] == last[:-1]).all() & (last[-1] == shard.size)
    if x.device.type == "cpu" and not fits:
        sizes = (last - first).long().tolist()
        raise ValueError(
            f"vocab_group must hold equal parts of the vocabulary, got {sizes} tokens on its "
            "ranks: pad the head, or pass DTensors"
        )
    out = parts[:, :-2].view(len(parts), *x.shape)
    return out if x.device.type == "cpu" else torch.where(fits, out, torch.nan)
