"""A causal language model's own forward up to its head, and the head as the ops need it.

The model runs as its user calls it, inside its wrappers. During a call, only its last layer is
replaced, by one that takes the hidden states and makes no logits. How the model transforms logits
is not read from its config, where names differ, but learnt from the model itself: it is given known
logits, and a few real ones, which the head must reproduce.

Neither transformers nor peft is imported.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..head import LoRA

Result = TypeVar("Result")

# logits that a model is given: 0, one that a cap hardly changes, usual ones, one it caps fully
_PROBES = (0.0, 2.0**-20, -1.0, 2.0, -8.0, 30.0, -100.0, 2.0**15)
_TOKENS = 8  # the number of tokens on which a head is compared with its model
_OF_TEXT = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache",
    "output_router_logits",
}  # fmt: skip
_COLUMNS = 1024  # the number of tokens of the vocabulary, evenly spread, that are compared
_INSTEAD = "use the ops from logits for it"  # the end of an error's message


class Transform(NamedTuple):
    """How a model transforms its logits: limit * tanh(gain * z / limit), or gain * z.

    Attributes:
        gain: factor of the logits, or the product of several factors.
        limit: soft cap, after all factors; None without one.
        columns: number of tokens of the vocabulary that remain; a head may have more rows.
    """

    gain: float
    limit: float | None
    columns: int

    def __call__(self, z: Tensor) -> Tensor:
        z = self.gain * z
        return z if self.limit is None else self.limit * (z / self.limit).tanh()


class OutputHead(NamedTuple):
    """logits = transform(hidden @ weight^T + bias + lora).

    Attributes:
        weight: (V, H), possibly tied to the embeddings.
        bias: (V,) or None.
        lora: an adapter of peft on the head, or None.
        transform: scale and soft cap, as in Cohere and Gemma.
    """

    weight: Tensor
    bias: Tensor | None
    lora: LoRA | None
    transform: Transform

    def options(self, temperature: float) -> dict[str, Any]:
        """Return the head's part of the options of the ops from hidden states.

        The op computes softcap * tanh(z / softcap) / temperature, so a gain divides both options.
        """
        gain, limit, _ = self.transform
        return {
            "bias": self.bias, "lora": self.lora, "temperature": temperature / gain,
            "softcap": None if limit is None else limit / gain,
        }  # fmt: skip

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits (..., V) in fp32, or in float64 for float64.

        A bf16 head would round them, which alone moves a sequence's ratio by the width of GSPO's
        clip range.
        """
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        bias = None if self.bias is None else self.bias.to(hidden)
        z = nn.functional.linear(hidden, self.weight.to(hidden), bias)
        if self.lora is not None:
            a, b, scale = self.lora
            z = z + scale * (hidden @ a.to(hidden).mT @ b.to(hidden).mT)
        return self.transform(z)


def output_head(model: Any) -> OutputHead:
    """Return the head of a causal language model, wrapped or not.

    The first call for a model runs it on a few tokens; the result is kept.

    Args:
        model: a causal language model of transformers.

    Raises:
        ValueError: the model has no head, or one that the ops cannot apply.
    """
    inner = unwrapped(model)
    if inner not in _transforms:
        ids = torch.arange(_TOKENS, device=_device(inner))
        learn(model, {"input_ids": ids[None]}, check=True)
    return _head(inner, _transforms[inner])


