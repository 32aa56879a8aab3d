"""Operators of `torch.library`, whose schema is read off the annotations of their implementation.

autograd.Functions call them; torch.compile and FakeTensor see their schema and their fake only. An
operator takes and returns records, which are NamedTuples, as a whole: its schema has their fields.
It has no derivative of its own and raises an error when one is requested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

LIBRARY = torch.library.Library("gspo_ops", "DEF")
Changed = Annotated[Tensor, "changed"]  # an argument that the operator writes to


def operator(fake: Callable[..., Any]) -> Callable[[F], F]:
    """Declare an operator with the name and the annotations of the implementation it decorates.

    `fake` takes the same arguments and returns a record of empty tensors.

    If an operator took a float that changes from call to call, torch.compile would recompile for
    every value. An operator with floats therefore has an overload, `variable`, that takes them as
    tensors on the CPU.
    """

    def register(implementation: F) -> F:
        hints = get_type_hints(implementation, include_extras=True)
        record = hints.pop("return")
        returns = ", ".join(kind for _, kind in _fields("", record))
        fields = [field for name, hint in hints.items() for field in _fields(name, hint)]
        schema = ", ".join(f"{kind} {name}" for name, kind in fields)
        floats = [i for i, (_, kind) in enumerate(fields) if kind.startswith("float")]
        names, readers = tuple(hints), _readers(hints.values())
        is_record = _is_record(record)
        depths = [_depth(hint) for hint in hints.values()]

        def of_fields(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any) -> Any:
                out = function(*[read(given) for read in readers])
                return tuple(out) if is_record else out

            return call

        def of_variables(*given: Any) -> Any:
            return of_fields(implementation)(*_mapped(Tensor.item, given, floats))

        name, fake_of_fields = implementation.__name__, of_fields(fake)
        op = _declare(f"{name}({schema}) -> ({returns})", of_fields(implementation), fake_of_fields)
        variable: Callable[..., Any] | None = None
        if floats:
            schema = ", ".join(f"{kind.replace('float', 'Tensor')} {name}" for name, kind in fields)
            variable = _declare(
                f"{name}.variable({schema}) -> ({returns})", of_variables, fake_of_fields
            )

        def call(*arguments: Any, **named: Any) -> Any:
            if named:
                arguments = (*arguments, *[named[name] for name in names[len(arguments) :]])
            given: list[Any] = []
            for x, depth in zip(arguments, depths, strict=True):
                if depth == 0:
                    given.append(x)
                else:
                    given.extend(x if depth == 1 else flat(x))
            if (
                variable is not None
                and torch.compiler.is_compiling()
                and any(_is_variable(given[i]) for i in floats)
            ):
                out = variable(*_mapped(scalar, given, floats))
            else:
                out = op(*given)
            return record(*out) if is_record else out

        call.__doc__ = implementation.__doc__
        return call  # type: ignore[return-value]

    return register


# Records


@cache
def _hints(record: Any) -> dict[str, Any]:
    return get_type_hints(record, include_extras=True)


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


_KINDS: dict[Any, str] = {
    Tensor: "Tensor",
    Changed: "Tensor(a!)",
    int: "SymInt",
    bool: "bool",
    float: "float",
    str: "str",
    list[int]: "SymInt[]",
    list[str]: "str[]",
}


def _fields(name: str, hint: Any) -> Iterator[tuple[str, str]]:
    """Yield names and kinds of a schema's fields for an argument, or a result, of this type."""
    if _is_record(hint):
        for field, kind in _hints(hint).items():
            yield from _fields(f"{name}_{field}", kind)
    elif hint is not type(None):
        yield name, _kind(hint)


def _kind(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        (some,) = (x for x in get_args(hint) if x is not type(None))
        return f"{_kind(some)}?"
    return "str" if get_origin(hint) is Literal else _KINDS[hint]


def _depth(hint: Any) -> int:
    """Return 0 for a value, 1 for a record of values, more for records of records."""
    if not _is_record(hint):
        return 0
    return 1 + max(map(_depth, _hints(hint).values()))


def reader(hint: Any, start: int = 0) -> Callable[[Sequence[Any]], Any]:
    """Return a function that rebuilds a value of this type from `flat` fields, from `start` on."""
    if not _is_record(hint):
        return lambda fields: fields[start]
    kinds = list(_hints(hint).values())
    if _depth(hint) == 1:
        stop = start + len(kinds)
        return lambda fields: hint(*fields[start:stop])
    readers = _readers(kinds, start)
    return lambda fields: hint(*[read(fields) for read in readers])


def _readers(hints: Iterable[Any], start: int = 0) -> list[Callable[[Sequence[Any]], Any]]:
    """Return the readers for values of these types, one after the other."""
    readers = []
    for hint in hints:
        readers.append(reader(hint, start))
        start += sum(1 for _ in _fields("", hint))
    return readers


def flat(record: Iterable[Any]) -> list[Any]:
    """Return the fields of a record, in which nested records are replaced by their fields."""
    fields: list[Any] = []
    for x in record:
        if isinstance(x, tuple):
            fields.extend(flat(x))
        else:
            fields.append(x)
    return fields


# Declaration


def _declare(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gspo_ops::{name}", fake, lib=LIBRARY)
    if "(a!)" not in schema:  # not possible if an argument changes: see `refuse_graph`
        # otherwise, the operator would be treated as a constant, with a warning at most
        torch.library.register_autograd(f"gspo_ops::{name}", _refuse_derivative, lib=LIBRARY)
    name, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.gspo_ops, name), overload or "default")


def _mapped(f: Callable[[Any], Any], fields: Iterable[Any], places: list[int]) -> list[Any]:
    """Return the fields, with f(x) for each x in these places that is not None."""
    return [f(x) if i in places and x is not None else x for i, x in enumerate(fields)]


def _is_variable(x: float | None) -> bool:
    """Return whether torch.compile traces this number for all of its values."""
    from torch.fx.experimental import symbolic_shapes

    # an older torch does not know, and compiles each value
    has_static_value = getattr(symbolic_shapes, "has_static_value", None)
    return x is not None and has_static_value is not None and not has_static_value(x)


def scalar(
    x: float, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Tensor:
    """Return x as a 0-dim tensor that stays a variable in torch.compile, unlike torch.full's."""
    return torch.ones((), dtype=dtype, device=device) * x


# Second derivatives


def _refuse_derivative(ctx: object, *grads: Tensor) -> None:
    raise NotImplementedError("gspo_ops does not support second derivatives (double backward)")


def refuse_graph() -> None:
    """Refuse a backward under create_graph=True where an operator cannot do so itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _refuse_derivative(None)


def graph_is_kept() -> bool:
    """Return whether the current backward may run again, so that saved tensors must not change."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return True
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return query is None or query()
