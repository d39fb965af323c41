"""One run of one case on one device: its random numbers, its buffers, what it measured."""

from __future__ import annotations

import time
import traceback
import unittest
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quire.conformance.numerics import Measurement, compare
from quire.conformance.ranks import RankGroups
from quire.core.interface import Backend, Capabilities, Device, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from quire.conformance.cases import Case

Array = npt.NDArray[Any]


class Finding(AssertionError):  # noqa: N818 - says what it is
    """What a case found wrong with a device: what should hold, what is so, what that suggests."""


@dataclass(slots=True, kw_only=True, eq=False)
class Trial:
    """What a check is given."""

    backend: Backend | None
    """None where a device alone is tried."""
    device: Device
    case_id: str
    seed: int
    directory: Path
    """For files of this run; models are made there once."""
    rank_groups: RankGroups | None = None
    """Processes of several ranks; None: nobody knows how another process opens the device."""
    measurements: list[Measurement] = field(default_factory=list)
    provider: str = ""
    """Who served the operator, by the device's own word."""
    rng: np.random.Generator = field(init=False)
    """From the run's seed and the case's id: the same in any order and on any worker."""

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng([self.seed, zlib.crc32(self.case_id.encode())])

    @property
    def capabilities(self) -> Capabilities:
        """The device's claims."""
        return self.device.capabilities

    @property
    def ranks(self) -> RankGroups:
        """Processes of several ranks, each with a device of its own."""
        if self.rank_groups is None:
            raise Finding("only an installed backend can be opened in several processes")
        return self.rank_groups

    @property
    def block_size(self) -> int:
        """The block size that cases use where they do not name one: 16, or else 32."""
        return 16 if 16 in self.capabilities.block_sizes else 32

    @property
    def head_size(self) -> int:
        """The size that cases use where they do not name one: 64, 128, or the first claimed."""
        claimed = self.capabilities.head_sizes or (64,)
        return next((size for size in (64, 128) if size in claimed), claimed[0])

    def require(self, holds: object, message: str) -> None:
        """Raises Finding with `message` unless `holds`."""
        if not holds:
            raise Finding(message)

    def measure(
        self, what: str, out: Tensor, ref: Array, base: Array, *, tolerance: str, hint: str = ""
    ) -> None:
        """Holds a result of the device against the oracle by the rule of `numerics`.

        `base` is the formula in float32; it is rounded here, once, to out's dtype.
        """
        import torch

        name = str(out.dtype).removeprefix("torch.")
        rounded = torch.from_numpy(np.asarray(base)).to(out.dtype).double().numpy()
        got = out.detach().cpu().double().numpy()
        dtype = name if out.dtype.is_floating_point else "float32"
        measured = compare(
            got, np.asarray(ref, dtype=np.float64), rounded, dtype=dtype, tolerance=tolerance
        )
        self.measurements.append(measured)
        self.require(
            measured.is_within,
            f"{what} is off by {measured.error:.3g} in {measured.where} ({name}); the float64 "
            f"oracle allows {measured.bound:.3g} here ({tolerance}). {hint}".rstrip(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one case."""

    case: Case
    outcome: str
    """`passed`, `failed` or `unsupported`."""
    reason: str = ""
    details: str = ""
    """The traceback of a failure."""
    measurements: tuple[Measurement, ...] = ()
    provider: str = ""
    seconds: float = 0.0

    @property
    def worst(self) -> Measurement | None:
        """The measurement with the least headroom."""
        return max(self.measurements, key=lambda m: m.headroom, default=None)


def run_case(
    case: Case,
    device: Device,
    *,
    backend: Backend | None,
    seed: int,
    directory: Path,
    rank_groups: RankGroups | None = None,
) -> Outcome:
    """Runs one case. Whatever a declared capability raises is a failure; the suite alone skips."""
    is_torch = device.torch_device is not None
    reason = case.reason_against(device.capabilities, is_torch=is_torch)
    if reason:
        return Outcome(case=case, outcome="unsupported", reason=reason)
    trial = Trial(
        backend=backend,
        device=device,
        case_id=case.id,
        seed=seed,
        directory=directory,
        rank_groups=rank_groups,
    )
    begin = time.perf_counter()
    try:
        case.function(trial, **case.arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a skip and an exit are no Exceptions, and are failures here
        message = error.args[0] if isinstance(error, Finding) else _blame(error)
        outcome, details = "failed", traceback.format_exc()
    else:
        outcome, message, details = "passed", "", ""
    return Outcome(
        case=case,
        outcome=outcome,
        reason=message,
        details=details,
        measurements=tuple(trial.measurements),
        provider=trial.provider,
        seconds=time.perf_counter() - begin,
    )


def _blame(error: BaseException) -> str:
    kind = type(error)
    what = f"{kind.__name__}: {error}"
    # pytest's own outcomes are told by name: this module must not need pytest.
    is_outcome = any(base.__name__ == "OutcomeException" for base in kind.__mro__)
    is_skip = is_outcome or isinstance(error, unittest.SkipTest)
    if is_skip:
        return f"the backend tried to skip this test ({what}); only the suite may skip"
    if isinstance(error, (NotImplementedError, UnsupportedError)):
        return (
            f"the device claims this in its Capabilities and then refuses it ({what}); "
            "serve it, or do not claim it"
        )
    return f"the backend raised {what}"


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Several mappings as one."""
    return {key: value for part in parts for key, value in part.items()}
