"""Extension `lora`: tokens of several adapters in one batch."""

from __future__ import annotations

import torch

from quire.conformance.cases import check, dtypes, needs_claim
from quire.conformance.checks import l1_ops
from quire.conformance.trial import Trial

_NEEDS = needs_claim("features", "lora")


@check(level=1, op="", over=l1_ops.numeric_cases("lora"), needs=_NEEDS)
def numerics(trial: Trial, *, op: str, variant: str, dtype: str, scale: str) -> None:
    """The result is the formula's, as near as honest rounding in this dtype allows."""
    l1_ops.numerics(trial, op=op, variant=variant, dtype=dtype, scale=scale)


@check(level=1, op="", over=l1_ops.op_cases("lora"), needs=_NEEDS)
def purity(trial: Trial, *, op: str, dtype: str) -> None:
    """Only the result is written, and nothing around it."""
    l1_ops.purity(trial, op=op, dtype=dtype)


@check(level=1, op="", over=l1_ops.op_cases("lora"), needs=_NEEDS)
def new_data(trial: Trial, *, op: str, dtype: str) -> None:
    """The same shapes with new data, and so other adapters, give the new answer."""
    l1_ops.new_data(trial, op=op, dtype=dtype)


@check(level=1, op="add_lora", over=dtypes(), on_torch=True, needs=_NEEDS)
def rows_without_an_adapter_keep_their_bits(trial: Trial, *, dtype: str) -> None:
    """Whoever asked for the plain model gets it to the bit, beside whoever did not."""
    where, kind = str(trial.device.torch_device), getattr(torch, dtype)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(trial.rng.standard_normal(shape)).to(kind).to(where)

    out, ids = draw(6, 32), torch.tensor([-1, 0, -1, 1, 0, -1]).to(where)
    before = out.clone()
    trial.device.ops().add_lora(out, draw(6, 48), draw(2, 8, 48), draw(2, 32, 8), ids)
    trial.device.synchronize()
    plain = (ids < 0).nonzero().squeeze(-1)
    trial.require(
        torch.equal(out[plain], before[plain]),
        "add_lora changed rows whose adapter is -1: they belong to requests of the plain model",
    )
    trial.require(
        not torch.equal(out[1], before[1]), "add_lora left a row with an adapter as it was"
    )
