"""Activation checkpointing that recomputes and differentiates live sequences only.

In the backward, transformers runs a checkpointed layer again on all of its input, although the
gradient of a clipped sequence is exactly zero. Here a layer runs again only on the sequences whose
upstream gradient is not zero: a fraction f of the recomputation and of the backward.

transformers is not imported.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .axes import PLAIN, UNKNOWN, KnownAxes, Place, Units, class_of, learn_axes, leaves_of
from .heads import unwrapped
from .surroundings import Surroundings

# How far rounding may move what a layer adds to its input when it runs on fewer sequences, for each
# itemsize: a squared L2 distance over the squared norm. Rounding may also change a token's experts.
_ROUNDING = {4: 1e-4, 2: 0.02}


def live_checkpointing(model: Any, *, strict: bool = True) -> None:
    """Checkpoint a model's layers, and recompute only the live sequences.

        time ~ (1 + 3 f) / 4 of ordinary checkpointing's

    A sequence is live if the gradient with respect to a layer's result is not zero at one of its
    tokens; f is the fraction of live sequences. Gradients are those of ordinary checkpointing, up
    to the rounding of products of other shapes. Sequences are the rows of a padded batch, or lie in
    one row, with `position_ids` that restart. The model itself shows on a few tokens how to split
    masks, positions and the other arguments of a layer. At a layer's first use, its result for the
    live sequences is compared with that for all of them.

    The function stays in place of transformers' own when checkpointing is disabled and enabled
    again. The backward takes one host synchronisation, and one more for each layer whose gradient
    does not come straight from the next layer.

    Args:
        model: a model of transformers, possibly wrapped by peft, DDP or FSDP2.
        strict: whether a layer that cannot be split is refused. Otherwise, it is checkpointed as
            transformers does it.

    Raises:
        ValueError: the model has no layers that transformers checkpoints; its sequences depend on
            one another (batch normalisation, experts with a capacity); or FSDP1 has sharded its
            weights. In a forward, a layer is given an argument that cannot be split, or has weights
            of ZeRO-3.
        RuntimeError: in the backward, a layer's result for some sequences differs from its result
            for all; or a second derivative is requested.
    """
    inner = unwrapped(model)
    layers = [part for part in inner.modules() if _is_checkpointed(part)]
    if not layers:
        raise ValueError(f"{type(inner).__name__} has no layers that transformers checkpoints")
    try:
        _require_independent(model, layers)
        live = _LiveCheckpointing(_learnt(inner, layers), strict)
        inner._set_gradient_checkpointing = MethodType(partial(_set, live), inner)
    except ValueError as error:
        if strict:
            raise ValueError(
                f"{type(inner).__name__} cannot be split into sequences: {error}"
            ) from error
    enable = getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _set(
    live: _LiveCheckpointing, model: Any, enable: bool = True,
    gradient_checkpointing_func: Callable[..., Any] = checkpoint, **options: Any,
) -> None:  # fmt: skip
    """Call transformers' `_set_gradient_checkpointing` with `live` as the checkpoint function."""
    live.ordinary = gradient_checkpointing_func
    type(model)._set_gradient_checkpointing(model, enable, live, **options)


def _is_checkpointed(module: nn.Module) -> bool:
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


def _require_independent(model: Any, layers: list[nn.Module]) -> None:
    for part in (part for layer in layers for part in layer.modules()):
        kind = type(part).__name__
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{kind} normalises over all of them")
        if any("capacity" in name for name in vars(part)):
            raise ValueError(f"the experts of {kind} have a capacity, which they share")
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules()):
        raise ValueError("FSDP1 has sharded the weights; use FSDP2")


def _learnt(model: Any, layers: list[nn.Module]) -> KnownAxes:
    try:
        return learn_axes(model, layers)
    except Exception as error:  # the model's code may raise anything
        raise ValueError(f"it fails on a few tokens: {error}") from error


