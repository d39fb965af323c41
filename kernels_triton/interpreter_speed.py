"""Makes Triton's interpreter cheaper without making it say less, for tests.

Most of its time goes into the objects around its numbers. What is replaced here gives the same
answers by shorter ways: the check for overflows of integers, types of arrays, types of blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_WIDEST = 64


def install(interpreter: Any) -> None:
    """Replaces what is slow in Triton's `runtime.interpreter`; for once a process."""
    _check_overflows_at_once()
    _patch_language_once(interpreter)
    _remember_array_types(interpreter)
    _remember_block_types()


def _check_overflows_at_once() -> None:
    """One operation in 64 bits instead of a dozen of the interpreter's own."""
    from triton.language.semantic import TritonSemantic

    def check(self: Any, a: Any, b: Any, operation: Any) -> None:
        scalar = a.type.scalar
        if scalar.int_bitwidth >= _WIDEST or not self.builder.options.sanitize_overflow:
            return
        compute = _OPERATIONS[operation.__name__]
        wide = compute(a.handle.data.astype(np.int64), b.handle.data.astype(np.int64))
        low, high = int(wide.min()), int(wide.max())
        if low < scalar.get_int_min_value() or high > scalar.get_int_max_value():
            raise OverflowError(
                f"{scalar} overflows in {operation.__name__}: results lie in {low} to {high}"
            )

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _patch_language_once(interpreter: Any) -> None:
    """Leaves Triton's language interpreted: undoing that at each launch is a third of its cost."""
    import triton.language as tl

    patch, seen = interpreter._patch_lang, set()  # noqa: SLF001
    scope = getattr(interpreter, "_LangPatchScope", None)
    if scope is None:  # older versions of Triton have no way to leave it
        return
    languages, functions = (tl, tl.core), set()

    def patch_lang(function: Any) -> Any:
        if function in functions:
            return scope()
        functions.add(function)
        names = frozenset(
            name
            for name, value in function.__globals__.items()
            if any(value is language for language in languages)
        )
        if names not in seen:
            seen.add(names)
            patch(function)
        return scope()

    interpreter._patch_lang = patch_lang  # noqa: SLF001


def _remember_array_types(interpreter: Any) -> None:
    find = interpreter._get_np_dtype  # noqa: SLF001
    known: dict[str, npt.DTypeLike] = {}

    def get_np_dtype(dtype: Any) -> npt.DTypeLike:
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    interpreter._get_np_dtype = get_np_dtype  # noqa: SLF001


def _remember_block_types() -> None:
    """A block's type is made anew for each value; what it says follows from element and shape."""
    import triton.language as tl

    make = tl.core.block_type.__init__
    known: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def remember(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = (getattr(size, "value", size) for size in shape)
        key = (element_ty.name, tuple(sizes))
        if key not in known:
            make(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key], element_ty=element_ty)

    tl.core.block_type.__init__ = remember
