"""A mixer of Mamba or Mamba-2 in one call: projections, convolution, scan and gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels_cpu import checks, native
from quire.kernels_cpu.heads import is_known

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from quire.kernels_cpu.linear import PackedWeights
    from quire.kernels_cpu.step import Rounds

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu


class FusedMixer:
    """The kernels of a mixer's operators in their order.

    Mamba (`x_proj`, `dt_proj` given): in_proj [2C, H] gives channels and gates, the convolution
    covers C channels; a float32 [C, N]; d, dt_bias float32 [C]; `inner_norms` of time steps [R], B
    and C [N]. Mamba-2: in_proj [2C + 2GN + M, H] gives gates, what is convolved, and time steps; a,
    d, dt_bias float32 [M]; `norm` [C] over each of G groups. conv [C, W] and conv_bias as in
    `causal_conv1d`. Raises: ValueError, TypeError for weights that do not fit each other.
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
        d: Tensor,
        dt_bias: Tensor,
        state_size: int,
        num_groups: int = 1,
        x_proj: PackedWeights | None = None,
        dt_proj: PackedWeights | None = None,
        norm: Tensor | None = None,
        inner_norms: tuple[Tensor, Tensor, Tensor] | None = None,
        eps: float = 1e-5,
        is_norm_first: bool = False,
    ) -> None:
        native.require_native()
        inner, (convolved, taps) = out_proj.num_inputs, conv.shape
        steps = len(dt_bias) if dt_proj is None else dt_proj.num_inputs
        state: tuple[int, ...] = (inner, state_size)
        if x_proj is None:
            state = (steps, inner // steps, state_size)
        _check_products(in_proj, x_proj, dt_proj, inner, convolved, steps, state_size)
        small = (steps, state_size, state_size)
        tensors = (
            checked("conv", conv, dtype, (convolved, taps)),
            checked("conv_bias", conv_bias, dtype, (convolved,)),
            checked("a", a, dt_bias.dtype, state if x_proj is not None else (steps,)),
            checked("d", d, dt_bias.dtype, (len(dt_bias),)),
            dt_bias,
            checked("norm", norm, dtype, (inner,)),
            *(
                checked(f"inner_norms[{i}]", one, dtype, (small[i],))
                for i, one in enumerate(inner_norms or (None, None, None))
            ),
        )
        checks.check_list("dt_bias", dt_bias, "float32")
        element_size = conv.element_size()
        self.handle = _cpu.FusedMixer(
            checks.dtype_code(dtype),
            in_proj.handle,
            out_proj.handle,
            None if x_proj is None else x_proj.handle,
            None if dt_proj is None else dt_proj.handle,
            [checks.address_of(tensor) for tensor in tensors],
            (element_size, inner, convolved, taps, state_size, steps, num_groups),
            eps,
            is_norm_first,
        )
        self._kept = (tensors, in_proj, out_proj, x_proj, dt_proj)
        self._dtype = dtype
        self.hidden_size, self._output_size = in_proj.num_inputs, out_proj.num_outputs
        self.num_angles = 0
        self._pages: tuple[Tensor, ...] = ()
        self._page_shapes = ((convolved, taps - 1), state)

    @property
    def row_kind(self) -> tuple[int, torch.dtype]:
        """Hidden size and dtype of the rows that it takes."""
        return self.hidden_size, self._dtype

    def bind(self, cache: Mapping[str, Tensor]) -> None:
        """Where states lie, as `bind_pages` has them: `conv` and `state`."""
        self.bind_pages((cache["conv"], cache["state"]))

    def bind_pages(self, pages: tuple[Tensor, Tensor]) -> None:
        """Where states lie: the convolution's inputs [n, C, W - 1] of x's dtype, states in float32.

        Both are dense but for their first dimension, and checked when they first come.
        Raises: ValueError, TypeError.
        """
        if not is_known(self._pages, pages):
            self.handle.bind_pages(check_pages(pages, self._page_shapes, self._dtype))
            self._pages = pages

    def run(self, x: Tensor, pages: tuple[Tensor, Tensor], rounds: Rounds) -> Tensor:
        """x [T, H] to [T, H]; overwrites the target blocks of the pages.

        x: dense rows, as many as `rounds` has tokens. pages: see `bind`.
        Raises: ValueError, TypeError, IndexError.
        """
        checks.check_contiguous(
            "x", x, str(self._dtype).removeprefix("torch."), (rounds.num_tokens, self.hidden_size)
        )
        self.bind_pages(pages)
        out = x.new_empty((len(x), self._output_size))
        self.handle.run(x.data_ptr(), out.data_ptr(), rounds.handle)
        return out


def _check_products(
    in_proj: PackedWeights,
    x_proj: PackedWeights | None,
    dt_proj: PackedWeights | None,
    inner: int,
    convolved: int,
    steps: int,
    state_size: int,
) -> None:
    if (x_proj is None) != (dt_proj is None):
        raise ValueError("x_proj and dt_proj come together")
    expected = {"in_proj": (in_proj.num_outputs, inner + convolved + steps)}
    if x_proj is not None and dt_proj is not None:
        expected = {
            "in_proj": (in_proj.num_outputs, 2 * inner),
            "x_proj": (x_proj.num_outputs, steps + 2 * state_size),
            "inputs of x_proj": (x_proj.num_inputs, inner),
            "dt_proj": (dt_proj.num_outputs, inner),
            "the convolution": (convolved, inner),
        }
    for name, (have, want) in expected.items():
        if have != want:
            raise ValueError(f"{name} has the size {have}, expected {want}")


def check_pages(
    pages: tuple[Tensor, Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> tuple[int, int, int, int, int]:
    """Inputs of the convolution, of `dtype`, and states: addresses, blocks, strides of both.

    Raises: ValueError, TypeError.
    """
    for name, page, shape in zip(("conv", "states"), pages, shapes, strict=True):
        checks.check_shape(name, page, (len(pages[0]), *shape))
        if not page.is_contiguous() and not page[0].is_contiguous():
            raise ValueError(f"{name}: each block is to be dense (strides {page.stride()})")
    if pages[0].dtype != dtype or str(pages[1].dtype) != "torch.float32":
        raise TypeError(f"pages of {pages[0].dtype} and {pages[1].dtype}")
    conv, states = pages
    return conv.data_ptr(), states.data_ptr(), len(conv), conv.stride(0), states.stride(0)


def checked(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor | None:
    """The tensor, contiguous and of this shape and dtype. Raises: ValueError, TypeError."""
    if tensor is not None:
        checks.check_contiguous(name, tensor, str(dtype).removeprefix("torch."), shape)
    return tensor
