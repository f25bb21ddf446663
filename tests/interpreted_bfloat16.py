"""Makes Triton's interpreter right in bfloat16, so that the kernels' own dtype is checked without a GPU.

It keeps bfloat16 as 16-bit integers: its casts lose carries and NaN, and its products and sums are of integers. Here
casts round to the nearest, ties to even, products are of the numbers, and arithmetic in bfloat16, which no kernel of
ours does, is an error instead of a wrong number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy
import torch

from xclip_fast.ops import _backends


def to_float32(bits: Any) -> Any:
    """bfloat16 as uint16, of any shape, to float32."""
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def to_bfloat16(numbers: Any) -> Any:
    """float32 to the nearest bfloat16 as uint16, ties to even; a NaN stays one."""
    bits = numpy.ascontiguousarray(numbers).view(numpy.uint32).astype(numpy.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return numpy.where(numpy.isnan(numbers), 0x7FC0, rounded).astype(numpy.uint16)


@contextmanager
def interpreted_bfloat16() -> Iterator[None]:
    """Inside, the interpreter computes bfloat16 rightly, and the kernels serve it; on a GPU nothing changes."""
    if torch.cuda.is_available():
        yield
        return

    import triton.language as tl
    from triton.runtime import interpreter

    builder, reduce, handle = interpreter.InterpreterBuilder, interpreter.ReduceOps, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def is_bfloat16(x: Any) -> bool:
        return x.dtype.scalar == tl.bfloat16

    def wide(x: Any) -> Any:
        return handle(to_float32(x.data), tl.float32) if is_bfloat16(x) else x

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return cast(self, wide(source), target)
        if is_bfloat16(source):
            return source
        exact = source if source.dtype.scalar == tl.float32 else cast(self, source, tl.float32)
        return handle(to_bfloat16(exact.data), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    def refusing(function: Any, *harmless: Any) -> Any:
        def refuse(self: Any, *operands: Any) -> Any:
            tensors = operands[0] if isinstance(operands[0], tuple) else operands
            if operands[-1] not in harmless and any(is_bfloat16(x) for x in tensors if hasattr(x, "dtype")):
                raise AssertionError(f"{function.__name__}: a kernel computes in bfloat16")
            return function(self, *operands)

        return refuse

    arithmetic = {
        "binary_op": refusing(builder.binary_op),
        "unary_op": refusing(builder.unary_op),
        "ternary_op": refusing(builder.ternary_op, numpy.where),
        "create_fma": refusing(builder.create_fma),
    }
    dtypes = (*_backends.INTERPRETED_DTYPES, torch.bfloat16)
    with (
        patch.multiple(builder, cast_impl=cast_impl, create_dot=create_dot, **arithmetic),
        patch.object(reduce, "apply_impl", refusing(reduce.apply_impl)),
        patch.object(_backends, "INTERPRETED_DTYPES", dtypes),
    ):
        yield
