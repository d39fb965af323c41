"""Attention over a latent as a part of a layer in one call: projections, cache and all between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels_cpu import checks, native
from quire.kernels_cpu.heads import bind_cache, check_norms, check_products, is_known

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from quire.kernels_cpu.linear import PackedWeights

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu


class FusedLatent:
    """The kernels of attention over a latent that all heads share, in their order.

    kv_down [R + P, H]; q_up [Hq (plain + P), Q], where Q is H, or what q_down [Q, H] gives, which
    q_norm [Q] normalises; kv_norm [R]; key_up [Hq, R, plain] and value_up [Hq, value, R], dense in
    one of their last two dimensions; output [H, Hq value]. 2 `num_pairs` is P.
    Raises: ValueError, TypeError for weights that do not fit each other.
    """

    __slots__ = (
        "_cache", "_dtype", "_kept", "_rank", "_width", "handle", "hidden_size", "num_angles",
    )  # fmt: skip

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        q_down: PackedWeights | None,
        q_norm: Tensor | None,
        q_up: PackedWeights,
        kv_down: PackedWeights,
        kv_norm: Tensor,
        key_up: Tensor,
        value_up: Tensor,
        output: PackedWeights,
        num_pairs: int,
        eps: float,
        scale: float,
        is_interleaved: bool,
    ) -> None:
        native.require_native()
        heads, rank, plain = key_up.shape
        value_size = value_up.shape[1]
        self.hidden_size, self.num_angles = kv_down.num_inputs, num_pairs
        self._dtype, self._rank, self._width = dtype, rank, rank + 2 * num_pairs
        if (q_down is None) != (q_norm is None):
            raise ValueError("q_down and q_norm come together")
        num_queries = self.hidden_size if q_down is None else q_down.num_outputs
        check_products(
            q_down=(q_down, num_queries, self.hidden_size),
            q_up=(q_up, heads * (plain + 2 * num_pairs), num_queries),
            kv_down=(kv_down, self._width, self.hidden_size),
            output=(output, self.hidden_size, heads * value_size),
        )
        check_norms(dtype, (q_norm, kv_norm), (num_queries, rank))
        checks.check_shape("value_up", value_up, (heads, value_size, rank))
        for name, weight in (("key_up", key_up), ("value_up", value_up)):
            if weight.dtype is not dtype or not weight.is_cpu:
                raise TypeError(f"{name} is {weight.dtype}, expected {dtype} on the CPU")
        self._cache: tuple[Tensor | None, ...] = ()
        self._kept = (q_down, q_norm, q_up, kv_down, kv_norm, key_up, value_up, output)
        self.handle = _cpu.LatentAttention(
            checks.dtype_code(dtype),
            None if q_down is None else q_down.handle,
            q_up.handle,
            kv_down.handle,
            output.handle,
            (checks.address_of(q_norm), checks.address_of(kv_norm)),
            (key_up.data_ptr(), rank, plain, *key_up.stride()),
            (value_up.data_ptr(), value_size, rank, *value_up.stride()),
            (dtype.itemsize, heads, 1, self._width, rank, 0, 0, num_pairs),
            eps,
            scale,
            is_interleaved,
        )

    @property
    def row_kind(self) -> tuple[int, torch.dtype]:
        """Hidden size and dtype of the rows that it takes."""
        return self.hidden_size, self._dtype

    def bind(self, cache: Mapping[str, Tensor]) -> None:
        """Where latents go: k [N, B, 1, R + P], for int8 its `k_scale` [N, B, 1].

        A cache is checked when it first comes. Raises: ValueError, TypeError.
        """
        tensors = (cache["k"], cache.get("k_scale"))
        if is_known(self._cache, tensors):
            return
        latent, scale = cache["k"], tensors[1]
        shape = (*latent.shape[:2], 1)
        bind_cache(
            self.handle,
            self._dtype,
            (latent, latent[..., : self._rank]),
            (scale, scale),
            ((*shape, self._width), (*shape, self._rank)),
        )
        self._cache = tensors
