"""Routing Replay: reuse the experts chosen in one forward in another.

    routing = RoutingReplay()
    with torch.no_grad(), routing.record(model):
        old_log_probs = ...            # one forward
    with routing.replay(model):
        loss(...).backward()           # the same tokens; backward inside, for checkpointing

Only the indices are replayed. A router of transformers computes scores, takes the top k of them
and turns their values into weights. Its own code runs here too, but `topk` returns the recorded
indices and the live values at them. The weights and their gradients are therefore those of the live
router, and replaying the native routing changes nothing. This works for any model whose routers
choose by one `topk`: Qwen3-MoE, Qwen2-MoE, Mixtral, OLMoE, gpt-oss, Granite-MoE, MiniMax and others
of that form.

According to the GSPO paper (arXiv 2507.18071, section 5.3), GRPO needs Routing Replay on MoE models
and GSPO does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_OURS = "_gspo_ops_routing"  # marks a wrapped router


class RoutingReplay:
    """The experts of one forward, recorded to be replayed in others.

    Attributes:
        indices: (tokens, k) experts chosen by each router, in the model's order; -1 where a token
            is routed natively.
    """

    def __init__(self) -> None:
        self.indices: list[Tensor] = []

    @contextmanager
    def record(self, model: nn.Module) -> Iterator[RoutingReplay]:
        """Record the experts chosen in the one forward that runs inside.

        Args:
            model: a model with routers.

        Raises:
            ValueError: the model has no routers, or routing has already been recorded.
            RuntimeError: not exactly one forward ran.
        """
        if self.indices:
            raise ValueError("already recorded: make one RoutingReplay per forward")
        routers = find_routers(model)
        found: list[Tensor | None] = [None] * len(routers)

        def choose(layer: int, scores: Tensor, native: Tensor) -> Tensor:
            if found[layer] is not None:
                raise RuntimeError(f"router {layer} ran twice: record one forward, under no_grad")
            found[layer] = native.detach().clone()
            return native

        with _wrapped(routers, choose):
            yield self
        missing = [layer for layer, indices in enumerate(found) if indices is None]
        if missing:
            raise RuntimeError(f"routers {missing} of {len(routers)} did not run while recording")
        self.indices = [indices for indices in found if indices is not None]

    @contextmanager
    def replay(self, model: nn.Module) -> Iterator[None]:
        """Choose the recorded experts in the forward that runs inside, and in its recomputations.

        With gradient checkpointing, the backward must run inside as well.

        Args:
            model: the model that was recorded, or one of the same form.

        Raises:
            ValueError: nothing is recorded, or the recording does not fit the model or its input.
            RuntimeError: a router did not run.
        """
        if not self.indices:
            raise ValueError("nothing is recorded to replay")
        routers = find_routers(model)
        if len(routers) != len(self.indices):
            raise ValueError(
                f"{len(self.indices)} routers were recorded, but the model has {len(routers)}"
            )
        largest = [int(x.max()) if x.numel() else -1 for x in self.indices]
        ran = [False] * len(routers)

        def choose(layer: int, scores: Tensor, native: Tensor) -> Tensor:
            recorded = self.indices[layer]
            if recorded.shape != native.shape:
                raise ValueError(
                    f"router {layer} was recorded for (tokens, k) = {tuple(recorded.shape)}, got "
                    f"{tuple(native.shape)}"
                )
            if largest[layer] >= scores.shape[-1]:
                raise ValueError(
                    f"router {layer} has {scores.shape[-1]} experts, but expert {largest[layer]} "
                    "was recorded"
                )
            ran[layer] = True
            return torch.where(recorded < 0, native, recorded)

        with _wrapped(routers, choose):
            yield
        if not all(ran):
            missing = [layer for layer, yes in enumerate(ran) if not yes]
            raise RuntimeError(f"routers {missing} of {len(routers)} did not run while replaying")

    def route_natively(self, where: Tensor) -> None:
        """Forget the experts of some tokens, such as padding or tool output.

        Args:
            where: bool, one per token of the recorded forward, in any shape.

        Raises:
            ValueError: a different number of tokens was recorded.
        """
        flat = where.reshape(-1)
        for indices in self.indices:
            if len(flat) != len(indices):
                raise ValueError(f"where has {len(flat)} tokens, but {len(indices)} were recorded")
            indices[flat] = -1


def expert_churn(before: RoutingReplay, after: RoutingReplay, mask: Tensor | None = None) -> float:
    """Return the fraction, over tokens and routers, of chosen experts that are no longer chosen.

    Args:
        before: routing of some tokens.
        after: routing of the same tokens.
        mask: bool, one per token, True for the tokens that count; None for all.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: the two do not have the same shape.
    """
    if [x.shape for x in before.indices] != [x.shape for x in after.indices]:
        raise ValueError("before and after must be routings of the same tokens by the same model")
    gone = []
    for old, new in zip(before.indices, after.indices, strict=True):
        is_gone = (old[:, :, None] != new[:, None, :]).all(2)
        gone.append(is_gone if mask is None else is_gone[mask.reshape(-1)])
    return torch.stack(gone).double().mean().item()


def find_routers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that choose experts by a top k, in the model's order.

    Raises:
        ValueError: there are none.
    """
    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    if not routers:
        raise ValueError(
            f"{type(model).__name__} has no router that Routing Replay supports: it needs a "
            "mixture-of-experts model of transformers with a ...TopKRouter"
        )
    return routers


class _Choose(Protocol):
    def __call__(self, layer: int, scores: Tensor, native: Tensor) -> Tensor:
        """Return (tokens, k) experts, given the scores and the router's own choice."""


class _TopK(TorchFunctionMode):
    """A mode in which `topk` returns indices from elsewhere, and its input's values at them."""

    def __init__(self, layer: int, choose: _Choose) -> None:
        super().__init__()
        self.layer, self.choose = layer, choose
        self.calls = 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return found
        self.calls += 1
        scores = args[0] if args else (kwargs or {})["input"]
        indices = self.choose(layer=self.layer, scores=scores, native=found.indices)
        return type(found)((scores.gather(-1, indices), indices))


@contextmanager
def _wrapped(routers: list[nn.Module], choose: _Choose) -> Iterator[None]:
    """Wrap the routers' forwards to use `choose`; restore them afterwards in any case."""
    if any(_OURS in vars(router) for router in routers):
        raise RuntimeError("the model's routing is already being recorded or replayed")
    try:
        for layer, router in enumerate(routers):
            _wrap(router, layer, choose)
        yield
    finally:
        for router in routers:
            vars(router).pop(_OURS, None)
            vars(router).pop("forward", None)


def _wrap(router: nn.Module, layer: int, choose: _Choose) -> None:
    native = router.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _TopK(layer, choose) as mode:
            out = native(*args, **kwargs)
        if mode.calls != 1:
            raise ValueError(
                f"{type(router).__name__} called topk {mode.calls} times, not once: Routing Replay "
                "does not support it"
            )
        return out

    router.forward = forward  # type: ignore[method-assign]
    setattr(router, _OURS, True)