def hidden_to(
    model: Any,
    batch: Mapping[str, Any],
    function: Callable[[OutputHead, Tensor, Any], Result],
    check: bool = True,
    *,
    within: Callable[..., Any] | None = None,
) -> Result:
    """Return function(head, hidden, output) as the result of the model's forward.

    DDP, FSDP, DeepSpeed, peft and torch.compile work as in any forward: they gather weights, reduce
    gradients, and add trained prompts and adapters.

    Args:
        model: a causal language model of transformers, wrapped or not.
        batch: arguments of its forward, with `input_ids` (B, S).
        function: function of the head, its hidden states (B, S, H) (more than S if a wrapper
            prepends tokens), and the model's output, without logits.
        check: whether the head's logits are compared with the model's own, before the first use.
        within: the model's own forward, if it is called by a forward that replaces it.

    Raises:
        ValueError: the ops cannot apply the model's head, or a wrapper prevents it, such as
            torch.compile with fullgraph=True.
    """
    inner = unwrapped(model)
    if inner not in _transforms:
        learn(model, batch, check, within=within)
    last = last_layer(inner)

    def finish(hidden: Tensor, output: Any) -> Result:
        head = partial(_head, inner, _transforms[inner])
        return _at_head(last, lambda: function(head(), hidden, output))

    return _seam(inner, last).run(model, batch, finish, within)


class _Tap(nn.Module):
    """A layer in a head's place, which keeps the hidden states and returns one 0 per token."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        vars(self)["head"] = head  # not as a submodule
        self.calls = 0
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["head"], name)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self.calls += 1
        self.hidden = hidden
        return hidden.new_zeros(1).expand(*hidden.shape[:-1], 1)


class _Probe(_Tap):
    """A tap that returns logits of the first row's last tokens and then `_PROBES`, in float64."""

    is_real = True  # whether the former are computed

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        nothing = super().forward(hidden)
        if hidden.ndim != 3:  # refused once the model is done
            return nothing
        head = vars(self)["head"]
        probes = torch.tensor(_PROBES, dtype=torch.float64, device=hidden.device)[:, None]
        if not self.is_real:  # within the head, where its weight is whole
            return _at_head(head, lambda: probes.expand(-1, len(_weights(head)[0])))[None]
        real = head(hidden[:1, -_TOKENS:])[0].double()
        return torch.cat([real, probes.expand(-1, real.shape[-1])])[None]


class _Seam:
    """A model's forward with another layer in its head's place, and a function of hidden states.

    Each model keeps one, so that torch.compile compiles the forward once.
    """

    def __init__(self, model: Any, last: nn.Module, tap: _Tap) -> None:
        self.name, self.last, self.tap = type(model).__name__, last, tap
        modules = model.named_modules(remove_duplicate=False)
        self.places = [name for name, part in modules if part is last]
        self.finish: Callable[[Tensor, Any], Any] | None = None
        self.own: Callable[..., Any] | None = None
        self.end = torch.compiler.disable(self._end)

    def run(
        self,
        wrapped: Any,
        batch: Mapping[str, Any],
        finish: Callable[[Tensor, Any], Result],
        within: Callable[..., Any] | None,
    ) -> Result:
        """Return finish(hidden, output) as the result of the model's forward, via its wrappers."""
        model, arguments = unwrapped(wrapped), dict(batch)
        if arguments.get("adapter_names") is not None and _base(self.last) is not self.last:
            raise ValueError(
                f"the head of {type(model).__name__} has adapters of peft, and adapter_names gives "
                "each row its own, which the ops cannot apply"
            )
        self.own, self.finish = within or model.forward, finish
        parameters = inspect.signature(self.own).parameters.values()
        if any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters):
            arguments = {"use_cache": False} | arguments
        was, own = vars(model).get("forward"), model.forward
        # while a prompt is disabled, peft has the model's forward in place of its own
        by_wrappers = [part for part in _around(wrapped) if vars(part).get("forward") == own]
        self._put(model, self.tap)
        for part in (model, *by_wrappers):
            part.forward = self._forward
        try:
            result = wrapped(**arguments) if within is None else self._forward(**arguments)
            if self.finish is not None:
                raise ValueError(
                    f"{type(wrapped).__name__} kept the forward that {type(model).__name__} had "
                    "when it was wrapped, so that the ops cannot apply its head"
                )
            return result
        except torch._dynamo.exc.Unsupported as error:
            raise ValueError(
                f"{type(model).__name__} is compiled with fullgraph=True, but the ops run between "
                "its graph and the wrappers around it: leave fullgraph out"
            ) from error
        finally:
            self._put(model, self.last)
            for part in by_wrappers:
                part.forward = own
            del model.forward
            if was is not None:
                model.forward = was
            self.own = self.finish = self.tap.hidden = None
            self.tap.calls = 0

    def _put(self, model: nn.Module, part: nn.Module) -> None:
        for place in self.places:
            parent, _, name = place.rpartition(".")
            model.get_submodule(parent)._modules[name] = part

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.own is not None
        return self.end(self.own(*args, **kwargs))

    def _end(self, output: Any) -> Any:
        hidden = self.tap.hidden
        if self.tap.calls != 1 or hidden is None or hidden.ndim != 3:
            raise ValueError(
                f"{self.name} calls its head, {type(self.last).__name__}, {self.tap.calls} times, "
                f"last with {None if hidden is None else tuple(hidden.shape)}, where the ops need "
                f"hidden states (B, S, H), once: {_INSTEAD}"
            )
        finish, self.finish = self.finish, None
        assert finish is not None
        return finish(hidden, output)


