"""Mixtures of experts in one call: router, choice, experts and the MLP that all tokens share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels_cpu import checks, native
from quire.kernels_cpu.elementwise import GATES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quire.kernels_cpu.experts import PackedExpertCodes, PackedExpertWeights
    from quire.kernels_cpu.linear import PackedWeights

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu


class FusedMixture:
    """The kernels of a mixture's operators in their order, as a part of a `FusedWholeLayer`.

    router: float32 [E, H]; bias float32 [E] or None; `shared`: gate and up, stacked, and down, or
    None; `shared_gate` [1, H], whose sigmoid weighs what the shared MLP makes; with `weighs_input`
    the experts of the largest logits are chosen, and sigmoids of these weigh their inputs; the rest
    as in `route_experts`. Rows are float32 or bfloat16.
    Raises: ValueError, TypeError for parts that do not fit each other.
    """

    __slots__ = ("_kept", "dtype", "handle", "hidden_size")

    def __init__(
        self,
        dtype: torch.dtype,
        router: PackedWeights,
        experts: PackedExpertWeights | PackedExpertCodes,
        *,
        bias: Tensor | None,
        shared: tuple[PackedWeights, PackedWeights] | None,
        shared_gate: PackedWeights | None = None,
        gate: str,
        num_chosen: int,
        num_groups: int,
        num_kept_groups: int,
        scale: float,
        is_sigmoid: bool,
        is_renormalised: bool,
        adds_two_best: bool,
        weighs_input: bool = False,
    ) -> None:
        native.require_native()
        self.dtype, self.hidden_size = dtype, experts.hidden_size
        if gate not in GATES:
            raise ValueError(f"no gate named {gate!r}; there are {', '.join(GATES)}")
        if bias is not None:
            checks.check_list("bias", bias, "float32", experts.num_experts)
        gate_up, down = shared or (None, None)
        if gate_up is not None and down is not None:
            wanted = (self.hidden_size, 2 * down.num_inputs, self.hidden_size)
            if (gate_up.num_inputs, gate_up.num_outputs, down.num_outputs) != wanted:
                raise ValueError("the shared MLP does not fit the experts")
        if shared_gate is not None and (
            gate_up is None
            or (shared_gate.num_outputs, shared_gate.num_inputs) != (1, self.hidden_size)
        ):
            raise ValueError("the gate of the shared MLP does not fit the experts")
        self._kept = (router, experts, bias, shared, shared_gate)
        self.handle = _cpu.Mixture(
            checks.dtype_code(dtype),
            router.handle,
            0 if bias is None else bias.data_ptr(),
            experts.handle,
            None if gate_up is None else gate_up.handle,
            None if down is None else down.handle,
            None if shared_gate is None else shared_gate.handle,
            GATES[gate],
            (num_chosen, num_groups, num_kept_groups),
            scale,
            (is_sigmoid, is_renormalised, adds_two_best, weighs_input),
        )
