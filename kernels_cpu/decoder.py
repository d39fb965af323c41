"""Decoder layers in one call: attention and MLP around a residual, one layer after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire.kernels_cpu import checks, native
from quire.kernels_cpu.attention import check_scales, stored_as
from quire.kernels_cpu.elementwise import GATES
from quire.kernels_cpu.linear import PackedWeights
from quire.kernels_cpu.mixture import FusedMixture

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu


class Step:
    """What one step asks of every layer of a group: whose rows are whose, and where keys go.

    query_start_loc int32 [R + 1], seq_lens int32 [R], block_table int32 [R, max_blocks],
    slot_mapping int64 [T]: see `paged_attention` and `write_cache`. Keeps them alive.
    Raises: ValueError, TypeError.
    """

    __slots__ = ("_angles", "_kept", "_rotation", "handle", "num_tokens")

    def __init__(
        self, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, slot_mapping: Tensor
    ) -> None:
        native.require_native()
        num_requests, self.num_tokens = seq_lens.shape[0], slot_mapping.shape[0]
        checks.check_table("block_table", block_table)
        checks.check_list("seq_lens", seq_lens, "int32")
        checks.check_list("query_start_loc", query_start_loc, "int32", num_requests + 1)
        checks.check_list("slot_mapping", slot_mapping, "int64")
        if block_table.shape[0] < num_requests:
            raise ValueError(
                f"block_table has {block_table.shape[0]} rows for {num_requests} requests"
            )
        self._kept = (query_start_loc, seq_lens, block_table, slot_mapping)
        self._angles: tuple[Tensor, Tensor, int] | None = None
        self._rotation = (0, 0, 0, 0)
        self.handle = _cpu.Step(
            query_start_loc.data_ptr(),
            seq_lens.data_ptr(),
            block_table.data_ptr(),
            slot_mapping.data_ptr(),
            (num_requests, self.num_tokens, block_table.shape[1], block_table.stride(0)),
        )

    def rotation(self, cos: Tensor, sin: Tensor, head_size: int) -> tuple[int, int, int, int]:
        """Addresses and row strides of cosines and sines float32 [T, F], 2F <= head_size.

        Nearly all layers of a step bring the same ones, which are checked when they first come.
        Keeps them alive. Raises: ValueError, TypeError.
        """
        known = self._angles
        if known is None or known[0] is not cos or known[1] is not sin or known[2] != head_size:
            strides = checks.check_rotation(cos, sin, self.num_tokens, head_size)
            self._rotation = (cos.data_ptr(), sin.data_ptr(), *strides)
            self._angles = (cos, sin, head_size)
        return self._rotation


FusedMlp = tuple[PackedWeights, PackedWeights] | FusedMixture
"""Gate and up, stacked, and down; or a mixture of experts."""


class FusedDecoderLayer:
    """The kernels of a layer's operators in their order, for a `DecoderChain` to call.

    `linears`: query, key and value, stacked, and the output of the attention; `norms` [H] (the last
    two [D], or over all heads): after attention, before the MLP, after the MLP, of what follows, of
    queries, of keys; the second and the fourth are there, others may be None. `sinks` float32 [Hq];
    `gate` is that of an MLP which is no mixture.
    Raises: ValueError, TypeError for weights that do not fit each other.
    """

    __slots__ = (
        "_cache", "_dtype", "_head_size", "_hidden_size", "_kept", "_num_kv_heads", "_num_pairs",
        "handle",
    )  # fmt: skip

    def __init__(
        self,
        dtype: torch.dtype,
        linears: tuple[PackedWeights, PackedWeights],
        mlp: FusedMlp,
        norms: Sequence[Tensor | None],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        num_pairs: int,
        gate: str,
        eps: float,
        scale: float,
        is_interleaved: bool,
        window: int = 0,
        chunk: int = 0,
        soft_cap: float = 0.0,
        sinks: Tensor | None = None,
        is_norm_joint: bool = False,
    ) -> None:
        native.require_native()
        qkv, output = linears
        hidden_size = qkv.num_inputs
        _check_linears(linears, mlp, (num_heads, num_kv_heads, head_size))
        _check_mixture(mlp, dtype, hidden_size)
        norm_size = head_size if not is_norm_joint else 0
        widths = [hidden_size] * 4 + [norm_size or num_heads * head_size]
        _check_norms(dtype, norms, [*widths, norm_size or num_kv_heads * head_size])
        if sinks is not None:
            checks.check_list("sinks", sinks, "float32", num_heads)
        if gate not in GATES:
            raise ValueError(f"no gate named {gate!r}; there are {', '.join(GATES)}")
        if 2 * num_pairs > head_size:
            raise ValueError(f"{num_pairs} pairs do not fit into heads of {head_size} features")
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} heads cannot share {num_kv_heads} key heads evenly")
        self._dtype, self._hidden_size = dtype, hidden_size
        self._num_kv_heads, self._head_size, self._num_pairs = num_kv_heads, head_size, num_pairs
        self._cache: tuple[Tensor | None, ...] = ()
        self._kept = (linears, mlp, tuple(norms), sinks)
        gate_up, down, mixture = _handles(mlp)
        self.handle = _cpu.DecoderLayer(
            checks.dtype_code(dtype),
            dtype.itemsize,
            qkv.handle,
            output.handle,
            gate_up,
            down,
            mixture,
            [_address(norm) for norm in norms],
            _address(sinks),
            (hidden_size, num_heads, num_kv_heads, head_size, num_pairs, window, chunk),
            GATES[gate],
            eps,
            scale,
            soft_cap,
            is_interleaved,
            is_norm_joint,
        )

    @property
    def row_kind(self) -> tuple[int, torch.dtype]:
        """Hidden size and dtype of the rows that it takes."""
        return self._hidden_size, self._dtype

    def bind(self, cache: tuple[Tensor, Tensor, Tensor | None, Tensor | None]) -> None:
        """Where keys and values go: k, v [N, B, Hk, D], for int8 their scales float32 [N, B, Hk].

        A cache is checked when it first comes. Raises: ValueError, TypeError.
        """
        if len(self._cache) != 4 or any(
            ours is not theirs for ours, theirs in zip(self._cache, cache, strict=True)
        ):
            self._bind(*cache)

    def check_rows(self, num_tokens: int, **rows: Tensor) -> None:
        """Raises: ValueError, TypeError if one is not [num_tokens, H], contiguous, of the dtype."""
        shape = (num_tokens, self._hidden_size)
        for name, tensor in rows.items():
            if tensor.dtype is not self._dtype or not tensor.is_cpu:
                raise TypeError(f"{name} is {tensor.dtype}, expected {self._dtype} on the CPU")
            if tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(f"{name} {tuple(tensor.shape)}: expected contiguous {shape}")

    def rotation(self, step: Step, cos: Tensor, sin: Tensor) -> tuple[int, int, int, int]:
        """What the layer asks of the angles of a step. Raises: ValueError, TypeError."""
        if cos.shape[1] != self._num_pairs:
            raise ValueError(f"cos has {cos.shape[1]} pairs, expected {self._num_pairs}")
        return step.rotation(cos, sin, self._head_size)

    def _bind(self, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> None:
        stored = stored_as(self._dtype, k.dtype)
        k_strides = checks.check_dense("k_cache", k, k.dtype, 4)
        v_strides = checks.check_dense("v_cache", v, k.dtype, 4)
        num_blocks, block_size = k.shape[:2]
        shape = (num_blocks, block_size, self._num_kv_heads, self._head_size)
        for name, cached, scales in (("k", k, k_scales), ("v", v, v_scales)):
            checks.check_shape(f"{name}_cache", cached, shape)
            check_scales(f"{name}_scales", scales, cached, stored)
        self.handle.bind_cache(
            stored,
            k.data_ptr(),
            v.data_ptr(),
            _address(k_scales),
            _address(v_scales),
            (num_blocks, block_size),
            (*k_strides[:3], *v_strides[:3]),
        )
        self._cache = (k, v, k_scales, v_scales)


class DecoderChain:
    """Layers one after the other, in one call; bit for bit the result of their operators.

    groups, ropes: of each layer, which of the steps and of the angles of a call are its own.
    Raises: ValueError if the numbers of them differ, or the layers' hidden sizes do.
    """

    __slots__ = ("_handle", "_layers", "_of_rope")

    def __init__(
        self, layers: Sequence[FusedDecoderLayer], groups: Sequence[int], ropes: Sequence[int]
    ) -> None:
        native.require_native()
        if not layers or len({layer.row_kind for layer in layers}) != 1:
            raise ValueError("layers that follow each other have one hidden size and one dtype")
        self._layers = tuple(layers)
        self._of_rope = {rope: layer for layer, rope in zip(layers, ropes, strict=True)}
        handles = [layer.handle for layer in layers]
        self._handle = _cpu.DecoderChain(handles, list(groups), list(ropes))

    def bind(self, caches: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]) -> None:
        """The cache of each layer: see `FusedDecoderLayer.bind`."""
        for layer, cache in zip(self._layers, caches, strict=True):
            layer.bind(cache)

    def run(
        self,
        x: Tensor,
        residual: Tensor,
        angles: Sequence[tuple[Tensor, Tensor]],
        steps: Sequence[Step],
    ) -> None:
        """x [T, H], normalised, becomes the normalised input of what follows; adds to `residual`.

        x, residual contiguous; angles: (cos, sin) float32 [T, F] for each rope; steps: one for each
        group. The step's keys and values are written to the caches that were bound.
        Raises: ValueError, TypeError, IndexError.
        """
        first = self._layers[0]
        for step in steps:
            first.check_rows(step.num_tokens, x=x, residual=residual)
        rotations = [
            self._of_rope[rope].rotation(steps[0], *pair) if rope in self._of_rope else (0, 0, 0, 0)
            for rope, pair in enumerate(angles)
        ]
        handles = [step.handle for step in steps]
        self._handle.run(handles, x.data_ptr(), residual.data_ptr(), rotations)


def _handles(mlp: FusedMlp) -> tuple[Any, Any, Any]:
    """Of gate and up, of down, and of a mixture; None where there is none."""
    if isinstance(mlp, FusedMixture):
        return None, None, mlp.handle
    return mlp[0].handle, mlp[1].handle, None


def _check_mixture(mlp: FusedMlp, dtype: torch.dtype, hidden_size: int) -> None:
    if isinstance(mlp, FusedMixture) and mlp.dtype != dtype:
        raise TypeError(f"the mixture takes rows of {mlp.dtype}, the layer {dtype}")
    if isinstance(mlp, FusedMixture) and mlp.hidden_size != hidden_size:
        raise ValueError(f"the mixture takes rows of {mlp.hidden_size}, qkv of {hidden_size}")


def _check_linears(
    linears: tuple[PackedWeights, PackedWeights], mlp: FusedMlp, heads: tuple[int, int, int]
) -> None:
    qkv, output = linears
    num_heads, num_kv_heads, head_size = heads
    hidden_size = qkv.num_inputs
    expected = {
        "qkv": (qkv, (num_heads + 2 * num_kv_heads) * head_size, hidden_size),
        "output": (output, hidden_size, num_heads * head_size),
    }
    if not isinstance(mlp, FusedMixture):
        gate_up, down = mlp
        expected["gate_up"] = (gate_up, 2 * down.num_inputs, hidden_size)
        expected["down"] = (down, hidden_size, down.num_inputs)
    for name, (linear, num_outputs, num_inputs) in expected.items():
        if (linear.num_outputs, linear.num_inputs) != (num_outputs, num_inputs):
            raise ValueError(
                f"{name} is [{linear.num_outputs}, {linear.num_inputs}], "
                f"expected [{num_outputs}, {num_inputs}]"
            )


def _check_norms(dtype: torch.dtype, norms: Sequence[Tensor | None], widths: Sequence[int]) -> None:
    if len(norms) != len(widths) or norms[1] is None or norms[3] is None:
        raise ValueError("six norms are expected; the second and the fourth cannot be None")
    for index, (norm, width) in enumerate(zip(norms, widths, strict=True)):
        if norm is not None:
            checks.check_dense(f"norms[{index}]", norm, dtype, 1)
            checks.check_shape(f"norms[{index}]", norm, (width,))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
