"""The official run: pytest in a process of its own, in which nothing of anybody else has a say.

No conftest, no ini file, no addopts, no plug-ins that load themselves; an empty working directory.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from quire import conformance
from quire.conformance.cases import HIGHEST_LEVEL
from quire.conformance.expectations import read_expectations
from quire.conformance.extensions import chosen_extensions
from quire.conformance.records import RawRun, Report
from quire.conformance.reporting import make_report, write_report
from quire.core.discovery import load_backend
from quire.core.env import make_child_environment
from quire.core.errors import ConfigError

_CHANGES = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
_WITHOUT = ("PYTEST_",)
"""Prefixes of variables with which pytest would let itself be told things."""
_HANG_S = 300
"""A test that takes so long hangs: its process ends, and the test has failed."""
_INI = f"""[pytest]
faulthandler_timeout = {_HANG_S}
faulthandler_exit_on_timeout = true
"""
_MAX_CRASHES = 20


def run_suite(
    backend: str,
    *,
    level: int = 3,
    extensions: str = "all",
    workers: int = 1,
    seed: int | None = None,
    expectations: Path | None = None,
    folder: Path | None = None,
    baseline: Report | None = None,
    is_quiet: bool = False,
) -> Report:
    """Runs the sealed suite on `backend` and writes its report into `folder`, where given.

    `extensions` is `all`, `none` or `NAME,...`: those to try where the device claims them.

    Raises: ConfigError, PluginError before anything runs if the run cannot be.
    """
    if not 0 <= level <= HIGHEST_LEVEL:
        raise ConfigError(
            f"level {level} was asked for; this suite has levels 0 to {HIGHEST_LEVEL}"
        )
    tried = chosen_extensions(extensions, level)
    excuses = read_expectations(expectations) if expectations else []
    probe = load_backend(backend).probe()
    if not probe.is_usable:
        raise ConfigError(f"backend {backend!r} has no device: {probe.problem} {probe.remedy}")
    options = [
        *("--backend", backend, "--level", str(level), "--extensions", ",".join(tried) or "none"),
        *(() if seed is None else ("--conformance-seed", str(seed))),
    ]
    raw = _run_sealed(options, workers=workers, is_quiet=is_quiet)
    report = make_report(backend, raw, is_sealed=True, expectations=excuses)
    if folder is not None:
        write_report(report, folder, baseline=baseline)
    return report


def _run_sealed(options: Sequence[str], *, workers: int, is_quiet: bool) -> RawRun:
    with tempfile.TemporaryDirectory(prefix="quire-conformance-") as name:
        where = Path(name)
        rows, ini = where / "rows.json", where / "pytest.ini"
        ini.write_text(_INI)
        command = [
            *_command(ini, workers),
            *options,
            *("--conformance-rows", str(rows), "--basetemp", str(where / "files")),
        ]
        empty = where / "empty"
        empty.mkdir()
        output = subprocess.PIPE if is_quiet else None
        done = subprocess.run(  # noqa: S603 - our own interpreter and arguments
            command,
            cwd=empty,
            env=make_child_environment(without=_WITHOUT, changes=_CHANGES),
            stdout=output,
            stderr=subprocess.STDOUT if is_quiet else None,
            text=True,
            check=False,
        )
        if not rows.exists():
            said = f": {done.stdout[-2000:]}" if done.stdout else ""
            raise ConfigError(f"the suite did not run (pytest ended with {done.returncode}){said}")
        return msgspec.json.decode(rows.read_bytes(), type=RawRun)


def _command(ini: Path, workers: int) -> Sequence[str]:
    suite = Path(str(conformance.__file__)).parent / "suite"
    return [
        *(sys.executable, "-m", "pytest", str(suite)),
        *("-c", str(ini), "--rootdir", str(suite), "--noconftest", "--import-mode=importlib"),
        *("-p", "quire.conformance.plugin", "-p", "no:cacheprovider"),
        *("-q", "--no-header", "--tb=short"),
        # One process at least that is not this one: a backend that crashes fails one test.
        *("-p", "xdist.plugin", "-n", str(max(1, workers))),
        f"--max-worker-restart={_MAX_CRASHES}",
    ]