class _LiveCheckpointing:
    """The function that transformers calls in place of `torch.utils.checkpoint.checkpoint`.

    Attributes:
        ordinary: the function that this one replaces.
        traced: layers found to have gradients only for their own arguments and parameters.
        tested: layers whose results for some sequences were found to equal those for all, with
            padded sequences (False) and with packed ones (True).
        uncut: layers that cannot be split, and are left to `ordinary`.
        last: the gradient that a layer returned last.
    """

    def __init__(self, axes: KnownAxes, strict: bool) -> None:
        self.axes, self.strict = axes, strict
        self.classes = {kind for kind, *_ in axes}
        self.ordinary: Callable[..., Any] = checkpoint
        self.traced: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.tested: dict[bool, weakref.WeakSet[nn.Module]] = {
            are_packed: weakref.WeakSet() for are_packed in (False, True)
        }
        self.uncut: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.last: _Gradient | None = None

    @torch.compiler.disable
    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        layer = getattr(function, "args", (None,))[0]
        if (
            not isinstance(function, partial)
            or not isinstance(layer, nn.Module)
            or class_of(layer) not in self.classes  # vision, for example
            or layer in self.uncut
            or _captures()
            or not torch.is_grad_enabled()
        ):
            return self.ordinary(function, *args)
        call = _Call(self, layer, function, args)
        if why := call.obstacle():
            self.refuse(layer, why, ValueError)
            return self.ordinary(function, *args)
        self.traced.add(layer)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        return call.result(_Function.apply(call, *call.tensors, *parameters))

    def refuse(self, layer: nn.Module, why: str, error: type[Exception]) -> None:
        """Raise; or, if not strict, leave the layer to the ordinary function from now on."""
        message = f"live sequences cannot be recomputed alone: {class_of(layer)} {why}"
        if self.strict:
            raise error(
                f"{message}; live_checkpointing(model, strict=False) recomputes all sequences"
            )
        if layer not in self.uncut:
            warnings.warn(f"{message}; all sequences are recomputed", stacklevel=2)
        self.uncut.add(layer)


def _captures() -> bool:
    """Return whether transformers captures results within layers, such as router logits.

    These would have no gradient, because a layer's first run makes no graph.
    """
    module = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(module, "_active_collector", None)
    return bool(((collector and collector.get()) or {}).keys() - {"hidden_states"})


class _Gradient(NamedTuple):
    """A gradient that a layer has returned.

    Attributes:
        tensor: a weak reference to it.
        version: its version at that time; a change in place would increase it.
        live: units in which it is not zero; None for all.
    """

    tensor: weakref.ref[Tensor]
    version: int
    live: Tensor | None

    def is_(self, x: Tensor | None) -> bool:
        return x is not None and self.tensor() is x and x._version == self.version


