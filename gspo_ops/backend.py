"""What runs where: Triton or torch, in which dtype, and with which rounding of products."""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton asks once, too


def use_triton(x: Tensor) -> bool:
    """Triton for GPU tensors, and for CPU tensors in its interpreter; float64 is left to torch."""
    return x.dtype != torch.float64 and (x.is_cuda or IS_INTERPRETED)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything per row: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# asked once: torch.compile can't trace the question
CPU_HAS_BF16: bool = (
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


def has_bf16(device: torch.device) -> bool:
    """Whether products of bfloat16 are fast there: a CPU without instructions for them takes 50
    times as long as for float32."""
    if device.type == "cpu":
        return CPU_HAS_BF16
    return torch.cuda.is_bf16_supported(including_emulation=False)


def device_guard(x: Tensor) -> contextlib.AbstractContextManager:
    """Make launches go to the tensor's device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def loadable(mask: Tensor) -> Tensor:
    """A contiguous mask whose dtype a kernel can load."""
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Keep the caller's autocast out; it belongs to the thread, so nobody else notices."""
    return torch.autocast(device.type, enabled=False)


def rounds_fp32(device: torch.device) -> bool:
    """Whether the process lets products of float32 be rounded there, as to TF32 or bfloat16.

    These settings belong to the process: they are read, and left as they are.
    """
    is_cpu = device.type == "cpu"
    backend = torch.backends.mkldnn if is_cpu else torch.backends.cuda
    # torch >= 2.9
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:
        older = torch.get_float32_matmul_precision()
        precision = {"high": "tf32", "medium": "bf16"}.get(older, "ieee")
    if not is_cpu:
        return precision == "tf32"
    # a CPU rounds where it has instructions for it
    return (precision == "bf16" and has_bf16(device)) or (
        precision == "tf32" and getattr(torch.cpu, "_is_amx_fp16_supported", lambda: True)()
    )


def matmul_fp32(a: Tensor, b: Tensor, *, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a @ b, multiplied exactly and added up in fp32 (float64 for float64), whatever is allowed.

    The product goes to `out`, of any dtype, or is added to it.
    """
    dtype = compute_dtype(a.dtype)
    is_rounded = dtype == torch.float32 and rounds_fp32(a.device)
    is_narrow = a.dtype.itemsize == 2
    # on a GPU, sums that end in 16 bits may be made in them
    is_direct = not a.is_cuda if is_narrow else not is_rounded
    if out is not None and out.dtype == a.dtype and is_direct:
        return out.addmm_(a, b, beta=int(add))
    if is_narrow and _has_fp32_products(a):
        product = torch.mm(a, b, out_dtype=torch.float32)
    else:
        exact = torch.float64 if is_rounded else dtype  # which nobody rounds
        product = torch.mm(a.to(exact), b.to(exact)).to(dtype)
    if out is None:
        return product
    return out.add_(product) if add else out.copy_(product)


def _has_fp32_products(x: Tensor) -> bool:
    """Whether torch multiplies this 16-bit dtype to fp32, and no setting makes the sums coarser."""
    if not x.is_cuda or not hasattr(torch.ops.aten.mm, "dtype"):  # torch >= 2.8
        return False
    return x.dtype == torch.bfloat16 or not getattr(
        torch.backends.cuda.matmul, "allow_fp16_accumulation", False
    )
