"""The operators of an accelerator: Triton's kernels, torch's libraries, the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.backends.reference.sampling import top_ids
from quire.backends.torch_accelerator.extension_ops import (
    DTYPES,
    EXTENSION_OPS,
    TritonExtensionOps,
)
from quire.core.interface import SampledLogprobs, SamplingTensors
from quire.kernels_triton import elementwise, norms, sampling
from quire.kernels_triton import logits as logit_kernels

_KERNEL_OPS = frozenset(
    {
        *("rms_norm", "add_rms_norm", "gated_activation", "rotary", "soft_cap"),
        *("apply_penalties", "add_bias", "keep_only", "apply_token_mask", "sample", "logprobs"),
        *EXTENSION_OPS,
    }
)


class TritonOps(TritonExtensionOps):
    """What has a kernel runs in it; matrix products go to the vendor's library through torch."""

    def provider(self, op: str) -> str:
        if op == "linear":
            return "torch"
        return f"triton:{self._launcher.table.architecture}" if op in _KERNEL_OPS else "torch"

    # --- layers ---------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not _is_served(x) or x.shape[-1] > norms.MAX_WIDTH:
            return super().rms_norm(x, weight, eps)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        norms.rms_norm(self._launcher, x, weight, eps, out)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        is_dense = x.stride(-1) == residual.stride(-1) == 1
        if not _is_served(x) or not is_dense or x.shape[-1] > norms.MAX_WIDTH:
            return super().add_rms_norm(x, residual, weight, eps)
        out = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
        norms.add_rms_norm(self._launcher, x, residual, weight, eps, out)
        return out

    def gated_activation(self, x: Tensor, kind: str) -> Tensor:
        if not _is_served(x) or kind not in elementwise.ACTIVATIONS:
            return super().gated_activation(x, kind)
        out = x.new_empty((x.shape[0], x.shape[1] // 2))
        elementwise.gated_activation(self._launcher, x, kind, out)
        return out

    def rotary(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool
    ) -> None:
        angles_fit = cos.stride() == sin.stride() and cos.stride(-1) == 1
        if not _is_served(q) or k.dtype != q.dtype or not angles_fit:
            super().rotary(q, k, cos, sin, is_interleaved=is_interleaved)
        else:
            elementwise.rotary(self._launcher, q, k, cos, sin, is_interleaved=is_interleaved)

    def soft_cap(self, x: Tensor, cap: float) -> None:
        if _is_served(x) and x.is_contiguous():
            elementwise.soft_cap(self._launcher, x, cap)
        else:
            super().soft_cap(x, cap)

    # --- logits ---------------------------------------------------------------------------------

    def apply_penalties(
        self,
        logits: Tensor,
        rows: Tensor,
        token_ids: Tensor,
        output_counts: Tensor,
        settings: Tensor,
    ) -> None:
        logit_kernels.apply_penalties(
            self._launcher, logits, rows, token_ids, output_counts, settings.contiguous()
        )

    def add_bias(self, logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
        logit_kernels.add_bias(self._launcher, logits, rows, token_ids, bias)

    def keep_only(
        self, logits: Tensor, rows: Tensor, row_of_entry: Tensor, token_ids: Tensor
    ) -> None:
        logit_kernels.keep_only(self._launcher, logits, rows, row_of_entry, token_ids)

    def apply_token_mask(self, logits: Tensor, rows: Tensor, mask: Tensor) -> None:
        logit_kernels.apply_token_mask(self._launcher, logits, rows, mask)

    def sample(self, logits: Tensor, settings: SamplingTensors) -> Tensor:
        out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        sampling.sample(
            self._launcher,
            logits,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            uniform=settings.uniform,
            has_filter=settings.needs_filter and not settings.is_all_greedy,
            out=out,
        )
        return out

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> SampledLogprobs:
        selected, ranks, normalizer = sampling.logprobs(self._launcher, logits, token_ids)
        best = top_ids(logits, num_top)
        top = logits.gather(-1, best) - normalizer[:, :1] - normalizer[:, 1:]
        return SampledLogprobs(selected=selected, ranks=ranks, top_ids=best, top_logprobs=top)


def _is_served(x: Tensor) -> bool:
    """Whether the kernels take such a tensor: a dtype of theirs, dense rows."""
    return x.dtype in DTYPES and x.stride(-1) == 1
