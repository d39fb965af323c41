"""Mixtures of experts: routing, grouped products, and projections of single heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels_cpu import checks, native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from quire.kernels_cpu.linear import PackedWeights

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu

_GATES = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "clamped_swiglu": 3}
_PANEL = 64


class PackedExpertWeights:
    """The experts of one layer in the order in which the kernels read them.

    The order is the same at every ISA level. Immutable; safe to use from several threads.
    """

    __slots__ = ("_kept", "dtype", "handle", "hidden_size", "num_experts", "size_bytes")

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        *,
        activation: str,
        alpha: float,
        limit: float,
    ) -> None:
        self.num_experts, self.hidden_size, inner_size = down.shape
        self.dtype = gate_up.dtype
        code = checks.dtype_code(gate_up.dtype)
        lanes = _lanes(code, gate_up), _lanes(code, down)
        biases = _biases(gate_up_bias), _biases(down_bias)
        # The handle holds addresses: these keep what lies there alive.
        self._kept = (*lanes, *biases)
        self.size_bytes = sum(tensor.nbytes for tensor in self._kept if tensor is not None)
        self.handle = _cpu.Experts(
            code,
            lanes[0].data_ptr(),
            checks.address_of(biases[0]),
            lanes[1].data_ptr(),
            checks.address_of(biases[1]),
            self.num_experts,
            self.hidden_size,
            inner_size,
            _GATES[activation],
            alpha,
            limit,
        )

    def run(
        self, x: Tensor, shares: Tensor, chosen: Tensor, out: Tensor, *, weighs_input: bool
    ) -> None:
        """out[t] = sum_i shares[t, i] * f(x[t]), where f is expert chosen[t, i].

        With `weighs_input` the sum of f(shares[t, i] * x[t]), the product rounded to the dtype.
        x, out [T, H] of the weights' dtype, rows dense; shares float32 [T, k], chosen int64 [T, k],
        contiguous. Sums are in float32, the activation is rounded to the dtype, and a token adds
        up its experts in the order of their ids: its result is bitwise the same in any batch.
        Raises: ValueError, TypeError, IndexError for arguments that do not fit.
        """
        checks.check_dense("x", x, self.dtype, 2)
        _run(self, x, shares, chosen, out, weighs_input=weighs_input)


class PackedExpertCodes:
    """The experts of one layer whose weights are codes: `PackedWeights` of each expert.

    gate_up [2I, H] and down [H, I] of each, from `pack_codes`; those of one side have one form, and
    the inputs of both sides are rounded or of neither. Immutable; safe to use from several threads.
    Raises: ValueError for layers that do not fit each other.
    """

    __slots__ = ("_kept", "handle", "hidden_size", "num_experts", "size_bytes")

    def __init__(
        self,
        gate_up: Sequence[PackedWeights],
        down: Sequence[PackedWeights],
        *,
        activation: str = "silu",
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None:
        native.require_native()
        if activation not in _GATES:
            raise ValueError(f"no gate named {activation!r}; there are {', '.join(_GATES)}")
        self._kept = (*gate_up, *down)
        self.handle = _cpu.Experts(
            [layer.handle for layer in gate_up],
            [layer.handle for layer in down],
            _GATES[activation],
            alpha,
            limit,
        )
        self.num_experts, self.hidden_size = len(gate_up), gate_up[0].num_inputs
        self.size_bytes = sum(layer.size_bytes for layer in self._kept)

    def run(
        self, x: Tensor, shares: Tensor, chosen: Tensor, out: Tensor, *, weighs_input: bool
    ) -> None:
        """As `PackedExpertWeights.run`, for x and out of any dtype of the kernels.

        The inputs of each product are rounded as those of its layer, those of `down` after the
        activation was rounded to the dtype.
        Raises: ValueError, TypeError, IndexError for arguments that do not fit.
        """
        _run(self, x, shares, chosen, out, weighs_input=weighs_input)


def _run(
    packed: PackedExpertWeights | PackedExpertCodes,
    x: Tensor,
    shares: Tensor,
    chosen: Tensor,
    out: Tensor,
    *,
    weighs_input: bool,
) -> None:
    x_stride = checks.check_dense("x", x, x.dtype, 2)[0]
    out_stride = checks.check_dense("out", out, x.dtype, 2)[0]
    num_tokens = x.shape[0]
    checks.check_shape("x", x, (num_tokens, packed.hidden_size))
    checks.check_shape("out", out, (num_tokens, packed.hidden_size))
    num_chosen = chosen.shape[1]
    checks.check_contiguous("shares", shares, "float32", (num_tokens, num_chosen))
    checks.check_contiguous("chosen", chosen, "int64", (num_tokens, num_chosen))
    packed.handle.run(
        checks.dtype_code(x.dtype),
        x.data_ptr(),
        shares.data_ptr(),
        chosen.data_ptr(),
        out.data_ptr(),
        num_tokens,
        num_chosen,
        x_stride,
        out_stride,
        weighs_input,
    )


def pack_experts(
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
) -> PackedExpertWeights:
    """gate_up [E, 2I, H], down [E, H, I] in float32, bfloat16 or float16; biases [E, 2I], [E, H].

    `activation` is `silu`, `gelu_tanh`, `gelu` or `clamped_swiglu`, which alone uses alpha and
    limit. Raises: ValueError, TypeError.
    """
    native.require_native()
    if activation not in _GATES:
        raise ValueError(f"no gate named {activation!r}; there are {', '.join(_GATES)}")
    checks.check_dense("gate_up", gate_up, gate_up.dtype, 3)
    checks.check_dense("down", down, gate_up.dtype, 3)
    count, hidden_size, inner_size = down.shape
    checks.check_shape("gate_up", gate_up, (count, 2 * inner_size, hidden_size))
    for name, bias, size in (
        ("gate_up_bias", gate_up_bias, 2 * inner_size),
        ("down_bias", down_bias, hidden_size),
    ):
        if bias is not None:
            checks.check_shape(name, bias, (count, size))
    return PackedExpertWeights(
        gate_up, down, gate_up_bias, down_bias, activation=activation, alpha=alpha, limit=limit
    )


def route_experts(
    logits: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    expert_ids: Tensor,
    *,
    is_sigmoid: bool,
    is_renormalised: bool,
    scale: float,
    num_groups: int,
    num_kept_groups: int,
    adds_two_best: bool,
) -> None:
    """The k experts with the best scores + bias, of the best groups; ties go to the lowest id.

    logits float32 [T, E] with dense rows, bias float32 [E] or None; writes weights float32 [T, k],
    the scores without the bias, and expert_ids int64 [T, k]. Scores are a softmax, or sigmoids.
    Raises: ValueError, TypeError. Source: DeepSeek-V3 report, section 2.1.2.
    """
    stride = checks.check_dense("logits", logits, weights.dtype, 2)[0]
    num_tokens, num_experts = logits.shape
    num_chosen = weights.shape[1]
    checks.check_contiguous("weights", weights, "float32", (num_tokens, num_chosen))
    checks.check_contiguous("expert_ids", expert_ids, "int64", (num_tokens, num_chosen))
    if bias is not None:
        checks.check_list("bias", bias, "float32", num_experts)
    if num_experts % num_groups or num_kept_groups > num_groups or num_chosen > num_experts:
        raise ValueError(
            f"{num_chosen} of {num_experts} experts in {num_kept_groups} of {num_groups} groups"
        )
    _cpu.route_experts(
        logits.data_ptr(),
        checks.address_of(bias),
        weights.data_ptr(),
        expert_ids.data_ptr(),
        (num_tokens, num_experts, num_chosen, num_groups, num_kept_groups, stride),
        scale,
        is_sigmoid,
        is_renormalised,
        adds_two_best,
    )


def head_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out[t, m] = weight[m] @ x[t, m]. x [T, M, K], weight [M, N, K], out [T, M, N] contiguous.

    One dtype, on the CPU, the last dimension dense, of weights the last or the one before; sums in
    float32, each in one order, another in each of the two layouts. Raises: ValueError, TypeError.
    """
    x_strides = checks.check_dense("x", x, x.dtype, 3)
    is_dense = weight.stride(-1) == 1
    checks.check_dense("weight", weight if is_dense else weight.mT, x.dtype, 3)
    heads, num_outputs, num_inputs = weight.shape
    checks.check_shape("x", x, (x.shape[0], heads, num_inputs))
    checks.check_dense("out", out, x.dtype, 3)
    checks.check_shape("out", out, (x.shape[0], heads, num_outputs))
    if not out.is_contiguous():
        raise ValueError("out is not contiguous")
    sizes = (x.shape[0], heads, num_outputs, num_inputs, *x_strides[:2], *weight.stride())
    _cpu.head_linear(
        checks.dtype_code(x.dtype), x.data_ptr(), weight.data_ptr(), out.data_ptr(), sizes
    )


def _lanes(code: int, weights: Tensor) -> Tensor:
    """[E, N, K] as lanes, one expert behind the other."""
    weights = weights.contiguous()
    count, num_outputs, num_inputs = weights.shape
    size = _cpu.num_lanes(code, num_outputs, num_inputs) * 4
    lanes = weights.new_empty((count, size), dtype=weights.new_empty(0).byte().dtype)
    row_bytes = num_inputs * weights.element_size()
    for expert in range(count):
        _cpu.pack_lanes(
            code,
            weights[expert].data_ptr(),
            row_bytes,
            num_outputs,
            num_inputs,
            lanes[expert].data_ptr(),
        )
    return lanes


def _biases(bias: Tensor | None) -> Tensor | None:
    """[E, N] as float32 with zeros up to whole panels."""
    if bias is None:
        return None
    count, size = bias.shape
    padded = bias.new_zeros((count, -(-size // _PANEL) * _PANEL)).float()
    padded[:, :size] = bias
    return padded
