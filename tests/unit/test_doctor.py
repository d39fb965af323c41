"""`quire doctor` with planted faults: each is named, with what to do, and ends with 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from quire.core.discovery import BackendEntry, BackendReport
from quire.core.doctor import (
    MIN_MEMORY_BYTES,
    Finding,
    Installed,
    check_backends,
    check_cache_directory,
    check_extras,
    check_memory,
    check_vendors,
    check_versions,
    is_healthy,
    read_installed,
    read_torch_build,
)
from quire.core.interface import DeviceInfo, Probe

REQUIREMENTS = (
    "msgspec>=0.19",
    'torch<2.14,>=2.8; extra == "torch"',
    'quire[torch]; extra == "board"',
    'fastapi>=0.115; platform_system != "Nothing" and extra == "serve"',
    'uvloop>=0.21; platform_system == "Nothing" and extra == "serve"',
)
GOOD = {"quire": "0.1.0", "msgspec": "0.20", "torch": "2.13.0+local", "fastapi": "0.120"}

PLUGIN = """
from quire.core.interface import Backend, DeviceInfo, Probe
class Plugin(Backend):
    name = "acme"
    interface_version = "{version}"
    def probe(self): return Probe(devices=(DeviceInfo(index=0, name="board"),), priority=-1)
    def open(self, index): raise NotImplementedError
"""


def installed(requires_python: str = ">=3.11", **versions: str | None) -> Installed:
    """An environment with these versions; None removes a package from the good one."""
    there = {**GOOD, **versions}
    return Installed(
        requirements=tuple(map(Requirement, REQUIREMENTS)),
        requires_python=requires_python,
        find_version=there.get,
    )


def wrong(findings) -> list[Finding]:
    """Those that end the command with 1."""
    return [finding for finding in findings if finding.status == "wrong"]


def report(name="acme", *, distribution="quire-acme", **changes) -> BackendReport:
    """What became of one backend."""
    entry = BackendEntry(name=name, target="m:C", distribution=distribution, version="1.0")
    return BackendReport(entry=entry, **changes)


BOARD = DeviceInfo(index=0, name="board", total_memory_bytes=64 << 30)
USABLE = report(probe=Probe(devices=(BOARD,)))


def test_packages_in_range_are_no_fault():
    """A sound environment is told to be one."""
    findings = [*check_versions(installed()), *check_extras(installed())]
    assert is_healthy(findings)
    assert {f.subject: f.status for f in findings} == {
        "python": "ok",
        "quire": "ok",
        "extra torch": "ok",
        "extra serve": "ok",
    }


@pytest.mark.parametrize(
    ("versions", "subject", "said"),
    [
        ({"msgspec": None}, "msgspec", "not installed; quire needs msgspec>=0.19"),
        ({"msgspec": "0.18"}, "msgspec", "0.18; quire needs msgspec>=0.19"),
        ({"torch": "2.14.1"}, "torch", "2.14.1; quire needs torch<2.14,>=2.8"),
        ({"fastapi": "0.1"}, "fastapi", "0.1; quire needs fastapi>=0.115"),
        ({"quire": None}, "quire", "without being installed"),
        ({"requires_python": ">=3.99"}, "python", "quire needs >=3.99"),
    ],
)
def test_version_out_of_range_is_wrong_and_told_once(versions, subject, said):
    """The range stands in Quire's own metadata; extras that share a package do not repeat it."""
    environment = installed(**versions)
    (fault,) = wrong([*check_versions(environment), *check_extras(environment)])
    assert fault.subject == subject
    assert said in fault.found
    assert fault.remedy


def test_extra_that_is_not_installed_is_a_note_with_its_command():
    """Nobody needs every extra."""
    findings = list(check_extras(installed(fastapi=None)))
    (note,) = [f for f in findings if f.status == "note"]
    assert note.found == "not installed: fastapi"
    assert note.remedy == 'pip install "quire[serve]" if you need it'


