"""What `--quantization` and its options ask for, and what is wrong with them; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from quire.core.interface import Reason, UnsupportedError

SCHEMES = ("int8", "int4")
GROUP_SIZE_OPTION = "quantization.group_size"
_GROUP_SIZES = (128, 64, 32, 16)
_DEFAULT_GROUP_SIZES = (64, 32, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationSpec:
    """What `--quantization` asked for."""

    scheme: str
    """`int8` or `int4`."""
    group_size: int | None = None
    """Of `int4`; None: the largest of 64, 32 and 16 that divides a layer's inputs."""

    def group_size_of(self, num_inputs: int) -> int:
        """Of a layer in 4 bits; 0: it must be kept in 8."""
        if self.group_size is not None:
            return self.group_size
        return next((size for size in _DEFAULT_GROUP_SIZES if num_inputs % size == 0), 0)


def parse_quantization(scheme: str | None, options: Mapping[str, str]) -> QuantizationSpec | None:
    """The settings of an engine as a spec; None: weights stay as they are.

    Raises: UnsupportedError with every reason.
    """
    reasons = [*scheme_reasons(scheme), *group_reasons(scheme, options)]
    if reasons:
        raise UnsupportedError(reasons, what=f"quantization {scheme}")
    if scheme is None:
        return None
    text = options.get(GROUP_SIZE_OPTION)
    return QuantizationSpec(scheme=scheme, group_size=None if text is None else int(text))


def scheme_reasons(scheme: str | None) -> Iterator[Reason]:
    """What is wrong with `--quantization`."""
    if scheme is not None and scheme not in SCHEMES:
        yield Reason(
            code="config.quantization",
            need=f"quantization {scheme}",
            have=", ".join(SCHEMES),
            remedy="choose one of these, or leave quantization out",
        )


def group_reasons(scheme: str | None, options: Mapping[str, str]) -> Iterator[Reason]:
    """What is wrong with the size of groups, whatever the layers are."""
    text = options.get(GROUP_SIZE_OPTION)
    if text is not None and (not text.isdecimal() or int(text) not in _GROUP_SIZES):
        yield Reason(
            code=f"options.{GROUP_SIZE_OPTION}",
            need=f"groups of {text}",
            have=", ".join(map(str, _GROUP_SIZES)),
            remedy=f"give {GROUP_SIZE_OPTION} one of these, or leave it out",
        )
    if text is not None and scheme != "int4":
        yield Reason(
            code=f"options.{GROUP_SIZE_OPTION}",
            need=f"groups with quantization {scheme}",
            have="groups with int4",
            remedy=f"ask for quantization int4, or leave {GROUP_SIZE_OPTION} out",
        )


def check_group_size(spec: QuantizationSpec, layers: Iterable[tuple[str, int]]) -> None:
    """Refuses a group size that does not divide the inputs of some layer (name, inputs).

    Raises: UnsupportedError that names every such number of inputs once.
    """
    size = spec.group_size
    if size is None:
        return
    names: dict[int, str] = {}
    for name, num_inputs in layers:
        if num_inputs % size:
            names.setdefault(num_inputs, name)
    reasons = [
        Reason(
            code=f"options.{GROUP_SIZE_OPTION}",
            need=f"groups of {size}",
            have=f"{num_inputs} inputs of {name}, which they do not divide",
            remedy="choose a smaller group size, or leave it out",
        )
        for num_inputs, name in names.items()
    ]
    if reasons:
        raise UnsupportedError(reasons, what=f"quantization {spec.scheme}")
