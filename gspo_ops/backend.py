"""The choice between Triton and torch for each op, dtypes, and how products are rounded."""

from __future__ import annotations

import contextlib
import importlib.util
import os

import torch
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it only once, too


def use_triton(x: Tensor) -> bool:
    """Return whether Triton runs an op: on a GPU or in its interpreter, except in float64."""
    return x.dtype != torch.float64 and (x.is_cuda or IS_INTERPRETED)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of all per-row values: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# queried on import, because torch.compile cannot trace the query
CPU_HAS_BF16: bool = (
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


def has_bf16(device: torch.device) -> bool:
    """Return whether products of bfloat16 are fast on the device.

    A CPU without instructions for them takes 50 times as long as for float32.
    """
    if device.type == "cpu":
        return CPU_HAS_BF16
    return torch.cuda.is_bf16_supported(including_emulation=False)


def device_exists(name: str) -> bool:
    """Return whether a name is that of the CPU or of a GPU that this machine has."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return False
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    return device.type == "cpu"


def has_tma(device: torch.device, is_capped: bool) -> bool:
    """Return whether a GPU has TMA and enough shared memory, and this Triton can use it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    # sm_120 has less than half of the shared memory that tiles take; an epilogue with a soft cap
    # does not compile for sm_100 with Triton 3.6, and spills with 3.7
    able = (9,) if is_capped else (9, 10)
    is_able = torch.cuda.get_device_capability(device)[0] in able
    return is_able and importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def device_guard(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which kernels are launched on the tensor's device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def loadable(mask: Tensor) -> Tensor:
    """Return a contiguous mask with a dtype that a kernel can load."""
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context without the caller's autocast, which is a setting of this thread alone."""
    return torch.autocast(device.type, enabled=False)


def rounds_fp32(device: torch.device) -> bool:
    """Return whether the process lets float32 products be rounded, e.g. to TF32 or bfloat16.

    These settings belong to the process: they are read, and left unchanged.
    """
    is_cpu = device.type == "cpu"
    backend = torch.backends.mkldnn if is_cpu else torch.backends.cuda
    # torch >= 2.9
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:
        older = torch.get_float32_matmul_precision()
        precision = {"high": "tf32", "medium": "bf16"}.get(older, "ieee")
        if not is_cpu:
            return precision != "ieee"  # "medium" also rounds to TF32
    if not is_cpu:
        return precision == "tf32"
    # a CPU rounds only where it has instructions for that
    return (precision == "bf16" and has_bf16(device)) or (
        precision == "tf32" and getattr(torch.cpu, "_is_amx_fp16_supported", lambda: True)()
    )


def matmul_fp32(a: Tensor, b: Tensor, *, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Return a @ b, multiplied exactly and summed in fp32 (in float64 for float64).

    Settings that allow rounding have no effect. The product is written to `out`, of any dtype, or
    added to it.
    """
    if a.dtype.itemsize == 2:
        return _matmul_narrow(a, b, out, add)
    is_rounded = a.dtype == torch.float32 and rounds_fp32(a.device)
    if out is not None and out.dtype == a.dtype and not is_rounded:
        return out.addmm_(a, b, beta=int(add))
    exact = torch.float64 if is_rounded else a.dtype  # products of float64 are not rounded
    return _put(torch.mm(a.to(exact), b.to(exact)).to(a.dtype), out, add)


def _matmul_narrow(a: Tensor, b: Tensor, out: Tensor | None, add: bool) -> Tensor:
    # on a GPU, sums with a 16-bit result may be accumulated in 16 bits
    if out is not None and out.dtype == a.dtype and not a.is_cuda:
        return out.addmm_(a, b, beta=int(add))
    if not _has_fp32_products(a):
        return matmul_fp32(a.float(), b.float(), out=out, add=add)
    if out is not None and out.dtype == torch.float32 and not add:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return _put(torch.mm(a, b, out_dtype=torch.float32), out, add)


def _put(product: Tensor, out: Tensor | None, add: bool) -> Tensor:
    if out is None:
        return product
    return out.add_(product) if add else out.copy_(product)


def _has_fp32_products(x: Tensor) -> bool:
    """Return whether torch multiplies this 16-bit dtype to fp32, and no setting coarsens sums."""
    if not x.is_cuda or not hasattr(torch.ops.aten.mm, "dtype"):  # torch >= 2.8
        return False
    return x.dtype == torch.bfloat16 or not getattr(
        torch.backends.cuda.matmul, "allow_fp16_accumulation", False
    )