def test_package_of_a_backend_that_needs_another_quire_is_wrong():
    """pip warns once and is forgotten; the doctor still knows."""
    needs = {"quire-acme": [Requirement("quire[torch]>=0.7"), Requirement('x; extra == "dev"')]}
    (fault,) = check_vendors(installed(), needs)
    assert fault.found == "0.1.0; quire-acme needs quire>=0.7"


def test_this_environment_reads_its_own_metadata():
    """The requirements are those that pip installed Quire by."""
    here = read_installed()
    assert {"msgspec", "torch"} <= {r.name for r in here.requirements}
    assert here.requires_python == ">=3.11"


def test_torch_build_is_read_without_importing_it(tmp_path):
    """Every accelerator that a build names, whatever it is called."""
    path = tmp_path / "version.py"
    path.write_text(
        "from typing import Optional\n__version__ = '9.1+z'\ndebug = False\n"
        "zeta: Optional[str] = '12.8'\nother: Optional[str] = None\n"
    )
    assert read_torch_build(path) == {"__version__": "9.1+z", "zeta": "12.8"}


@pytest.mark.parametrize("text", [None, "", "def broken(", "debug = True"])
def test_torch_build_that_is_broken_says_nothing(tmp_path, text):
    """An installation that was cut off must not end the doctor."""
    path = tmp_path / "version.py"
    if text is not None:
        path.write_text(text)
    assert read_torch_build(path) == {}


def test_broken_backend_shows_the_last_line_of_its_traceback():
    """The line that names the error, not forty lines of it."""
    details = (
        "Traceback (most recent call last):\n  File ...\nImportError: libacme.so: no such file\n"
    )
    (fault,) = wrong(check_backends([USABLE, report("bad", error="long", details=details)]))
    assert fault.subject == "backend bad"
    assert fault.found.endswith("cannot be loaded: ImportError: libacme.so: no such file")
    assert "uninstall quire-acme" in fault.remedy


def test_name_claimed_twice_is_one_finding_that_names_both():
    """Two rows of the same complaint help nobody."""
    rivals = [report("twin", distribution=name, error="claimed") for name in ("one", "two")]
    (fault,) = wrong(check_backends([USABLE, *rivals]))
    assert "one 1.0 and two 1.0" in fault.found
    assert "pip uninstall two" in fault.remedy


def test_missing_native_kernels_are_a_warning_with_the_remedy():
    """It runs, slower than it could."""
    probe = Probe(devices=(BOARD,), problem="slower: no kernels", remedy="install a compiler")
    (finding,) = check_backends([report(probe=probe)])
    assert (finding.status, finding.remedy) == ("warning", "install a compiler")
    assert "no kernels" in finding.found


@pytest.mark.parametrize("priority", [-1, None])
def test_no_device_to_run_on_is_wrong(priority):
    """Devices for tests, and backends that found nothing, do not count."""
    probe = Probe(problem="no card") if priority is None else Probe(devices=(BOARD,), priority=-1)
    (fault,) = wrong(check_backends([report(probe=probe)]))
    assert fault.subject == "devices"


def test_cache_directory_below_a_file_is_wrong(tmp_path):
    """It could never be made."""
    (tmp_path / "file").write_text("")
    (fault,) = check_cache_directory(tmp_path / "file" / "quire")
    assert (fault.status, "QUIRE_CACHE" in fault.remedy) == ("wrong", True)
    assert "is no directory" in fault.found


