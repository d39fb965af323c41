"""A vendor's package, really installed: what the official command makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("torch")

from quire.conformance.reporting import read_report
from quire.conformance.verification import verify

VENDOR = """
    import os
    from quire.backends.reference import TorchDevice
    from quire.core.interface import Backend, DeviceInfo, Probe

    INFO = DeviceInfo(index=0, name="Acme One", architecture="acme1")

    class Board(TorchDevice):
        def memory(self):
            {memory}

    class Plugin(Backend):
        name = "{name}"
        interface_version = "1.0"

        def probe(self):
            return Probe(devices=(INFO,))

        def open(self, index):
            return Board(info=INFO)
"""


def install(site: Path, name: str, memory: str) -> None:
    """A distribution with one backend."""
    (site / f"quire_{name}.py").write_text(textwrap.dedent(VENDOR.format(name=name, memory=memory)))
    info = site / f"quire_{name}-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: quire-{name}\nVersion: 1.2.3\n")
    (info / "entry_points.txt").write_text(f"[quire.backends]\n{name} = quire_{name}:Plugin\n")


def certify(site: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`quire conformance run` with that package installed."""
    command = [sys.executable, "-m", "quire", "conformance", "run", "--backend", name]
    return subprocess.run(
        [*command, "--report", str(site / name), *options],
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_vendor_of_fourteen_lines_is_granted_its_level(tmp_path):
    """No test code, no configuration: an entry point is enough."""
    install(tmp_path, "acme", "return super().memory()")
    done = certify(tmp_path, "acme", "--level", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    report = read_report(tmp_path / "acme" / "report.json")
    assert report.headline == "acme: level 0"
    assert (report.device, report.architecture) == ("Acme One", "acme1")
    assert report.distribution == "quire-acme 1.2.3 (quire_acme:Plugin)"
    assert (report.cost.files, report.cost.lines_of_code) == (1, 14)
    assert report.cost.assignments == []
    assert verify(tmp_path / "acme" / "report.json") == []
    assert "Acme One" in (tmp_path / "acme" / "report.html").read_text()


def broken_package(site: Path, distribution: str, source: str) -> None:
    """A distribution whose backend is called acme."""
    module = distribution.replace("-", "_")
    (site / f"{module}.py").write_text(textwrap.dedent(source))
    info = site / f"{module}-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n")
    (info / "entry_points.txt").write_text(f"[quire.backends]\nacme = {module}:Plugin\n")


GOOD = VENDOR.format(name="acme", memory="return super().memory()")


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["import sys; sys.exit(0)"], ["cannot be imported", "SystemExit", "quire-acme0 1.2.3"]),
        ([GOOD.replace('"1.0"', '"2.0"')], ["written for interface 2.0"]),
        ([GOOD.replace('"1.0"', '"one"')], ["'one'"]),
        ([GOOD, GOOD], ["is claimed by", "quire-acme0", "quire-acme1", "uninstall all but one"]),
    ],
    ids=["exits-at-import", "newer-interface", "no-version", "two-packages"],
)
def test_run_of_a_package_that_cannot_be_loaded_says_why_and_fails(tmp_path, sources, words):
    """Nothing runs, the exit status is not 0, and the message names the package."""
    for number, source in enumerate(sources):
        broken_package(tmp_path, f"quire-acme{number}", source)
    done = certify(tmp_path, "acme", "--level", "0")
    assert done.returncode != 0
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "acme").exists()


@pytest.mark.slow
def test_vendor_whose_driver_kills_the_process_fails_those_tests_alone(tmp_path):
    """A crash is a row with a reason, and the other tests still say something."""
    install(tmp_path, "crash", "os._exit(11)")
    done = certify(tmp_path, "crash", "--level", "0")
    assert done.returncode == 1, done.stdout + done.stderr
    report = read_report(tmp_path / "crash" / "report.json")
    failed = {
        row.id.partition("::")[2]: row.reason for row in report.rows if row.outcome == "failed"
    }
    assert set(failed) == {"test_memory_is_sane", "test_out_of_memory_is_typed"}
    assert all("crashed" in reason for reason in failed.values()), failed
    assert report.counts["passed"] >= 10
    assert "level 0 not granted: 2 failed" in done.stdout
