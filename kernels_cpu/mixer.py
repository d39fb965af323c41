"""A mixer of Mamba or Mamba-2 in one call: projections, convolution, scan and gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels_cpu import checks, native

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from quire.kernels_cpu.linear import PackedWeights

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu


class Pieces:
    """Pieces of a step that do not wait for one another, and where their states lie.

    Piece s is rows [begins[s], ends[s]) of the flat batch, int32 [S]; it starts from the state in
    block sources[s], from zeros where that is negative, and leaves its last in targets[s],
    int64 [S]. Keeps them alive. Raises: ValueError, TypeError.
    """

    __slots__ = ("_kept", "addresses")

    def __init__(self, begins: Tensor, ends: Tensor, sources: Tensor, targets: Tensor) -> None:
        count = len(begins)
        for name, tensor, dtype in (
            ("begins", begins, "int32"),
            ("ends", ends, "int32"),
            ("sources", sources, "int64"),
            ("targets", targets, "int64"),
        ):
            checks.check_list(name, tensor, dtype, count)
        self._kept = (begins, ends, sources, targets)
        self.addresses = (*(tensor.data_ptr() for tensor in self._kept), count)


class FusedMixer:
    """The kernels of a mixer's operators in their order.

    Mamba (`x_proj`, `dt_proj` given): in_proj [2C, H] gives channels and gates, the convolution
    covers C channels; a float32 [C, N]; d, dt_bias float32 [C]; `inner_norms` of time steps [R], B
    and C [N]. Mamba-2: in_proj [2C + 2GN + M, H] gives gates, what is convolved, and time steps; a,
    d, dt_bias float32 [M]; `norm` [C] over each of G groups. conv [C, W] and conv_bias as in
    `causal_conv1d`. Raises: ValueError, TypeError for weights that do not fit each other.
    """

    __slots__ = (
        "_dtype", "_handle", "_hidden_size", "_kept", "_output_size", "_page_shapes",
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
        self._handle = _cpu.FusedMixer(
            checks.dtype_code(dtype),
            in_proj.handle,
            out_proj.handle,
            None if x_proj is None else x_proj.handle,
            None if dt_proj is None else dt_proj.handle,
            [address_of(tensor) for tensor in tensors],
            (element_size, inner, convolved, taps, state_size, steps, num_groups),
            eps,
            is_norm_first,
        )
        self._kept = (tensors, in_proj, out_proj, x_proj, dt_proj)
        self._dtype = dtype
        self._hidden_size, self._output_size = in_proj.num_inputs, out_proj.num_outputs
        self._page_shapes = ((convolved, taps - 1), state)

    def run(self, x: Tensor, pages: tuple[Tensor, Tensor], rounds: Sequence[Pieces]) -> Tensor:
        """x [T, H] to [T, H]; overwrites the target blocks of the pages.

        x: dense rows. pages: inputs of the convolution [n, C, W - 1] of x's dtype, and states
        float32 [n, ...], dense but for their first dimension. Rounds follow one another, and rows
        of no piece are undefined. Raises: ValueError, TypeError, IndexError.
        """
        checks.check_contiguous(
            "x", x, str(self._dtype).removeprefix("torch."), (len(x), self._hidden_size)
        )
        where = check_pages(pages, self._page_shapes, self._dtype)
        out = x.new_empty((len(x), self._output_size))
        addresses = [pieces.addresses for pieces in rounds]
        self._handle.run(x.data_ptr(), out.data_ptr(), len(x), where, addresses)
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


def address_of(tensor: Tensor | None) -> int:
    """0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()