def test_cache_directory_that_is_read_only_is_wrong(tmp_path, monkeypatch):
    """Said at once, not at the first compilation."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    (fault,) = check_cache_directory(tmp_path / "quire")
    assert "may not be written to" in fault.found
    assert not (tmp_path / "quire").exists()


def test_memory_below_the_least_is_wrong_on_host_and_device():
    """Before weights load, in one line each."""
    small = DeviceInfo(index=2, name="small", total_memory_bytes=MIN_MEMORY_BYTES - 1)
    findings = list(check_memory([report(probe=Probe(devices=(BOARD, small)))], 5 << 20))
    assert [(f.status, f.subject) for f in findings] == [
        ("wrong", "memory of the host"),
        ("wrong", "memory of acme:2"),
    ]
    (fine,) = check_memory([USABLE], MIN_MEMORY_BYTES)
    assert fine.status == "ok"


def ask(
    site: Path, *arguments: str, torch: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`quire doctor` where `site` is installed, which has a torch whose import runs `torch`."""
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text(torch)
    (site / "torch" / "version.py").write_text("__version__ = '9.1'\nzeta = '12.8'\n")
    return subprocess.run(
        [sys.executable, "-m", "quire", "doctor", *arguments],
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def plant(site: Path, distribution: str, source: str) -> None:
    """Installs a distribution whose backend is called acme."""
    module = distribution.replace("-", "_")
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n")
    (info / "entry_points.txt").write_text(f"[quire.backends]\nacme = {module}:Plugin\n")


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (["import sys; sys.exit(3)"], "SystemExit: 3"),
        (["raise RuntimeError('driver too old')"], "RuntimeError: driver too old"),
        (["import os; os._exit(7)"], "status 7"),
        (["print('{}'); import os; os.write(1, b'junk'); raise ValueError('odd')"], "ValueError"),
        ([PLUGIN.format(version="2.0")], "written for interface 2.0"),
        ([PLUGIN.format(version="1.0")] * 2, "claimed by"),
    ],
)
def test_doctor_with_a_planted_backend_names_it_and_ends_with_1(tmp_path, sources, said):
    """The whole command, in a process of its own, survives whatever is installed."""
    for number, source in enumerate(sources):
        plant(tmp_path, f"quire-acme{number}", source)
    done = ask(tmp_path, "--json")
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert not answer["is_healthy"]
    faults = [f for f in answer["findings"] if f["subject"] == "backend acme"]
    assert [f["status"] for f in faults] == ["wrong"]
    assert said in faults[0]["found"]
    assert faults[0]["remedy"]


@pytest.mark.parametrize(
    ("torch", "status", "said"),
    [
        ("", "ok", "9.1, built for zeta 12.8"),
        ("raise ImportError('libzeta.so.12: not found')", "wrong", "ImportError: libzeta.so.12"),
        ("import os; os._exit(139)", "wrong", "ended with 139"),
    ],
)
def test_doctor_says_whether_torch_can_be_imported(tmp_path, torch, status, said):
    """A build for other drivers is the commonest fault of all, and may end the process."""
    done = ask(tmp_path, "--json", torch=torch)
    (finding,) = [f for f in json.loads(done.stdout)["findings"] if f["subject"] == "torch"]
    assert finding["status"] == status
    assert said in finding["found"]
    assert done.returncode == (status == "wrong")


def test_doctor_table_shows_fault_and_remedy(tmp_path):
    """What a person reads."""
    (tmp_path / "file").write_text("")
    done = ask(tmp_path, QUIRE_CACHE=str(tmp_path / "file" / "below"))
    assert done.returncode == 1
    assert "set QUIRE_CACHE to a directory" in done.stdout
    assert "Something is wrong" in done.stdout


def test_doctor_loads_no_backend_into_its_own_process(tmp_path):
    """What a plug-in changes where it is loaded, it changes elsewhere."""
    plant(tmp_path, "quire-acme", PLUGIN.format(version="1.0"))
    program = (
        "import sys; from quire.core.doctor import diagnose; findings = diagnose();"
        "print([f.status for f in findings if f.subject == 'backend acme'],"
        "[name for name in sys.modules if 'acme' in name or 'quire.backends' in name])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.stdout == "['ok'] []\n", done.stderr


def test_doctor_imports_no_torch():
    """It must work where torch is what is broken."""
    program = "import sys, quire.core.doctor; print('torch' in sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr
