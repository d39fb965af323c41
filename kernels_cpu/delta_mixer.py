"""A mixer of a gated delta net in one call: projections, convolution, delta rule and gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels_cpu import checks, native
from quire.kernels_cpu.heads import is_known
from quire.kernels_cpu.mixer import check_pages, checked

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from quire.kernels_cpu.linear import PackedWeights
    from quire.kernels_cpu.step import Rounds

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu


class FusedDelta:
    """The kernels of a mixer's operators in their order.

    in_proj [2GD + 2MDv + 2M, H] gives what is convolved, gates, betas and time steps; conv and
    conv_bias as in `causal_conv1d`; a, dt_bias float32 [M]; norm float32 [Dv]; out_proj [H, M Dv].
    Raises: ValueError, TypeError for weights that do not fit each other.
    """

    __slots__ = (
        "_dtype", "_kept", "_output_size", "_page_shapes", "_pages", "handle", "hidden_size",
        "num_angles",
    )  # fmt: skip

    def __init__(
        self,
        dtype: torch.dtype,
        in_proj: PackedWeights,
        out_proj: PackedWeights,
        *,
        conv: Tensor,
        conv_bias: Tensor | None,
        a: Tensor,
        dt_bias: Tensor,
        norm: Tensor,
        key_size: int,
        eps: float,
    ) -> None:
        native.require_native()
        heads, v_size, (convolved, taps) = len(a), len(norm), conv.shape
        num_keys, rest = divmod(convolved - heads * v_size, 2 * key_size)
        if rest or num_keys < 1 or heads % num_keys:
            raise ValueError(
                f"{convolved} channels are not queries and keys of {key_size} for {heads} values "
                f"of {v_size}"
            )
        sizes = {
            "in_proj": (in_proj.num_outputs, convolved + heads * (v_size + 2)),
            "inputs of out_proj": (out_proj.num_inputs, heads * v_size),
        }
        for name, (have, want) in sizes.items():
            if have != want:
                raise ValueError(f"{name} has the size {have}, expected {want}")
        tensors = (
            checked("conv", conv, dtype, (convolved, taps)),
            checked("conv_bias", conv_bias, dtype, (convolved,)),
            checked("a", a, dt_bias.dtype, (heads,)),
            checked("dt_bias", dt_bias, norm.dtype, (heads,)),
            norm,
        )
        checks.check_list("norm", norm, "float32")
        self.handle = _cpu.FusedDelta(
            checks.dtype_code(dtype),
            in_proj.handle,
            out_proj.handle,
            [checks.address_of(tensor) for tensor in tensors],
            (conv.element_size(), num_keys, key_size, heads, v_size, taps),
            eps,
        )
        self._kept = (tensors, in_proj, out_proj)
        self._dtype = dtype
        self.hidden_size, self._output_size = in_proj.num_inputs, out_proj.num_outputs
        self.num_angles = 0
        self._pages: tuple[Tensor, ...] = ()
        self._page_shapes = ((convolved, taps - 1), (heads, key_size, v_size))

    @property
    def row_kind(self) -> tuple[int, torch.dtype]:
        """Hidden size and dtype of the rows that it takes."""
        return self.hidden_size, self._dtype

    def bind(self, cache: Mapping[str, Tensor]) -> None:
        """Where states lie, as `bind_pages` has them: `conv` and `state`."""
        self.bind_pages((cache["conv"], cache["state"]))

    def bind_pages(self, pages: tuple[Tensor, Tensor]) -> None:
        """As `FusedMixer.bind`."""
        if not is_known(self._pages, pages):
            self.handle.bind_pages(check_pages(pages, self._page_shapes, self._dtype))
            self._pages = pages

    def run(self, x: Tensor, pages: tuple[Tensor, Tensor], rounds: Rounds) -> Tensor:
        """As `FusedMixer.run`."""
        checks.check_contiguous(
            "x", x, str(self._dtype).removeprefix("torch."), (rounds.num_tokens, self.hidden_size)
        )
        self.bind_pages(pages)
        out = x.new_empty((len(x), self._output_size))
        self.handle.run(x.data_ptr(), out.data_ptr(), rounds.handle)
        return out
