"""When requests are sent: the gaps between them, by the process that makes them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from quire.core.errors import ConfigError

PROCESSES = ("poisson", "gamma", "constant", "closed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """How requests arrive."""

    process: str = "poisson"
    """`poisson`; `gamma`, in bursts below a shape of 1; `constant`; `closed`: as others end."""
    rate: float | None = None
    """Requests a second; None: as fast as the limit of requests in flight lets them."""
    burstiness: float = 1.0
    """The shape of `gamma`: 1 is Poisson, less is burstier, more is steadier."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.process not in PROCESSES:
            known = ", ".join(PROCESSES)
            raise ConfigError(f"arrivals {self.process!r} are unknown; choose one of {known}")
        if self.process in ("gamma", "constant") and self.rate is None:
            raise ConfigError(f"{self.process} arrivals need --request-rate")
        if not self.burstiness > 0:
            raise ConfigError(f"burstiness is {self.burstiness}; it must be above 0")

    def gaps_s(self) -> Iterator[float]:
        """Seconds from each request to the next, for ever; the mean is 1 / rate."""
        rng = random.Random(self.seed)
        while True:
            if self.rate is None or self.process == "closed":
                yield 0.0
            elif self.process == "constant":
                yield 1.0 / self.rate
            else:
                shape = self.burstiness if self.process == "gamma" else 1.0
                yield rng.gammavariate(shape, 1.0 / (shape * self.rate))
