"""Layers of a transformers model that the operators of the device compute instead.

A layer is taken over only if it is recognized by what it does: its own forward is held against the
operator on random rows, and its weight was read by nobody else while the model ran. Its own weight
is dropped as soon as it is packed, one layer at a time, so that nothing is held twice. What stands
in its place is NaN, so that a reader who was missed is found by the self-check.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from quire.core.interface.ops import Ops, PackedLinear
from quire.core.models.transformers_adapter.text_model import TextModel

_ROWS = 5
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the norm of the difference, relative to that of the result."""
_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_ACTIVATIONS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("silu", nn.functional.silu),
    ("gelu_tanh", lambda x: nn.functional.gelu(x, approximate="tanh")),
    ("gelu", nn.functional.gelu),
)


class _WatchedLinear(nn.Linear):
    """A linear layer that notes who uses it."""

    was_called: bool
    was_read: bool

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """As torch does, past the property."""
        self.was_called = True
        parameters = self._parameters
        return nn.functional.linear(input, cast("Tensor", parameters["weight"]), parameters["bias"])

    def __getattribute__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            self.was_read = True
        return super().__getattribute__(name)


class Watch:
    """The linear layers that ran, and whose weights nobody else looked at."""

    def __init__(self, model: nn.Module) -> None:
        self._watched = [module for module in model.modules() if type(module) is nn.Linear]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes who uses the layers meanwhile."""
        for module in self._watched:
            module.was_called = module.was_read = False  # type: ignore[assignment]
            module.__class__ = _WatchedLinear
        try:
            yield
        finally:
            for module in self._watched:
                module.__class__ = nn.Linear

    def free(self) -> set[nn.Linear]:
        """Those that may be taken over."""
        return {m for m in self._watched if _is_free(m)}


def _is_free(module: nn.Linear) -> bool:
    state = vars(module)
    has_hooks = bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001
    return bool(state.get("was_called")) and not state.get("was_read") and not has_hooks


class RoutedLayers:
    """What has been taken over, for those who ask."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.counts: dict[str, int] = {}

    def providers(self) -> dict[str, str]:
        """Operator to who serves it."""
        return {op: self._ops.provider(op) for op in self.counts}

    def add(self, op: str) -> None:
        """One layer more is served by `op`."""
        self.counts[op] = self.counts.get(op, 0) + 1


def route_layers(text_model: TextModel, ops: Ops, free: set[nn.Linear]) -> RoutedLayers:
    """Hands gated MLPs, linear layers and RMS norms to `ops`, where they give the same numbers."""
    routed = RoutedLayers(ops)
    with torch.no_grad():
        for module in text_model.model.modules():
            _route_mlp(module, ops, free, routed)
        for linear in [m for m in text_model.model.modules() if m in free]:
            _route_linear(linear, ops, routed)
        for module in text_model.model.modules():
            _route_norm(module, ops, routed)
    return routed


def _route_linear(module: nn.Linear, ops: Ops, routed: RoutedLayers) -> None:
    weight = module.weight
    if weight.dtype not in _TOLERANCES:
        return
    sample = _sample(module.in_features, weight)
    want = module(sample)
    packed = ops.pack_linear(weight.detach(), _detached(module.bias))
    if not _is_near(ops.linear(sample, packed), want):
        return
    _replace_forward(module, _linear_forward(ops, packed))
    _drop(module)
    routed.add("linear")


def _linear_forward(ops: Ops, packed: PackedLinear) -> Callable[[Tensor], Tensor]:
    multiply = ops.linear

    def forward(x: Tensor) -> Tensor:
        if x.dim() == 2:
            return multiply(x if x.is_contiguous() else x.contiguous(), packed)
        rows = x.reshape(-1, x.shape[-1])
        out = multiply(rows if rows.is_contiguous() else rows.contiguous(), packed)
        return out.view(*x.shape[:-1], out.shape[-1])

    return forward


