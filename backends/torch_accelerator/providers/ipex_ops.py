"""Fused operators of the Intel extension for PyTorch, for sites that run torch 2.8 with it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from quire.backends.torch_accelerator.ops import TritonOps
from quire.kernels_triton.launch import Launcher

_DTYPES = (torch.bfloat16, torch.float16)
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}
_OPS = frozenset({"rms_norm", "add_rms_norm", "gated_activation"})


class IpexOps(TritonOps):
    """Norms and gated activations of `ipex.llm.functional`; all else as without it.

    Source: the extension's documentation of its LLM functions, release 2.8.
    """

    def __init__(self, launcher: Launcher, fp8_units: str) -> None:
        """Raises: ImportError if the extension is not there or does not load."""
        super().__init__(launcher, fp8_units)
        library: Any = importlib.import_module("intel_extension_for_pytorch")
        self._functions: Any = library.llm.functional

    def provider(self, op: str) -> str:
        return "ipex" if op in _OPS else super().provider(op)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not _is_taken(x, weight):
            return super().rms_norm(x, weight, eps)
        out: Tensor = self._functions.rms_norm(x, weight, eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not (_is_taken(x, weight) and _is_taken(residual, weight)):
            return super().add_rms_norm(x, residual, weight, eps)
        # The last argument has the sum written back to the first.
        out: Tensor = self._functions.add_rms_norm(residual, x, weight, None, eps, True)
        return out

    def gated_activation(self, x: Tensor, kind: str) -> Tensor:
        if x.dtype not in _DTYPES or (kind != "silu" and kind not in _GELU):
            return super().gated_activation(x, kind)
        gate, up = x.chunk(2, dim=-1)
        out = x.new_empty(gate.shape)
        if kind == "silu":
            self._functions.silu_mul(gate, up, out)
        else:
            self._functions.gelu_mul(gate, up, out, _GELU[kind])
        return out


def _is_taken(x: Tensor, weight: Tensor) -> bool:
    """Whether the functions take such a tensor: a half, dense, and of the weight's dtype."""
    return x.dtype in _DTYPES and weight.dtype == x.dtype and x.is_contiguous()
