"""Attention as a part of a layer in one call: projections, cache and all between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.kernels_cpu import checks, native
from quire.kernels_cpu.attention import check_scales, stored_as

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from quire.kernels_cpu.linear import PackedWeights

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu


class FusedHeads:
    """The kernels of attention with keys and values of its own heads, in their order.

    qkv [(Hq + 2 Hk) D, H], with gates [(2 Hq + 2 Hk) D, H]; output [H, Hq D]. norms: of queries, of
    keys [D], or over all heads; of both after the rotation [D]. `num_pairs` of each head are
    rotated. With `has_factors`, factors [T, 1] come in the place of angles. sinks float32 [Hq].
    Raises: ValueError, TypeError for weights that do not fit each other.
    """

    __slots__ = (
        "_cache", "_dtype", "_head_size", "_kept", "_num_kv_heads", "handle", "hidden_size",
        "num_angles",
    )  # fmt: skip

    def __init__(
        self,
        dtype: torch.dtype,
        qkv: PackedWeights,
        output: PackedWeights,
        norms: Sequence[Tensor | None],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        num_pairs: int,
        eps: float,
        scale: float,
        is_interleaved: bool,
        window: int = 0,
        chunk: int = 0,
        soft_cap: float = 0.0,
        sinks: Tensor | None = None,
        is_norm_joint: bool = False,
        has_factors: bool = False,
        has_gates: bool = False,
    ) -> None:
        native.require_native()
        num_stacked = (2 if has_gates else 1) * num_heads + 2 * num_kv_heads
        self.hidden_size = qkv.num_inputs
        check_products(
            qkv=(qkv, num_stacked * head_size, self.hidden_size),
            output=(output, self.hidden_size, num_heads * head_size),
        )
        each = 0 if is_norm_joint else head_size
        widths = (each or num_heads * head_size, each or num_kv_heads * head_size, head_size)
        check_norms(dtype, norms, widths)
        if sinks is not None:
            checks.check_list("sinks", sinks, "float32", num_heads)
        if 2 * num_pairs > head_size:
            raise ValueError(f"{num_pairs} pairs do not fit into heads of {head_size} features")
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} heads cannot share {num_kv_heads} key heads evenly")
        if has_factors and num_pairs:
            raise ValueError("a layer has factors or angles, not both")
        self.num_angles = 1 if has_factors else num_pairs
        self._dtype, self._num_kv_heads, self._head_size = dtype, num_kv_heads, head_size
        self._cache: tuple[Tensor | None, ...] = ()
        self._kept = (qkv, output, tuple(norms), sinks)
        self.handle = _cpu.HeadAttention(
            checks.dtype_code(dtype),
            qkv.handle,
            output.handle,
            [checks.address_of(norm) for norm in norms],
            checks.address_of(sinks),
            (
                dtype.itemsize, num_heads, num_kv_heads, head_size, head_size, window, chunk,
                num_pairs,
            ),
            eps,
            scale,
            soft_cap,
            (is_interleaved, is_norm_joint, has_factors, has_gates),
        )  # fmt: skip

    @property
    def row_kind(self) -> tuple[int, torch.dtype]:
        """Hidden size and dtype of the rows that it takes."""
        return self.hidden_size, self._dtype

    def bind(self, cache: Mapping[str, Tensor]) -> None:
        """Where keys and values go: k, v [N, B, Hk, D], for int8 `k_scale`, `v_scale` [N, B, Hk].

        A cache is checked when it first comes. Raises: ValueError, TypeError.
        """
        names = ("k", "v", "k_scale", "v_scale")
        tensors = tuple(cache.get(name) for name in names)
        if is_known(self._cache, tensors):
            return
        k, v = cache["k"], cache["v"]
        shape = (*k.shape[:2], self._num_kv_heads, self._head_size)
        bind_cache(self.handle, self._dtype, (k, v), (tensors[2], tensors[3]), (shape, shape))
        self._cache = tensors


def bind_cache(
    handle: Any,
    dtype: torch.dtype,
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    """Keys and values [N, B, heads, size] of attention that computes in `dtype`.

    Raises: ValueError, TypeError.
    """
    k, v = caches
    stored = stored_as(dtype, k.dtype)
    strides = [checks.check_dense("cache", cache, k.dtype, 4) for cache in caches]
    for name, cache, scale, shape in zip(("k", "v"), caches, scales, shapes, strict=True):
        checks.check_shape(f"{name}_cache", cache, shape)
        if k.data_ptr() != v.data_ptr() or name == "k":
            check_scales(f"{name}_scales", scale, cache, stored)
    handle.bind_cache(
        stored,
        k.data_ptr(),
        v.data_ptr(),
        checks.address_of(scales[0]),
        checks.address_of(scales[1]),
        (k.shape[0], k.shape[1]),
        (*strides[0][:3], *strides[1][:3]),
    )


def is_known(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> bool:
    """Whether the tensors are the very same."""
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))


def check_products(**products: tuple[PackedWeights | None, int, int]) -> None:
    """Raises: ValueError if one has not so many outputs and inputs; None is left out."""
    for name, (linear, num_outputs, num_inputs) in products.items():
        if linear is not None and (linear.num_outputs, linear.num_inputs) != (
            num_outputs,
            num_inputs,
        ):
            raise ValueError(
                f"{name} is [{linear.num_outputs}, {linear.num_inputs}], "
                f"expected [{num_outputs}, {num_inputs}]"
            )


def check_norms(dtype: torch.dtype, norms: Sequence[Tensor | None], widths: Sequence[int]) -> None:
    """Raises: ValueError, TypeError if one is there and is not [width] of the dtype."""
    if len(norms) != len(widths):
        raise ValueError(f"{len(widths)} norms are expected, not {len(norms)}")
    for index, (norm, width) in enumerate(zip(norms, widths, strict=True)):
        if norm is not None:
            checks.check_dense(f"norms[{index}]", norm, dtype, 1)
            checks.check_shape(f"norms[{index}]", norm, (width,))