_transforms: weakref.WeakKeyDictionary[nn.Module, Transform] = weakref.WeakKeyDictionary()
_seams: weakref.WeakKeyDictionary[nn.Module, _Seam] = weakref.WeakKeyDictionary()


# Learning how a model transforms its logits


def learn(
    model: Any,
    batch: Mapping[str, Any],
    check: bool,
    *,
    within: Callable[..., Any] | None = None,
) -> None:
    """Learn how the model transforms its logits, unless this is known.

    A batch of text is cut to a few tokens. Other batches, with images for example, are used in
    full, since it is unknown which part belongs to a token.

    Raises:
        ValueError: the ops cannot apply the transform.
    """
    inner = unwrapped(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(inner).__name__} has a decoder, whose logits are not those of input_ids: "
            f"{_INSTEAD}"
        )
    last = last_layer(inner)
    probe = _Probe(last)
    probe.is_real = check
    if _is_text(batch):
        batch = {"input_ids": batch["input_ids"][:1, -_TOKENS:]}
    found: list[Transform] = []

    def finish(hidden: Tensor, output: Any) -> Tensor:
        logits = output.logits if hasattr(output, "logits") else output[0]
        transform = _fitted(inner, logits[0, -len(_PROBES) :])
        if check:
            _at_head(last, lambda: _compare(inner, transform, hidden, logits[0]))
        found.append(transform)
        return logits

    device = _device(inner)
    with (
        torch.no_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),  # dropout draws
        torch.compiler.set_stance("force_eager"),
    ):
        _Seam(inner, last, probe).run(model, batch, finish, within)
    _transforms[inner] = found[0]


def _is_text(batch: Mapping[str, Any]) -> bool:
    positions = batch.get("position_ids")
    # models for images have positions of several axes, and may need them
    return batch.keys() <= _OF_TEXT and (positions is None or positions.ndim < 3)


def _fitted(model: Any, logits: Tensor) -> Transform:
    """Return the transform that has these values at `_PROBES`."""
    name = type(model).__name__
    values = logits.double()
    of_columns = values[:, 0]
    if not torch.equal(values, of_columns[:, None].expand_as(values)):
        raise ValueError(
            f"{name} treats the logits of some tokens differently from others': {_INSTEAD}"
        )
    gain = (of_columns[1] / _PROBES[1]).item()
    top = of_columns[-1].item()
    limit = top if abs(top) < 0.5 * abs(gain) * _PROBES[-1] else None
    transform = Transform(gain, limit, values.shape[1])
    expected = transform(torch.tensor(_PROBES, dtype=torch.float64, device=values.device))
    error = (of_columns - expected).abs() / (1.0 + expected.abs())
    if not gain > 0 or not error.max() <= 1e-6:
        raise ValueError(
            f"{name} applies neither a scale nor a soft cap to its logits: at "
            f"{list(_PROBES)} they become {of_columns.tolist()}: {_INSTEAD}"
        )
    return transform


