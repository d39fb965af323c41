"""An opened Acme board: what it claims, and the operators that it computes its own way."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.backends.reference import ReferenceOps, TorchDevice
from quire.core.interface import Capabilities, DeviceInfo, Ops

_DTYPES = ("float32", "bfloat16")
_OWN = frozenset({"rms_norm", "add_rms_norm", "gated_activation"})


class AcmeOps(ReferenceOps):
    """Three operators of our own; the others are the reference's until we write them."""

    def provider(self, op: str) -> str:
        """Shown by `quire plan`."""
        return "acme" if op in _OWN else super().provider(op)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(|x|^2 / H + eps) * weight, from the length of each row."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = length.square().div_(x.shape[-1]).add_(eps).rsqrt_()
        return (x.float() * scale * weight.float()).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The sum is rounded into `residual` before it is normalised, as the contract says."""
        torch.add(residual, x, out=residual)
        return self.rms_norm(residual, weight, eps)

    def gated_activation(self, x: Tensor, kind: str) -> Tensor:
        """SiLU as gate * sigmoid(gate), fused with the product; GELU is the reference's."""
        if kind != "silu":
            return super().gated_activation(x, kind)
        gate, up = x.float().chunk(2, dim=-1)
        return torch.sigmoid(gate).mul_(gate).mul_(up).to(x.dtype)


class AcmeDevice(TorchDevice):
    """The reference on the tensors of `torch_device`, with our operators put in."""

    def __init__(self, info: DeviceInfo) -> None:
        super().__init__(
            info=info,
            torch_device="cpu",  # a real vendor's: what `torch.device()` calls the board
            # The engine offers users what stands here, and the suite tests all of it.
            capabilities=Capabilities(
                dtypes=_DTYPES,
                cache_dtypes=_DTYPES,
                block_sizes=(16, 32),
                attention_kinds=frozenset({"causal", "sliding_window"}),
                attention_features=frozenset({"soft_cap"}),
                determinism="run_to_run",
            ),
        )

    def _make_ops(self) -> Ops:
        return AcmeOps()