def _route_mlp(module: nn.Module, ops: Ops, free: set[nn.Linear], routed: RoutedLayers) -> None:
    """down(act(gate(x)) * up(x)), with gate and up as one layer."""
    children = dict(module.named_children())
    names = ("gate_proj", "up_proj", "down_proj")
    linears = [children.get(name) for name in names]
    others = set(children) - {*names, "act_fn"}
    takes_more = len(inspect.signature(module.forward).parameters) != 1
    if others or takes_more or not all(linear in free for linear in linears) or _has_hooks(module):
        return
    gate, up, down = cast("list[nn.Linear]", linears)
    if (gate.bias is None) != (up.bias is None) or gate.weight.shape != up.weight.shape:
        return
    if gate.weight.dtype not in _TOLERANCES:
        return
    sample = _sample(gate.in_features, gate.weight)
    want = module(sample)
    kind = _activation_of(gate, up, down, sample, want)
    if kind is None:
        return
    bias = None if gate.bias is None else torch.cat([gate.bias, up.bias])
    merged = ops.pack_linear(torch.cat([gate.weight, up.weight]), bias)
    packed_down = ops.pack_linear(down.weight.detach(), _detached(down.bias))
    forward = _mlp_forward(ops, merged, packed_down, kind)
    if not _is_near(forward(sample), want):
        return
    _replace_forward(module, forward)
    for linear in (gate, up, down):
        _drop(linear)
        free.discard(linear)
    routed.add("linear")
    routed.add("gated_activation")


def _activation_of(
    gate: nn.Linear, up: nn.Linear, down: nn.Linear, sample: Tensor, want: Tensor
) -> str | None:
    """The activation with which the three give what their module gives, if there is one."""
    for kind, activation in _ACTIVATIONS:
        if torch.equal(down(activation(gate(sample)) * up(sample)), want):
            return kind
    return None


def _mlp_forward(
    ops: Ops, gate_up: PackedLinear, down: PackedLinear, kind: str
) -> Callable[[Tensor], Tensor]:
    multiply, activate = ops.linear, ops.gated_activation

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = multiply(activate(multiply(rows, gate_up), kind), down)
        return out.view(*x.shape[:-1], out.shape[-1])

    return forward


def _route_norm(module: nn.Module, ops: Ops, routed: RoutedLayers) -> None:
    """A norm over the root mean square, whose weight may be an offset from one."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    eps = next((getattr(module, n) for n in _EPSILONS if hasattr(module, n)), None)
    if set(parameters) != {"weight"} or not isinstance(eps, float) or _has_hooks(module):
        return
    if weight is None or weight.dim() != 1 or weight.dtype not in _TOLERANCES:
        return
    # One that takes a gate or a mask besides does more.
    is_plain = len(inspect.signature(module.forward).parameters) == 1
    if not is_plain or "Norm" not in type(module).__name__:
        return
    sample = _sample(len(weight), weight) * 3 + 0.5
    try:
        wants = [(x, module(x)) for x in (sample, sample * eps**0.5, sample * 100)]
    # A norm may take more than rows; then it is another thing.
    except Exception:
        return
    for scale in (weight.detach(), (1.0 + weight.detach().float()).to(weight.dtype)):
        if all(_is_near(ops.rms_norm(x, scale, eps), want) for x, want in wants):
            _replace_forward(module, _norm_forward(ops, scale, eps, module.forward))
            routed.add("rms_norm")
            return


def _norm_forward(
    ops: Ops, weight: Tensor, eps: float, own: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    normalise, dtype = ops.rms_norm, weight.dtype

    def forward(hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != dtype:
            return own(hidden_states)
        x = hidden_states if hidden_states.is_contiguous() else hidden_states.contiguous()
        return normalise(x, weight, eps)

    return forward


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001


def _sample(size: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn((_ROWS, size), generator=generator)
    return rows.to(device=like.device, dtype=like.dtype)


def _is_near(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    off = (got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-9)
    return bool(torch.isfinite(off)) and float(off) <= _TOLERANCES[want.dtype]


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _replace_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    # On the instance: other modules of the class keep theirs.
    object.__setattr__(module, "forward", forward)


def _drop(module: nn.Linear) -> None:
    """Lets go of a weight that is packed: one NaN takes its place, in its shape."""
    weight = module.weight
    stand_in = torch.full((), math.nan, dtype=weight.dtype, device=weight.device)
    module.weight = nn.Parameter(stand_in.expand(weight.shape), requires_grad=False)
