"""Functions of the user's that change a request's logits, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from quire.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    LogitsProcessor = Callable[[Sequence[int], Sequence[int], Tensor], Tensor]
    """(prompt token ids, output token ids, logits float32 [V]) to logits float32 [V]."""


class LogitsProcessors:
    """The processors that a worker knows; `SamplingSpec.logits_processors` names them."""

    def __init__(self, targets: Mapping[str, str] | None = None) -> None:
        """Imports every `module:attribute` of `targets`, by name.

        Raises: ConfigError that names each one that cannot be had.
        """
        self._functions: dict[str, LogitsProcessor] = {}
        problems = []
        for name, target in (targets or {}).items():
            try:
                self.register(name, _resolve(target))
            except Exception as error:  # the user's module may raise anything; all are told
                problems.append(f"logits processor {name!r} ({target}): {error}")
        if problems:
            raise ConfigError("; ".join(problems))

    def register(self, name: str, function: LogitsProcessor) -> None:
        """Adds a function under `name`, or replaces the one that has it.

        `function(prompt_ids, output_ids, logits)` gets the row's logits float32 [V], which it may
        change, and returns the row to use. If it raises, that request alone fails.
        Raises: ConfigError if it cannot be called.
        """
        if not callable(function):
            raise ConfigError(f"logits processor {name!r} is {function!r}; it must be callable")
        self._functions[name] = function

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that nobody registered."""
        return [name for name in names if name not in self._functions]

    def apply(
        self,
        names: Sequence[str],
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        logits: Tensor,
    ) -> None:
        """Runs the named processors in order on one row, float32 [V], in place.

        Raises: whatever a processor raises; ValueError if one returns another shape.
        """
        row = logits
        for name in names:
            row = self._functions[name](prompt_ids, output_ids, row)
            if getattr(row, "shape", None) != logits.shape:
                raise ValueError(
                    f"logits processor {name!r} returned {_describe(row)}; "
                    f"it must return a tensor of shape {tuple(logits.shape)}"
                )
        if row is not logits:
            logits.copy_(row)


def _resolve(target: str) -> LogitsProcessor:
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        raise ConfigError("must be written module:attribute")
    found: Any = import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return cast("LogitsProcessor", found)


def _describe(value: object) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"shape {tuple(shape)}"