class _Function(torch.autograd.Function):
    """A call that makes no graph; the backward makes one, of the live sequences."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        given, ctx.parameters = inputs[: len(call.given)], inputs[len(call.given) :]
        ctx.call = call
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        outputs = call.first_run(given)
        ctx.mark_non_differentiable(*(x for x in outputs if not x.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "live_checkpointing does not support second derivatives (create_graph=True)"
            )
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=False)
        given = [x.detach().requires_grad_(is_needed) for x, is_needed in pairs]
        return None, *ctx.call.gradients(given, ctx.parameters, grads)


class _Call:
    """One call of a layer.

    Attributes:
        leaves: leaves of its arguments, None for tensors; `spec` is their structure.
        given: places of the tensors among the arguments, by their index in `leaves`.
        returned: the same for the results; those that are not tensors are in `others`.
        units: the units into which the batch is split.
    """

    def __init__(
        self, owner: _LiveCheckpointing, layer: nn.Module, function: partial[Any], args: tuple
    ) -> None:
        self.owner, self.layer = owner, layer
        self.function = partial(function.func, *function.args)
        found = leaves_of((args, function.keywords))
        self.spec = tree_flatten((args, function.keywords))[1]
        self.given = self._places(found)
        self.tensors = [found[i][1] for i in self.given]
        self.leaves = [None if i in self.given else x for i, (_, x) in enumerate(found)]
        self.units = Units.of(list(zip(self.given.values(), self.tensors, strict=True)))
        self.paths = [path for path, _ in found]

    def _places(self, leaves: list[tuple[str, Any]]) -> dict[int, Place]:
        """Return the places of the leaves that are tensors, by their index."""
        kind, axes = class_of(self.layer), self.owner.axes
        return {
            i: Place(path, axes.get((kind, path, x.ndim), UNKNOWN))
            for i, (path, x) in enumerate(leaves)
            if isinstance(x, Tensor)
        }

    def obstacle(self) -> str | None:
        """Return why the call cannot be split, if it cannot."""
        for path, x in zip(self.paths, self.leaves, strict=True):
            if not isinstance(x, PLAIN) and not (isinstance(x, Mapping) and not x):
                return f"is given {path}, a {type(x).__name__}, which cannot be split"
        for of, x in zip(self.given.values(), self.tensors, strict=True):
            if not self.units.fit(x, of):
                return f"is given {of.path} {tuple(x.shape)}, which cannot be split"
        return None if self.layer in self.owner.traced else self._foreign()

    def _foreign(self) -> str | None:
        """Return how the layer involves tensors that are not its own, which a trial run shows."""
        if any(hasattr(p, "ds_id") for p in self.layer.parameters()):
            return "has weights that ZeRO-3 has sharded"
        given = [x.detach().requires_grad_(x.requires_grad) for x in self.tensors]
        with torch.enable_grad(), Surroundings(given[0].device).again():
            outputs = self.run(given)
        for path, x in zip(self.paths, self.leaves, strict=True):
            if isinstance(x, Mapping) and x:
                return f"writes into {path}, a {type(x).__name__}, from which others may read"
        own = {id(x) for x in [*given, *self.layer.parameters()]}
        foreign = next((x for x in _variables(outputs) if id(x) not in own), None)
        if foreign is None:
            return None
        return f"has a gradient for a tensor {tuple(foreign.shape)} that is not its own"

    # Running it

    def run(self, given: Iterable[Tensor]) -> list[Tensor]:
        """Run the layer, and return the results that are tensors."""
        leaves = list(self.leaves)
        for i, x in zip(self.given, given, strict=True):
            leaves[i] = x
        args, keywords = tree_unflatten(leaves, self.spec)
        results = self.function(*args, **keywords)
        found = leaves_of({"output": results})
        self.returned, self.results_spec = self._places(found), tree_flatten(results)[1]
        self.others = [None if i in self.returned else x for i, (_, x) in enumerate(found)]
        return [found[i][1] for i in self.returned]

    def first_run(self, given: tuple[Tensor, ...]) -> list[Tensor]:
        self.tensors = []  # autograd keeps them
        self.surroundings = Surroundings(given[0].device)
        with self.surroundings.recorded():
            outputs = self.run(given)
        places = self.returned.values()
        self.is_cut = all(map(self.units.fit, outputs, places))
        is_tested = self.layer in self.owner.tested[self.units.are_packed]
        self.outputs = [] if is_tested else [x.detach() for x in outputs]
        return outputs

    def result(self, outputs: tuple[Tensor, ...]) -> Any:
        """Rebuild the layer's own result from these tensors."""
        leaves = list(self.others)
        for i, x in zip(self.returned, outputs, strict=True):
            leaves[i] = x
        return tree_unflatten(leaves, self.results_spec)

    # Its gradients

    def gradients(
        self, given: list[Tensor], parameters: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
    ) -> list[Tensor | None]:  # fmt: skip
        """Return gradients with respect to arguments and parameters, given those of the results."""
        live = self._live(grads)
        if live is None:
            found = self._whole(given, parameters, grads)
        elif len(live):
            found = self._part(given, parameters, grads, live)
        else:
            inputs = [*given, *parameters]
            found = [torch.zeros_like(x) if x.requires_grad else None for x in inputs]
        first = found[0]
        if first is not None:
            self.owner.last = _Gradient(weakref.ref(first), first._version, live)
        return found

    def _live(self, grads: tuple[Tensor | None, ...]) -> Tensor | None:
        """Return the units whose sequence has a gradient; None for all."""
        if not self.is_cut or self.layer in self.owner.uncut:
            return None
        places = self.returned.values()
        found = [(x, of) for x, of in zip(grads, places, strict=True) if x is not None]
        last = self.owner.last
        if last is not None and len(found) == 1 and last.is_(found[0][0]):
            return last.live
        is_live = torch.stack([self.units.are_live(x, of) for x, of in found]).any(0)
        live = is_live.nonzero().squeeze(1)
        return None if len(live) == len(is_live) else live

    def _whole(
        self, given: list[Tensor], parameters: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
    ) -> list[Tensor | None]:  # fmt: skip
        with torch.enable_grad(), self.surroundings.again():
            outputs = self.run(given)
        return _gradients(outputs, [*given, *parameters], grads)

    def _part(
        self, given: list[Tensor], parameters: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...], live: Tensor,
    ) -> list[Tensor | None]:  # fmt: skip
        """Compute the gradients from the live units alone."""

        def take(x: Tensor | None, of: Place) -> Tensor | None:
            return None if x is None else self.units.take(x, of, live)

        places = list(self.given.values())
        some = [
            self.units.take(x, of, live).detach().requires_grad_(x.requires_grad)
            for x, of in zip(given, places, strict=True)
        ]
        with torch.enable_grad(), self.surroundings.again(self.units, live) as replay:
            outputs = self.run(some)
        if not replay.is_same or not self._is_same(some, outputs, live):
            return self._whole(given, parameters, grads)
        some_grads = list(map(take, grads, self.returned.values()))
        found = _gradients(outputs, [*some, *parameters], some_grads)
        for i, (x, of) in enumerate(zip(given, places, strict=True)):
            if (part := found[i]) is not None:
                found[i] = self.units.put(part, of, live, x.shape)
        return found

    def _is_same(self, some: list[Tensor], outputs: list[Tensor], live: Tensor) -> bool:
        """Return whether the results equal those for all, up to rounding; test each layer once."""
        tested = self.owner.tested[self.units.are_packed]
        if self.layer in tested:
            return True
        for x, whole, of in zip(outputs, self.outputs, self.returned.values(), strict=True):
            is_narrow = self.surroundings.is_narrow()
            if not _is_close(x, self.units.take(whole, of, live), some[0], is_narrow):
                self.owner.refuse(
                    self.layer, "makes something else of them than of all sequences", RuntimeError
                )
                return False
        tested.add(self.layer)
        return True


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradient with respect to each input; None for an input that needs none."""
    both = zip(outputs, grads, strict=True)
    pairs = [(x, grad) for x, grad in both if grad is not None and x.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(
        [x for x, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True
    ))  # fmt: skip
    return [next(found) if x.requires_grad else None for x in inputs]


def _variables(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the leaves of the graph that made these tensors."""
    nodes = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        more = [x for x, _ in node.next_functions if x is not None and x not in seen]
        seen.update(more)
        nodes += more


def _is_close(x: Tensor, expected: Tensor, given: Tensor, is_narrow: bool) -> bool:
    """Return whether x is as expected, up to rounding of it and of what the layer has added."""
    if x.shape != expected.shape or not x.is_floating_point():
        return torch.equal(x, expected)
    eps, rounding = torch.finfo(x.dtype).eps, _ROUNDING[2 if is_narrow else min(x.itemsize, 4)]
    added = expected - given if expected.shape == given.shape else expected
    size = (eps * expected.double().norm()) ** 2 + rounding * added.double().norm() ** 2
    return bool((x - expected).double().norm() ** 2 <= size)
