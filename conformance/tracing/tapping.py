"""Listens to the operators of a device from outside: nothing of the vendor's code is changed.

A tapped device is a shallow copy whose operators and attention are shallow copies too, with each
operator of the specification shadowed on the copy. The device that was given stays as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from quire.core.errors import UnsupportedError
from quire.core.interface import OP_SPECS, AttentionBackend, AttentionSpec, Device, Ops, Reason

_WEIGHTS = frozenset({"weight", "bias", "packed", "cache", "plan", "sinks", "alibi_slopes", "self"})
"""Arguments that each device holds in its own way."""
_OUT = "out"
_SCRATCH = frozenset({"sample"})
"""Operators that may leave anything in what they write."""


class Listener(Protocol):
    """What is told of every call."""

    def call(
        self,
        op: str,
        inputs: Mapping[str, Tensor],
        run: Callable[[], object],
        written: Mapping[str, Tensor],
    ) -> object:
        """Runs the operator and returns its result.

        `inputs` are its tensors but weights and caches, `written` those that it changes.
        """


def tapped_device(device: Device, listener: Listener) -> Device:
    """`device` with a listener at each operator; its steps run eagerly, or nobody would hear.

    Raises: UnsupportedError for a device whose operators are not torch's to hear.
    """
    if device.torch_device is None:
        raise UnsupportedError(
            [
                Reason(
                    code="trace.operators",
                    need="operators on tensors of torch",
                    have="a device with a runtime of its own",
                    remedy="compare the results of its steps",
                )
            ],
            what="listening to operators",
        )
    ops = _tapped_ops(device.ops(), listener)
    other = copy.copy(device)
    capabilities = dataclasses.replace(device.capabilities, step_mode="eager")

    def attention(spec: AttentionSpec) -> AttentionBackend:
        return _tapped_attention(device.attention(spec), listener)

    for name, value in {
        "ops": lambda: ops,
        "attention": attention,
        "graphs": lambda: None,
        "capabilities": capabilities,
    }.items():
        setattr(other, name, value)
    return other


def tensors_of(value: object, name: str) -> dict[str, Tensor]:
    """The tensors in a value, by name: of itself, of a sequence, of a record's fields."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, (tuple, list)):
        parts = [tensors_of(part, f"{name}[{index}]") for index, part in enumerate(value)]
        return {key: tensor for part in parts for key, tensor in part.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if hasattr(value, "payload"):
            return {}
        fields = dataclasses.fields(value)
        parts = [tensors_of(getattr(value, f.name), f"{name}.{f.name}") for f in fields]
        return {key: tensor for part in parts for key, tensor in part.items()}
    return {}


def _tapped_ops(ops: Ops, listener: Listener) -> Ops:
    other = copy.copy(ops)
    for spec in OP_SPECS:
        function = getattr(ops, spec.name, None)
        if function is not None and hasattr(Ops, spec.name):
            signature = inspect.signature(getattr(Ops, spec.name))
            writes = () if spec.name in _SCRATCH else spec.writes
            tap = _tap(spec.name, function, signature, writes, listener)
            setattr(other, spec.name, tap)
    return other


def _tapped_attention(attention: AttentionBackend, listener: Listener) -> AttentionBackend:
    other = copy.copy(attention)
    for name, contract in inspect.getmembers(AttentionBackend, inspect.isfunction):
        if name == "forward" or name.startswith("forward_"):
            op = "paged_attention" + name.removeprefix("forward")
            signature = inspect.signature(contract)
            setattr(other, name, _tap(op, getattr(attention, name), signature, (), listener))
    return other


def _tap(
    op: str,
    function: Callable[..., object],
    signature: inspect.Signature,
    writes: Sequence[str],
    listener: Listener,
) -> Callable[..., object]:
    def call(*args: Any, **kwargs: Any) -> object:
        arguments = signature.bind(None, *args, **kwargs).arguments
        by_name: dict[str, Tensor] = {}
        for name, value in arguments.items():
            if name not in _WEIGHTS and not (op.startswith("paged_attention") and name == _OUT):
                by_name |= tensors_of(value, name)
        written = {
            name: arguments[name] for name in writes if isinstance(arguments.get(name), Tensor)
        }
        return listener.call(op, by_name, lambda: function(*args, **kwargs), written)

    return call


def bits_of(tensor: Tensor) -> bytes:
    """A tensor's bits, row by row, on the host."""
    host = tensor.detach().cpu().contiguous()
    flat = host.reshape(-1)
    raw = flat.view(torch.uint8) if host.numel() else flat.to(torch.uint8)
    return bytes(raw.numpy().tobytes())
