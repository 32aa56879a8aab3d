"""The exchanges between ranks over which a vocabulary, or the tokens of sequences, are sharded.

Ranks exchange numbers per row or per sequence, and the gradient of the hidden states that they all
hold, but never logits or log-probs. The sums that decisions depend on are gathered, and every rank
adds them up in the order of the ranks, so that all see the same bits and take the same clip
decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_tensor, checked_targets, is_dtensor
from .layout import resolve_layout
from .objective import GSPO, Objective, aggregation_of
from .operators import operator

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import ProcessGroup
else:  # this torch was built without torch.distributed
    ProcessGroup = object


def vocab_part(name: str, x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """Return this rank's shard of a head's weight, of logits, or of an operand sharded alike."""
    return _part_of_dtensor(name, x, dim, group) if is_dtensor(x) else x


def group_name(argument: str, group: ProcessGroup | None) -> str | None:
    """Return the name by which operators know a group."""
    if group is None:
        return None
    _check_group(argument, group)
    return group.group_name


def replicated(name: str, x: Tensor) -> Tensor:
    """Return an operand that every rank holds in full."""
    if not is_dtensor(x):
        return x
    if not all(placement.is_replicate() for placement in x.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} must be the same on all ranks, got a DTensor with placements "
            f"{tuple(x.placements)}"  # type: ignore[attr-defined]
        )
    return x.to_local()  # type: ignore[attr-defined]


def _part_of_dtensor(name: str, x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    mesh, placements = x.device_mesh, tuple(x.placements)  # type: ignore[attr-defined]
    if group is None:
        raise ValueError(
            f"{name} is a DTensor with placements {placements}: if its ranks see the same rows, "
            f"pass vocab_group={name}.device_mesh.get_group(); if each has rows of its own, as "
            f"with FSDP, pass {name}.full_tensor()"
        )
    _check_group("vocab_group", group)
    dim = dim % x.ndim
    for i, placement in enumerate(placements):
        is_group = mesh.get_group(i).group_name == group.group_name
        if not (placement.is_shard(dim) if is_group else placement.is_replicate()):
            raise ValueError(
                f"{name} must be sharded over vocab_group by Shard({dim}) and by nothing else, got "
                f"a DTensor with placements {placements}"
            )
    if all(mesh.get_group(i).group_name != group.group_name for i in range(mesh.ndim)):
        raise ValueError(f"{name} is a DTensor over ranks other than those of vocab_group")
    ranks, size = group.size(), x.shape[dim]
    if (ranks - 1) * -(-size // ranks) >= size:
        raise ValueError(f"{name} must give each of {ranks} ranks a shard of the vocabulary {size}")
    return x.to_local()  # type: ignore[attr-defined]


def _check_group(argument: str, group: ProcessGroup) -> None:
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            f"{argument} must be a torch.distributed.ProcessGroup that this rank belongs to, got "
            f"{type(group).__name__}"
        )


# The first exchange, so that no rank waits for one that has refused its input


class SharedChecks:
    """A context around the checks of arguments that reports a refusal to the ranks in `agree`.

    On a GPU, where ranks do not compare anything, nothing is sent.
    """

    def __init__(self, *operands: object, **groups: ProcessGroup | None) -> None:
        self.operands, self.groups = operands, groups

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # a graph that is being traced exchanges nothing yet
        if not isinstance(error, Exception) or torch.compiler.is_compiling():
            return
        if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in self.operands):
            return
        for group in self.groups.values():
            if group is not None and hasattr(group, "group_name"):
                _exchange(group.group_name, [_REFUSED])


Facts = Mapping[str, int]

_REFUSED = 1
_NUMBERS = 20  # length of every rank's message, whatever it contains


def agree(
    groups: Mapping[str, tuple[str | None, Facts]],
    error: Exception | None,
    targets: Tensor | None = None,
    columns: int = 0,
) -> list[int]:
    """Raise on all ranks if one of them cannot continue; on a CPU, before any other exchange.

    Args:
        groups: for each argument that is a group, its name and the facts, by description, that must
            be the same on all of its ranks.
        error: why this rank cannot continue.
        targets: targets where they count, 0 elsewhere; None if they may lie outside the vocabulary.
        columns: number of tokens of the vocabulary that this rank holds.

    Returns:
        The number of tokens that each rank of vocab_group holds.
    """
    low, high = (0, 0) if targets is None else _range_of(targets)
    sizes: list[int] = []
    for argument, (group, facts) in groups.items():
        if group is None:
            continue
        message = [0, columns, low, high, *facts.values()]
        # ranks of the next group learn what this rank has learnt from the last
        everyone = _exchange(group, message if error is None else [_REFUSED])
        if argument == "vocab_group":
            sizes = [own[1] for own in everyone]
        error = error or _disagreement(argument, everyone, facts, targets, sum(sizes))
    if error is not None:
        raise error
    return sizes


def _exchange(group: str, message: list[int]) -> list[list[int]]:
    numbers = torch.zeros(_NUMBERS, dtype=torch.int64, device="cpu")
    numbers[: len(message)] = torch.tensor(message, device="cpu")
    return gathered(numbers, group).tolist()


def _range_of(x: Tensor) -> tuple[int, int]:
    return (int(x.min()), int(x.max())) if x.numel() else (0, 0)


def _disagreement(
    argument: str, everyone: list[list[int]], facts: Facts, targets: Tensor | None, size: int
) -> Exception | None:
    """Return why the ranks cannot continue, according to their messages; None if they can."""
    refused = [rank for rank, message in enumerate(everyone) if message[0] == _REFUSED]
    if refused:
        return _refusal(argument, refused)
    outside = [r for r, (_, _, low, high, *_) in enumerate(everyone) if low < 0 or high >= size]
    if argument == "vocab_group" and outside:
        own = None if targets is None else error_of(checked_targets, targets, size)
        return own or _refusal(argument, outside)
    for i, fact in enumerate(facts, start=4):
        values = [message[i] for message in everyone]
        if len(set(values)) > 1:
            return ValueError(
                f"{fact} must be the same on all ranks of {argument}, got {values} on its ranks"
            )
    return None


def _refusal(argument: str, ranks: list[int]) -> Exception:
    who = ", ".join(map(str, ranks))
    return ValueError(f"rank {who} of {argument} refused its input, and its error says why")


def error_of(check: Callable[..., object], *arguments: object) -> Exception | None:
    try:
        check(*arguments)
    except Exception as error:
        return error
    return None


def checksum(tensors: Iterable[Tensor | None]) -> int:
    """Return a checksum of the bytes of tensors on a CPU."""
    total = 0
    for x in tensors:
        if x is not None:
            total = crc32(x.contiguous().view(torch.uint8).numpy().tobytes(), total)
    return total


ELSEWHERE, NOWHERE = -1, -2  # local targets for a token of another rank, and of none


class Vocabulary(NamedTuple):
    """A vocabulary that may be sharded over ranks.

    Attributes:
        group: name of the group of ranks; None if this rank holds the whole vocabulary.
        columns: number of tokens that this rank holds.
        checks_range: whether targets outside the vocabulary are refused, on a CPU.
        names, facts: descriptions of facts that must be the same on all ranks, and their values.
    """

    group: str | None
    columns: int
    checks_range: bool
    names: list[str]
    facts: list[int]

    @classmethod
    def of(
        cls,
        group: str | None,
        columns: int = 0,
        checks_range: bool = False,
        facts: Facts | None = None,
    ) -> Vocabulary:
        facts = facts or {}
        return cls(group, columns, checks_range, list(facts), list(facts.values()))

    def known(self) -> Facts:
        return dict(zip(self.names, self.facts, strict=True))

    def local(self, targets: Tensor, sizes: list[int] | None) -> Tensor:
        """Return targets relative to the first token of this rank, int64.

        `sizes` are the sizes of all shards; None to exchange them here, if `agree` did not run.
        """
        if self.group is None:
            return targets.to(torch.int64, copy=True)
        if sizes is None:
            parts = gathered(targets.new_full((), self.columns, dtype=torch.int64), self.group)
        else:
            parts = torch.tensor(sizes, device=targets.device)
        start = parts[: group_named(self.group).rank()].sum()
        y = targets.long()
        local = torch.where((y >= start) & (y < start + self.columns), y - start, ELSEWHERE)
        return torch.where((y >= 0) & (y < parts.sum()), local, NOWHERE)


@operator(lambda targets, *_: targets.new_empty(targets.shape, dtype=torch.int64))
def agree_on_targets(targets: Tensor, mask: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return local targets, if all ranks of the vocabulary can continue."""
    sizes = None
    if targets.device.type == "cpu":
        counted = torch.where(mask, targets.long(), 0)
        shared = {**vocabulary.known(), "the checksum of targets": checksum([counted])}
        sizes = agree(
            {"vocab_group": (vocabulary.group, shared)},
            None,
            counted.view(-1) if vocabulary.checks_range else None,
            vocabulary.columns,
        )
    return vocabulary.local(targets, sizes)