def _compare(model: Any, transform: Transform, hidden: Tensor, logits: Tensor) -> None:
    """Refuse a model whose own logits of these hidden states are not the head's."""
    head = _head(model, transform)
    columns = torch.linspace(0, len(head.weight) - 1, _COLUMNS, device=hidden.device).long()
    some = head._replace(
        weight=head.weight[columns],
        bias=None if head.bias is None else head.bias[columns],
        lora=None if head.lora is None else head.lora._replace(b=head.lora.b[columns]),
    )
    hidden = hidden[0, -_TOKENS:]
    expected = some.logits(hidden.double())
    got = logits[: len(hidden), columns].double()
    difference = (got - expected).abs().max().item()
    # the model computes products in its own dtype, and rounds to it
    size = hidden.double().norm(dim=1).max() * some.weight.double().norm(dim=1).max()
    narrow = (
        torch.get_autocast_dtype(hidden.device.type)
        if torch.is_autocast_enabled(hidden.device.type)
        else head.weight.dtype
    )
    allowed = 8 * torch.finfo(narrow).eps * expected.abs().max() + 1e-6 * transform.gain * size
    if not difference <= allowed.item():
        raise ValueError(
            f"the logits of {type(model).__name__} differ by {difference:.3g} from those that its "
            f"head's weight and bias give for its hidden states: {_INSTEAD}"
        )


# The model and its parts


def unwrapped(model: Any) -> Any:
    """Return the model of transformers inside torch.compile, DDP, FSDP, DeepSpeed and peft."""
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def _inside(wrapper: Any) -> Any:
    """Return the module that a module wraps, or None."""
    parts = getattr(wrapper, "_modules", {})
    inside = {"_orig_mod", "module", "_fsdp_wrapped_module"} & parts.keys()
    if inside:
        return parts[inside.pop()]
    return wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else None  # peft


def _around(model: Any) -> Iterator[Any]:
    """Yield the wrappers of a model, from the outermost in."""
    while (inside := _inside(model)) is not None:
        yield model
        model = inside


def last_layer(model: Any) -> Any:
    """Return the layer that makes logits.

    Raises:
        ValueError: there is none, or the ops cannot apply it.
    """
    name = type(model).__name__
    # the model's own, or else that of a model in it, as in some that see images
    parts = model.modules() if isinstance(model, nn.Module) else ()
    found = (getattr(part, "get_output_embeddings", lambda: None)() for part in parts)
    last = next((layer for layer in found if layer is not None), None)
    last = vars(last)["head"] if isinstance(last, _Tap) else last
    if not hasattr(last, "forward"):
        raise ValueError(f"{name} has no output embeddings, which make logits: {_INSTEAD}")
    weight = getattr(_base(last), "weight", None)
    if weight is None or weight.ndim not in (1, 2):  # 1: with ZeRO-3, before it is gathered
        raise ValueError(
            f"the head of {name}, {type(last).__name__}, has no weight (V, H): {_INSTEAD}"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"the head of {name}, {type(last).__name__}, is quantised to {weight.dtype}: leave it "
            "out of the quantisation (llm_int8_skip_modules)"
        )
    return last


def _layer(last: Any) -> Any:
    """Return the layer that does a head's work, where peft may have replaced or wrapped it."""
    last = unwrapped(last)  # FSDP1 may have wrapped it on its own
    if hasattr(last, "modules_to_save") and hasattr(last, "original_module"):
        name = next(iter(last.active_adapters), None)
        is_saved = not last.disable_adapters and name in last.modules_to_save
        last = last.modules_to_save[name] if is_saved else last.original_module
    return getattr(last, "token_adapter", last)  # with trainable_token_indices


def _base(last: Any) -> Any:
    """Return the layer itself, without peft's adapters."""
    layer = _layer(last)
    return getattr(layer, "base_layer", layer)


def _kind(layer: Any) -> str:
    """Return the name of a peft layer's class, also if FSDP2 has derived one from it, or ''."""
    names = (f"{kind.__module__}.{kind.__name__}" for kind in type(layer).__mro__)
    return next((name for name in names if name.startswith("peft.tuners.")), "")


