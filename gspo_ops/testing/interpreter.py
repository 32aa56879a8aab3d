"""Triton's interpreter, made to compute as GPUs do."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace

import numpy as np


def patch_interpreter() -> None:
    """Make Triton's interpreter round and sum as GPUs do.

    Without this, it truncates float32 to bfloat16, and leaves `tl.dot` to NumPy's BLAS, which may
    round a row depending on its position. NumPy's warnings about NaN and infinity, which are
    ordinary values here, are silenced. Triton before 3.7 calls functions that NumPy 2.4 dropped.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    original = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(
        self: interpreter.InterpreterBuilder, src: interpreter.TensorHandle, dst_type: tl.dtype
    ) -> interpreter.TensorHandle:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return original(self, src, dst_type)
        bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16)
        return interpreter.TensorHandle(rounded, dst_type.scalar)

    @np.errstate(all="ignore")
    def create_dot(
        self: interpreter.InterpreterBuilder,
        a: interpreter.TensorHandle,
        b: interpreter.TensorHandle,
        d: interpreter.TensorHandle,
        input_precision: object,
        max_num_imprecise_acc: int,
    ) -> interpreter.TensorHandle:
        # the interpreter holds bfloat16 as its bits
        a, b = (original(self, x, d.dtype).data for x in (a, b))
        # every element is a sum over k from the first to the last
        product = np.einsum("mk,kn->mn", a, b)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    _hasten_interpreter()


def _hasten_interpreter() -> None:
    """Halve the interpreter's time.

    It patches the language anew for each launch and each call of a device function, makes a table
    of dtypes for each dtype, and computes overflows that it never reports.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    for_good = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: for_good
    # a scalar is an array of one element here, which NumPy 2.4 does not convert to a number
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())

    of_scalar = functools.cache(interpreter._get_np_dtype)
    pointer = np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda dtype: (
        pointer if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)
    )
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
