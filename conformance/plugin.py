"""The pytest plug-in: opens the device, runs cases, collects rows.

    pytest --pyargs quire.conformance.suite -p quire.conformance.plugin --backend acme -k decode

is for debugging; its report is marked unsealed. The official way is `quire conformance run`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire.conformance.cases import Case, all_cases, extension_cases
from quire.conformance.collection import case_of
from quire.conformance.extensions import chosen_extensions
from quire.conformance.ranks import RankGroups, opener_of
from quire.conformance.records import RawRun, Row, row_of
from quire.conformance.trial import run_case
from quire.core.discovery import load_backend
from quire.core.interface import Backend, Device

_PROPERTY = "conformance"
_SEED = "conformance_seed"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the suite."""
    group = parser.getgroup("conformance", "Quire's conformance suite")
    group.addoption("--backend", help="The backend under test, by name.")
    group.addoption("--level", type=int, default=2, help="The highest level to run.")
    group.addoption("--extensions", default="all", help="Extensions to try: all, none or NAME,...")
    group.addoption("--conformance-seed", type=int, help="The seed of the run; default: drawn.")
    group.addoption("--conformance-rows", help="A file for the rows, as JSON.")
    group.addoption("--conformance-report", help="A folder for an unsealed report.")


def pytest_configure(config: pytest.Config) -> None:
    """Draws the run's seed in the controller; workers are told it."""
    workerinput = getattr(config, "workerinput", None)
    given = config.getoption("--conformance-seed")
    drawn = secrets.randbits(32) if given is None else given
    seed = drawn if workerinput is None else workerinput[_SEED]
    config.pluginmanager.register(_Rows(config, seed), "conformance-rows")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tells the seed to a worker of xdist."""
    node.workerinput[_SEED] = _rows_of(node.config).seed


def pytest_report_header(config: pytest.Config) -> str:
    """Names the backend and the seed."""
    return f"conformance: backend {config.getoption('--backend')}, seed {_rows_of(config).seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drops the levels above the one asked for, and extensions that were not."""
    highest = config.getoption("--level")
    tried = chosen_extensions(config.getoption("--extensions"), highest)
    dropped = [
        item
        for item in items
        if (case := case_of(item))
        and (case.extension not in tried if case.extension else case.level > highest)
    ]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


def _rows_of(config: pytest.Config) -> _Rows:
    rows = config.pluginmanager.get_plugin("conformance-rows")
    assert isinstance(rows, _Rows), rows
    return rows


class _Rows:
    """Collects what the tests recorded, in the controller."""

    def __init__(self, config: pytest.Config, seed: int) -> None:
        self.seed = seed
        self._config = config
        self._rows: list[Row] = []
        self._is_controller = not hasattr(config, "workerinput")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes the row of a test that ran, or makes one for a process that died."""
        if not self._is_controller:
            return
        recorded = dict(report.user_properties).get(_PROPERTY)
        if recorded is not None and report.when == "call":
            self._rows.append(msgspec.json.decode(str(recorded), type=Row))
        elif report.failed:
            self._rows.append(_lost(report))

    def pytest_sessionfinish(self) -> None:
        """Writes the rows, sorted by id: the same in any order of running."""
        if not self._is_controller:
            return
        level = self._config.getoption("--level")
        raw = RawRun(
            seed=self.seed,
            level=level,
            rows=sorted(self._rows, key=lambda row: row.id),
            extensions=chosen_extensions(self._config.getoption("--extensions"), level),
        )
        if path := self._config.getoption("--conformance-rows"):
            Path(path).write_bytes(msgspec.json.encode(raw))
        if folder := self._config.getoption("--conformance-report"):
            from quire.conformance.reporting import make_report, write_report

            backend = self._config.getoption("--backend")
            write_report(make_report(backend, raw, is_sealed=False), Path(folder))


def _lost(report: pytest.TestReport) -> Row:
    case_id = report.nodeid.rpartition("/")[2]
    case = next((c for c in (*all_cases(), *extension_cases()) if c.id == case_id), None)
    return Row(
        id=case_id,
        level=case.level if case else 0,
        op=case.op if case else "",
        dtype=case.dtype if case else "",
        extension=case.extension if case else "",
        outcome="failed",
        reason="the test could not run to its end: the process that drives the device crashed, "
        f"hung until it was ended, or could not open it. {report.longreprtext[-1000:]}",
    )


class Bench:
    """The opened device, and how a case is run on it under pytest."""

    def __init__(
        self, backend: Backend, device: Device, *, seed: int, directory: Path, worker: str
    ) -> None:
        self._backend = backend
        self._device = device
        self._seed = seed
        self._directory = directory
        self._worker = worker
        self._rank_groups = RankGroups(opener_of(backend.name))

    def run(self, case: Case, record_property: Callable[[str, object], None]) -> None:
        """Runs one case and records its row."""
        outcome = run_case(
            case,
            self._device,
            backend=self._backend,
            seed=self._seed,
            directory=self._directory,
            rank_groups=self._rank_groups,
        )
        row = row_of(outcome, worker=self._worker)
        record_property(_PROPERTY, msgspec.json.encode(row).decode())
        if outcome.outcome == "unsupported":
            pytest.skip(f"unsupported: {outcome.reason}")
        if outcome.outcome == "failed":
            text = f"{outcome.reason}\n\nseed {self._seed}\n{outcome.details}"
            pytest.fail(text, pytrace=False)

    def close(self) -> None:
        """Ends the processes of other ranks, and closes the device."""
        self._rank_groups.close()
        self._device.close()


@pytest.fixture(scope="session")
def conformance(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    """The device under test, opened once for each process; worker i takes device i mod n."""
    config = request.config
    name = config.getoption("--backend")
    if not name:
        raise pytest.UsageError("the conformance suite needs --backend NAME")
    worker = getattr(config, "workerinput", {}).get("workerid", "main")
    backend = load_backend(name)
    devices = backend.probe().devices
    number = int(worker.removeprefix("gw")) if worker.startswith("gw") else 0
    if not devices:
        raise pytest.UsageError(f"backend {name!r} has no device: {backend.probe().problem}")
    device = backend.open(devices[number % len(devices)].index)
    bench = Bench(
        backend,
        device,
        seed=_rows_of(config).seed,
        directory=tmp_path_factory.mktemp("conformance"),
        worker=worker,
    )
    yield bench
    bench.close()
