"""The contract: what it imports, how it checks classes, and that its surface is kept."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from quire.core import interface
from quire.core.interface import Backend, Device, Ops, PluginError, check_interface_version

SNAPSHOT = Path(__file__).parent / "interface_1_1.json"


def _surface() -> dict[str, object]:
    """Every public name of the interface with its public members and their signatures."""
    return {name: _members(getattr(interface, name)) for name in interface.__all__}


def _members(value: object) -> object:
    if not inspect.isclass(value):
        return type(value).__name__
    members: dict[str, str] = {}
    for name, member in sorted(vars(value).items()):
        if name.startswith("_"):
            continue
        function = getattr(member, "__func__", member)
        members[name] = (
            str(inspect.signature(function)) if inspect.isfunction(function) else "field"
        )
    members.update(dict.fromkeys(getattr(value, "__annotations__", {}), "field"))
    return dict(sorted(members.items()))


def test_public_surface_equals_its_snapshot() -> None:
    """A change of the contract is a decision: bump the version and write the snapshot anew."""
    assert json.loads(SNAPSHOT.read_text()) == _surface()


def test_every_public_name_has_a_docstring() -> None:
    """A vendor reads nothing but this."""
    bare = []
    for name in interface.__all__:
        value = getattr(interface, name)
        if not inspect.isclass(value):
            continue
        if not (value.__doc__ or "").strip():
            bare.append(name)
        bare += [
            f"{name}.{member}"
            for member, function in vars(value).items()
            if not member.startswith("_")
            and inspect.isfunction(function)
            and not inspect.getdoc(getattr(value, member))
        ]
    assert not bare


def test_importing_the_interface_loads_neither_torch_nor_a_plugin() -> None:
    """Listing backends must stay cheap, and devices that torch does not own must be possible."""
    program = (
        "import sys, quire.core.interface as i; "
        "bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'triton')]; "
        "print(bad)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_a_misspelt_hook_fails_when_the_class_is_defined() -> None:
    """A hook that is never called is worse than an error."""
    with pytest.raises(TypeError, match=r"prob\(\) is not part of the contract"):

        class Misspelt(Backend):
            name = "x"

            def prob(self) -> None: ...


def test_a_wrong_signature_fails_when_the_class_is_defined() -> None:
    """Every finding is in one message."""
    with pytest.raises(TypeError) as caught:

        class Wrong(Ops):
            def linear(self, x: object) -> None: ...

            def rms_norm(self, weight: object, x: object, eps: float) -> None: ...

    assert "linear" in str(caught.value)
    assert "rms_norm" in str(caught.value)


def test_a_wider_signature_is_accepted() -> None:
    """A backend may take more than it is given, as long as it has defaults."""

    class Wider(Backend):
        name = "x"

        def probe(self, *, verbose: bool = False) -> interface.Probe:
            return interface.Probe()

        def open(self, index: int, extra: str = "") -> Device:
            raise NotImplementedError

    assert Wider().probe() == interface.Probe()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_interface_version_of_today_is_accepted(version: str) -> None:
    """This minor loads."""
    assert str(check_interface_version(version, backend="x")) == version


@pytest.mark.parametrize("version", ["1.2", "2.0", "0.9", "1", "", None, 1.0])
def test_interface_version_beyond_the_window_is_refused_by_name(version: object) -> None:
    """The message names the backend, so that the user knows what to upgrade."""
    with pytest.raises(PluginError):
        check_interface_version(version, backend="x")
