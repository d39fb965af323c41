"""Options of `--options name=value` that nobody reads: refused, with the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping

from quire.core.interface import Reason
from quire.core.models.weights.quantization_spec import GROUP_SIZE_OPTION

_OF_THE_ENGINE = frozenset({GROUP_SIZE_OPTION})


def unread_options(
    options: Mapping[str, str],
    *,
    device: str,
    of_device: Collection[str] | None,
    backends: Collection[str],
) -> Iterator[Reason]:
    """A reason for each option that the engine and the device would pass over.

    `device`: the backend's name, with which its options begin; `of_device`: those that it reads,
    None: it does not say. Options that begin with the name of another of `backends` are left to it.
    """
    known = sorted(_OF_THE_ENGINE.union(of_device or ()))
    for name in options:
        owner = name.partition(".")[0]
        is_said = of_device is not None or owner != device
        is_of_another = owner in backends and owner != device
        if name in known or is_of_another or not is_said:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        yield Reason(
            code=f"options.{name}",
            need=f"the option {name}",
            have=", ".join(known),
            remedy=f"did you mean {near[0]}?" if near else "leave it out",
        )
