"""Discovery against plug-ins that are really installed, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOOD = """
    from quire.core.interface import Backend, DeviceInfo, Probe
    class Plugin(Backend):
        name = "{name}"
        interface_version = "{version}"
        def probe(self): return Probe(devices=(DeviceInfo(index=0, name="board"),), priority={priority})
        def open(self, index): raise NotImplementedError
"""

Install = Callable[..., None]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder on sys.path in which distributions can be installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


@pytest.fixture
def install(site: Path) -> Install:
    """Installs a distribution with one backend: a module and its metadata."""

    def install_one(name: str, source: str, *, distribution: str = "", module: str = "") -> None:
        distribution = distribution or f"quire-{name}"
        module = module or distribution.replace("-", "_")
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        info = site / f"{module}-1.2.3.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n"
        )
        (info / "entry_points.txt").write_text(f"[quire.backends]\n{name} = {module}:Plugin\n")

    return install_one


def ask(site: Path, program: str) -> Any:
    """What `program` prints as JSON, run with `site` on its path."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


LOAD = """
    import json
    from quire.core.discovery import load_backend
    from quire.core.errors import QuireError
    try:
        backend = load_backend({name!r})
        print(json.dumps(["ok", backend.name, ""]))
    except QuireError as error:
        print(json.dumps([type(error).__name__, str(error), getattr(error, "details", "")]))
"""


def test_list_backends_imports_nothing_of_them(site: Path, install: Install) -> None:
    """Listing must be safe and fast: neither the plug-in nor torch is imported."""
    install("acme", "raise RuntimeError('imported')")
    seen = ask(
        site,
        """
        import json, sys
        from quire.core.discovery import list_backends
        rows = [[e.name, e.distribution, e.version, e.target] for e in list_backends()]
        print(json.dumps([rows, "torch" in sys.modules, "quire_acme" in sys.modules]))
        """,
    )
    assert ["acme", "quire-acme", "1.2.3", "quire_acme:Plugin"] in seen[0]
    assert seen[1:] == [False, False]


def test_load_backend_of_a_good_package_constructs_it(site: Path, install: Install) -> None:
    """The way of every vendor: an entry point and a class."""
    install("acme", GOOD.format(name="acme", version="1.0", priority=1))
    assert ask(site, LOAD.format(name="acme"))[:2] == ["ok", "acme"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nonexistent_sdk", "nonexistent_sdk"),
        ("raise RuntimeError('driver too old')", "driver too old"),
        ("assert False, 'bad board'", "bad board"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("raise BaseException('odd')", "odd"),
        ("Other = 1", "Plugin"),
        ("Plugin = 7", "subclass of"),
    ],
)
def test_load_backend_that_fails_at_import_becomes_a_plugin_error(
    site: Path, install: Install, source: str, said: str
) -> None:
    """Whatever a plug-in does at import, the process lives and the user reads whose it was."""
    install("acme", source)
    kind, message, _ = ask(site, LOAD.format(name="acme"))
    assert kind == "PluginError"
    assert said in message
    assert "quire-acme 1.2.3" in message


def test_load_backend_failure_carries_the_traceback(site: Path, install: Install) -> None:
    """The vendor needs the line that failed."""
    install("acme", "def deep():\n    raise RuntimeError('here')\ndeep()")
    assert "in deep" in ask(site, LOAD.format(name="acme"))[2]


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.0", "upgrade quire"),
        ("0.9", "upgrade the backend package"),
        ("one", "MAJOR.MINOR"),
        ("1.7", "upgrade quire"),
    ],
)
def test_load_backend_of_a_wrong_interface_version_says_which_side_to_upgrade(
    site: Path, install: Install, version: str, said: str
) -> None:
    """A mismatch must be refused before anything runs, and name both versions."""
    install("acme", GOOD.format(name="acme", version=version, priority=1))
    kind, message, _ = ask(site, LOAD.format(name="acme"))
    assert kind == "PluginError"
    assert said in message
    assert version in message


def test_load_backend_claimed_by_two_packages_names_both(site: Path, install: Install) -> None:
    """Neither may win silently."""
    install("acme", GOOD.format(name="acme", version="1.0", priority=1))
    install("acme", GOOD.format(name="acme", version="1.0", priority=1), distribution="rival-acme")
    kind, message, _ = ask(site, LOAD.format(name="acme"))
    assert kind == "PluginError"
    assert "quire-acme" in message
    assert "rival-acme" in message


def test_load_backend_with_another_name_inside_is_refused(site: Path, install: Install) -> None:
    """The entry point's name is what users type; the class must agree."""
    install("acme", GOOD.format(name="other", version="1.0", priority=1))
    assert "calls itself 'other'" in ask(site, LOAD.format(name="acme"))[1]


def test_load_backend_unknown_lists_those_installed(site: Path) -> None:
    """The first mistake a user makes is a misspelt device."""
    kind, message, _ = ask(site, LOAD.format(name="gpu"))
    assert kind == "ConfigError"
    assert "null" in message


def test_list_backends_sees_a_package_installed_in_the_same_process(
    site: Path, install: Install
) -> None:
    """No stale list: an installation shows at once, and so does its removal."""
    install("acme", GOOD.format(name="acme", version="1.0", priority=1))
    counts = ask(
        site,
        f"""
        import json, os, shutil
        from quire.core.discovery import list_backends
        names = lambda: [e.name for e in list_backends()]
        first = "acme" in names()
        shutil.rmtree({str(site / "quire_acme-1.2.3.dist-info")!r})
        second = "acme" in names()
        print(json.dumps([first, second]))
        """,
    )
    assert counts == [True, False]


CHOOSE = """
    import json
    from quire.core.discovery import choose_device
    from quire.core.errors import QuireError
    try:
        chosen = choose_device({asked!r})
        print(json.dumps([chosen.name, chosen.why]))
    except QuireError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def test_choose_device_auto_takes_the_highest_priority(site: Path, install: Install) -> None:
    """A real accelerator goes before the host; a broken neighbour changes nothing."""
    install("acme", GOOD.format(name="acme", version="1.0", priority=1000))
    install("second", GOOD.format(name="second", version="1.0", priority=999))
    install("broken", "raise RuntimeError('no driver')")
    name, why = ask(site, CHOOSE.format(asked="auto"))
    assert name == "acme"
    assert "priority" in why


def test_choose_device_never_takes_a_test_device_by_itself(site: Path, install: Install) -> None:
    """Devices of negative priority are for tests."""
    install("acme", GOOD.format(name="acme", version="1.0", priority=-1))
    assert ask(site, CHOOSE.format(asked="auto"))[0] != "acme"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("acme:7", "has devices 0"),
        ("acme:x", "whole number"),
        ("acme:", "acme"),
        ("nothing", "installed backends"),
    ],
)
def test_choose_device_wrong_index_says_what_there_is(
    site: Path, install: Install, asked: str, said: str
) -> None:
    """The index is checked against what the probe found."""
    install("acme", GOOD.format(name="acme", version="1.0", priority=1))
    assert said in " ".join(ask(site, CHOOSE.format(asked=asked)))
