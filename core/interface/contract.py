"""Checks a backend's class when it is defined, so that a misspelt hook fails loudly."""

from __future__ import annotations

import inspect
from collections.abc import Iterator


def check_contract(cls: type, base: type) -> None:
    """Compares the public methods of `cls` with those of the contract `base`.

    A public method that the contract does not know, and a known one that cannot be called as the
    contract calls it, raise TypeError at class definition, all findings in one message.
    Helpers of a backend begin with an underscore.
    """
    findings = list(_unknown_names(cls, base)) + list(_wrong_signatures(cls, base))
    if findings:
        listing = "".join(f"\n  {finding}" for finding in findings)
        raise TypeError(f"{cls.__qualname__} breaks the contract of {base.__qualname__}:{listing}")


def _public_functions(cls: type) -> Iterator[tuple[str, object]]:
    for name, value in vars(cls).items():
        if not name.startswith("_") and callable(_function_of(value)):
            yield name, value


def _function_of(value: object) -> object:
    return getattr(value, "__func__", value)


def _unknown_names(cls: type, base: type) -> Iterator[str]:
    for name, value in _public_functions(cls):
        if not hasattr(base, name) and not inspect.isclass(value):
            yield f"{name}() is not part of the contract; is it misspelt? (helpers begin with _)"


def _wrong_signatures(cls: type, base: type) -> Iterator[str]:
    for name, value in _public_functions(cls):
        expected = getattr(base, name, None)
        if not inspect.isfunction(expected) or not inspect.isfunction(_function_of(value)):
            continue
        ours = inspect.signature(expected)
        theirs = inspect.signature(_function_of(value))  # type: ignore[arg-type]
        if not _accepts(theirs, ours):
            yield f"{name}{theirs} cannot be called as {name}{ours}"


def _accepts(theirs: inspect.Signature, ours: inspect.Signature) -> bool:
    """Whether every call that fits `ours` fits `theirs`: same names, extra ones with defaults."""
    their_parameters = list(theirs.parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in their_parameters):
        return True
    names = {p.name: p for p in their_parameters}
    for position, parameter in enumerate(ours.parameters.values()):
        match = names.pop(parameter.name, None)
        if (
            match is None
            or position >= len(their_parameters)
            or (parameter.default is not parameter.empty and match.default is match.empty)
        ):
            return False
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and (
            match.kind is match.KEYWORD_ONLY or their_parameters[position].name != parameter.name
        ):
            return False
    return all(p.default is not p.empty or p.kind is p.VAR_POSITIONAL for p in names.values())