def _active(layer: Any) -> list[str]:
    """Return the adapters that a peft layer's forward applies; merged ones are in its weight."""
    if not _kind(layer):
        return []
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its forward does, which the tap replaces
    return [] if layer.disable_adapters or layer.merged else list(layer.active_adapters)


def _weights(last: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a head, without LoRA."""
    layer, base = _layer(last), _base(last)
    names = _active(layer)
    if names and hasattr(layer, "get_merged_weights"):  # trained tokens; peft adds no bias to them
        return layer.get_merged_weights(names), None
    return base.weight, getattr(base, "bias", None)


def _head(model: Any, transform: Transform) -> OutputHead:
    last = last_layer(model)
    weight, bias = _weights(last)
    lora = _lora(model, _layer(last))
    if transform.columns < len(weight):
        weight = weight[: transform.columns]
        bias = None if bias is None else bias[: transform.columns]
        lora = None if lora is None else lora._replace(b=lora.b[: transform.columns])
    return OutputHead(weight, bias, lora, transform)


def _lora(model: Any, layer: Any) -> LoRA | None:
    """Return the active adapters of peft on the head, as one."""
    names = _active(layer)
    if not names or hasattr(layer, "get_merged_weights"):
        return None
    what = f"the head of {type(model).__name__} has an adapter of peft"
    # check the name, since layers of other kinds have a lora_A too
    if _kind(layer) != "peft.tuners.lora.layer.Linear":
        raise ValueError(f"{what}, {_kind(layer)}, which the ops cannot apply")
    names = [name for name in names if name in layer.lora_A]
    for name in names:
        variant = getattr(layer, "lora_variant", {}).get(name)
        dropout = layer.lora_dropout[name]
        # with FSDP1, frozen weights look trained where they are gathered with trained ones
        is_trained = layer.base_layer.weight.requires_grad
        for found, is_refused in (
            (f"of the kind {type(variant).__name__}", variant is not None),
            ("with a bias", getattr(layer, "lora_bias", {}).get(name, False)),
            ("on a weight that is trained too", is_trained),
            ("with dropout", dropout.training and getattr(dropout, "p", 0.0) > 0),
        ):
            if is_refused:
                raise ValueError(f"{what} {found}, which the ops cannot apply")
    a = [layer.lora_A[name].weight for name in names]
    b = [layer.lora_B[name].weight for name in names]
    scales = [layer.scaling[name] for name in names]
    if len(names) < 2:
        return LoRA(a[0], b[0], scales[0]) if names else None
    return LoRA(
        torch.cat(a), torch.cat([s * x for s, x in zip(scales, b, strict=True)], dim=1), 1.0
    )


def as_forward(module: Any, function: Callable[[], Result]) -> Result:
    """Run function() as the forward of a wrapped module, or directly for another.

    DDP, FSDP and DeepSpeed's ZeRO-3 gather weights and reduce gradients in hooks around it.
    """
    inner = getattr(module, "module", module)  # of DDP and FSDP1
    is_sharded = hasattr(module, "set_requires_gradient_sync")  # FSDP2, whose class is mixed in
    is_sharded = is_sharded or any(hasattr(p, "ds_id") for p in module.parameters())  # ZeRO-3
    if inner is module and not is_sharded:
        return function()
    own = vars(inner).get("forward")
    inner.forward = lambda *_, **__: function()
    try:
        return module()
    finally:
        del inner.forward
        if own is not None:
            inner.forward = own


def _at_head(last: Any, function: Callable[[], Result]) -> Result:
    """Run function() as the forward of a head and of its parts: ZeRO-3 gathers what each owns."""
    for part in reversed(list(dict.fromkeys([last, *_layer(last).modules()]))):
        function = partial(as_forward, part, function)
    return function()


def _seam(model: Any, last: nn.Module) -> _Seam:
    if model not in _seams or _seams[model].last is not last:
        _seams[model] = _Seam(model, last, _Tap(last))
    return _seams[model]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
