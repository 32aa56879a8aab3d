"""Checks of every op, dtype, layout, objective and plan against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from .. import GSPO, Objective
from .bounds import Measured
from .cases import (
    FURTHER_OBJECTIVES,
    OBJECTIVES,
    SETTINGS,
    Case,
    HeadTensors,
    make_case,
    synthetic_head,
    synthetic_logits,
    with_lora,
)
from .hidden_ops import measure_from_hidden
from .logits_ops import measure_from_logits


def verify(
    device: torch.device,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    shapes: Sequence[tuple[int, int, int]] = ((9, 16, 4097), (8, 5, 32000)),
    head_shapes: Sequence[tuple[int, int, int, int]] = ((9, 8, 37, 4097),),
    further: Sequence[Objective] = FURTHER_OBJECTIVES,
    logits: Tensor | None = None,
    head: HeadTensors | None = None,
    targets: Tensor | None = None,
    quick: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Check every op, dtype, layout, objective and plan on the device against float64.

    Args:
        device: where to run.
        dtypes: dtypes of the logits, or of hidden states and weight.
        shapes: (B, T, V) of the synthetic logits.
        head_shapes: (B, T, H, V) of the synthetic hidden states and weights.
        further: objectives checked on small synthetic inputs, besides the three on all inputs. A
            temperature, a soft cap, a denominator and LoRA are checked on small inputs, too.
        logits, head, targets: (B, T, V), (B, T, H) and (V, H), and (B, T) of a real model, instead
            of synthetic ones.
        quick: one case per dtype for each head, not each objective and layout, and no small
            inputs.
        progress: called with one line per case.

    Returns:
        Every measured quantity; `worst_of` summarises them.
    """
    sources: list[Tensor | HeadTensors] = []
    if logits is None or head is None:
        sources += [synthetic_logits(*x, device=device, seed=i) for i, x in enumerate(shapes)]
        sources += [synthetic_head(*x, device=device, seed=i) for i, x in enumerate(head_shapes)]
    else:
        sources += [logits.to(device).float(), head.map(lambda x: x.to(device))]
    measured: list[Measured] = []
    for seed, source in enumerate(sources):
        for variant, objective, packed in _variants(source, dtypes, quick):
            case = make_case(variant, objective, packed=packed, targets=targets, seed=seed)
            shape = tuple(case.logits.shape)
            progress(f"{str(case.dtype)[6:]} {case.name} {shape} {'head' if case.head else ''}")
            measured += measure(case)
    small = () if quick else _small_cases(device, dtypes, further)
    for case in small:
        progress(f"{str(case.dtype)[6:]} {case.name} {'head' if case.head else ''}")
        measured += measure(case)
    return measured


def _small_cases(
    device: torch.device, dtypes: Sequence[torch.dtype], objectives: Sequence[Objective]
) -> Iterator[Case]:
    """Yield small cases of logits and of hidden states, with other settings and objectives.

    Logits come in each dtype and layout, hidden states in each dtype with other settings.
    """
    logits = synthetic_logits(9, 6, 65, device=device)
    head = synthetic_head(9, 6, 16, 65, device=device)
    for i, (factor, options) in enumerate(SETTINGS):
        for dtype in dtypes:
            for packed in (False, True):
                yield make_case((logits * factor).to(dtype), GSPO(), packed=packed, **options)
            of_head = head.scaled(factor).to(dtype)
            yield make_case(of_head, GSPO(), packed=i % 2 == 0, **options)
    for dtype in dtypes:  # the update makes logits larger, the temperature smaller
        yield make_case(with_lora(head, 4).to(dtype), GSPO(), packed=False, temperature=1.3)
    for i, objective in enumerate(objectives):
        for j, dtype in enumerate(dtypes):
            for packed in (False, True):
                yield make_case(logits.to(dtype), objective, packed=packed, seed=i)
            if i % len(dtypes) == j:
                yield make_case(head.to(dtype), objective, packed=i % 2 == 0, seed=i)


def _variants(
    source: Tensor | HeadTensors, dtypes: Sequence[torch.dtype], quick: bool
) -> Iterator[tuple[Tensor | HeadTensors, Objective, bool]]:
    """Yield a source in each dtype, with each objective, padded and packed."""
    combinations: Iterator = product(dtypes, OBJECTIVES, (False, True))
    if not isinstance(source, HeadTensors):
        yield from ((source.to(dtype), *rest) for dtype, *rest in combinations)
        return
    if quick:
        combinations = ((dtype, GSPO(), i % 2 == 0) for i, dtype in enumerate(dtypes))
    for dtype, objective, packed in combinations:
        # half of them without a bias
        yield (source if packed else source._replace(bias=None)).to(dtype), objective, packed
    if torch.bfloat16 in dtypes and not quick:
        yield source.to(torch.bfloat16, torch.float32), GSPO(), True


def measure(case: Case) -> Iterator[Measured]:
    """Measure every quantity of every op on one case."""
    if case.head is None:
        yield from measure_from_logits(case)
    else:
        yield from measure_from_hidden(case, case.head)


def worst_of(measured: list[Measured]) -> list[Measured]:
    """Return the worst case of each (op, dtype, quantity), in order of appearance; NaN is worst."""
    out: dict[tuple, Measured] = {}
    for m in measured:
        key = (m.op, m.dtype, m.quantity)
        if key not in out or math.isnan(m.value) or m.value > out[key].value:
            out[key] = m
    return list(out.values())


def table(measured: list[Measured]) -> str:
    """Return one line per (op, dtype, quantity): worst value, bound, and the case that gave it."""
    lines = [f"{'op':27} {'dtype':9} {'quantity':27} {'worst':>9} {'bound':>7}  worst case"]
    for m in worst_of(measured):
        mark = "" if m.ok else "  <-- over the bound"
        lines.append(
            f"{m.op:27} {str(m.dtype)[6:]:9} {m.quantity:27} {m.value:9.2g} {m.bound:7.0e}  "
            f"{m.case}{mark}"
        )
    return "\n".join(lines)