def global_denominator(
    batches: Iterable[Mapping[str, Tensor | None]],
    *,
    objective: Objective | Callable[..., Any] = GSPO(),
    group: ProcessGroup | None = None,
    context_group: ProcessGroup | None = None,
    gradients: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The `denominator` with which losses of parts of a batch add up to that of the whole batch.

        D = max(1, non-empty sequences, or tokens for "token-mean", on all ranks) / ranks
            (1 / ranks for "token-sum")

    Each rank passes it to the loss of each of its micro-batches and accumulates the gradients. When
    DDP or FSDP averages them over the ranks, the result is the gradient of the whole batch.

    Args:
        batches: for each micro-batch of this rank, the `mask` and `cu_seqlens` that are passed to
            its loss, by these names; at least one of them.
        objective: the objective, or the function as objective, whose `aggregation` says what is
            counted.
        group: ranks with other sequences; None if there are none.
        context_group: ranks over which the tokens of the sequences are sharded.
        gradients: `"mean"` if gradients are averaged over the ranks of both groups, `"sum"` if they
            are summed.

    Returns:
        0-dim float64 on the device of the batches, without a host synchronisation.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    batches = list(batches)
    given = [x for batch in batches if isinstance(batch, Mapping) for x in batch.values()]
    with SharedChecks(*given, context_group=context_group, group=group):
        if gradients not in ("mean", "sum"):
            raise ValueError(f"gradients must be 'mean' or 'sum', got {gradients!r}")
        aggregation = aggregation_of(objective)
        if not batches:
            raise ValueError("batches must contain at least one micro-batch")
        n = torch.cat([_lengths(i, batch) for i, batch in enumerate(batches)])
        context = group_name("context_group", context_group)
        others = group_name("group", group)
    if n.device.type == "cpu":
        facts = {"the number of sequences in batches": len(n)}
        agree({"context_group": (context, facts), "group": (others, {})}, None)
    if context is not None:
        n = gathered(n, context).sum(0)
    count = n.sum() if aggregation == "token-mean" else (n > 0).sum().double()
    if others is not None:
        count = summed(count, others)
    ranks = math.prod(x.size() for x in (group, context_group) if x is not None)
    if aggregation == "token-sum":
        count = torch.ones_like(count)
    count = count.clamp(min=1)  # a batch in which nothing counts has the loss 0
    return count / ranks if gradients == "mean" else count


def _lengths(i: int, batch: Mapping[str, Tensor | None]) -> Tensor:
    """Return the number of tokens that count in each sequence of a micro-batch, (B,)."""
    mask, cu_seqlens = batch.get("mask"), batch.get("cu_seqlens")
    unknown = sorted(batch.keys() - {"mask", "cu_seqlens"})
    if unknown or (mask is None and cu_seqlens is None):
        raise ValueError(f"batches[{i}] must have mask or cu_seqlens, or both, got {sorted(batch)}")
    if mask is None and cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens)
        return cu_seqlens.diff().double()
    assert mask is not None
    layout = resolve_layout(f"batches[{i}]['mask']", mask.shape, mask.device, mask, cu_seqlens)
    return layout.sequences.sum((mask.reshape(-1) != 0).double())


# Collectives for operators, which know a group by its name


def group_named(name: str) -> ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def gathered(x: Tensor, group: str) -> Tensor:
    """Return x of every rank, (G, *x.shape), in the order of the ranks."""
    ranks = group_named(group)
    out = x.new_empty(ranks.size() * x.numel())
    dist.all_gather(list(out.chunk(ranks.size())), x.reshape(-1).contiguous(), group=ranks)
    return out.view(ranks.size(), *x.shape)


def summed(x: Tensor, group: str) -> Tensor:
    """Sum x over the ranks, in place."""
    dist.all_reduce(x, group=group_named(group))
    return x


def sum_in_order(x: Tensor) -> Tensor:
    """Return x.sum(0), in an order of additions that does not depend on the shape."""
    return reduce(torch.add, x.unbind(0), x.new_zeros(x.shape[1:]))
