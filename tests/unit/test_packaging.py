"""The distribution: what it contains, what it pulls in, and that the tree runs without being built."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import quire

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
FOLDERS = {
    source: name for name, source in PYPROJECT["tool"]["scikit-build"]["wheel"]["packages"].items()
}
PRESENT = sorted(folder for folder in FOLDERS if (ROOT / folder / "__init__.py").is_file())
# Names that a device's vendor publishes under, or that drag such packages in.
NOT_LIGHT = {
    "torch",
    "transformers",
    "triton",
    "safetensors",
    "tokenizers",
    "ray",
    "scipy",
    "pandas",
}


def run(*command, cwd, **env):
    """Run a command and return what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_of_quire_loads_nothing_heavy(tmp_path):
    """`import quire` is for everyone's start-up: torch and its like wait until they are used."""
    code = "import quire, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(run(sys.executable, "-c", code, cwd=tmp_path).split())
    assert loaded.isdisjoint(NOT_LIGHT | {"numpy", "msgspec", "fastapi"})


@pytest.mark.parametrize("name", [name for name in quire.__all__ if name != "__version__"])
def test_public_name_is_what_its_home_defines(name):
    """Each lazy name of the public face leads somewhere."""
    pytest.importorskip("torch")
    assert getattr(quire, name).__name__ == name
    assert name in dir(quire)


def test_unknown_public_name_is_an_attribute_error():
    """Misspelt names fail as they do on any module."""
    with pytest.raises(AttributeError, match="Quier"):
        _ = quire.Quier


def test_version_stands_in_one_place():
    """The metadata of the installation says what the source says; if not: install again."""
    assert importlib.metadata.version("quire") == quire.__version__
    assert "version" not in PROJECT


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_bare_dependencies_are_light(line):
    """Without an extra, nothing of a device's comes along: not even torch."""
    assert Requirement(line).name not in NOT_LIGHT


def test_backends_of_the_tree_are_entry_points_that_load():
    """In-tree backends are found as everyone's are."""
    pytest.importorskip("torch")
    declared = PROJECT["entry-points"]["quire.backends"]
    installed = {
        e.name: e
        for e in importlib.metadata.distribution("quire").entry_points
        if e.group == "quire.backends"
    }
    assert {name: entry.value for name, entry in installed.items()} == declared
    for name, entry in installed.items():
        assert entry.load().name == name


@pytest.mark.parametrize("folder", PRESENT)
def test_folder_is_the_import(folder):
    """core/ is quire.core: for Python, and through typing/ for type checkers."""
    module = import_module(FOLDERS[folder].replace("/", "."))
    assert Path(module.__file__).resolve() == ROOT / folder / "__init__.py"
    link = ROOT / "typing" / FOLDERS[folder] / "__init__.py"
    assert link.resolve() == ROOT / folder / "__init__.py"


def test_every_package_folder_is_in_the_wheel():
    """A new top-level package that the wheel would miss is noticed."""
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {
        "tests",
        "examples",
        "docs",
    }
    assert packages <= set(FOLDERS)


def test_unbuilt_tree_runs_and_is_discovered(tmp_path):
    """scripts/unbuilt stands in for an installation on a machine that has only Python."""
    code = (
        "import quire, quire.core, quire.kernels_cpu, importlib.metadata as m;"
        "print(quire.__file__, quire.core.__file__, quire.kernels_cpu.HAVE_NATIVE, m.version('quire'),"
        " *(e.value for e in m.entry_points(group='quire.backends')), sep='\\n')"
    )
    # -S: no site-packages, so that nothing of an installation can help.
    lines = run(
        sys.executable, ROOT / "scripts" / "unbuilt", "python", "-S", "-c", code, cwd=tmp_path
    ).splitlines()
    assert Path(lines[0]) == ROOT / "build" / "unbuilt" / "quire" / "__init__.py"
    assert Path(lines[1]) == ROOT / "core" / "__init__.py"
    assert lines[2:4] == ["False", quire.__version__]
    assert sorted(lines[4:]) == sorted(PROJECT["entry-points"]["quire.backends"].values())


def test_unbuilt_tree_asks_for_what_the_project_asks_for(tmp_path):
    """`quire doctor` holds the packages of a machine to it where nothing was installed, too."""
    code = "import importlib.metadata as m; print(*m.requires('quire'), sep='\\n')"
    command = (sys.executable, ROOT / "scripts" / "unbuilt", "python", "-S", "-c", code)
    told = [Requirement(line) for line in run(*command, cwd=tmp_path).splitlines()]
    for extra, lines in {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items():
        asked = {
            (r.name, str(r.specifier))
            for r in told
            if ("extra ==" in str(r.marker)) == bool(extra)
            and (r.marker is None or r.marker.evaluate({"extra": extra}))
        }
        wanted = {
            (r.name, str(r.specifier))
            for r in map(Requirement, lines)
            if r.marker is None or r.marker.evaluate()
        }
        assert asked == wanted, extra


def test_missing_kernels_say_what_to_do(tmp_path):
    """Without the compiled module the kernels are an error in words, not an AttributeError."""
    code = "import quire.kernels_cpu as k; print(k.WHY_NOT_NATIVE); k.isa()"
    command = (sys.executable, ROOT / "scripts" / "unbuilt", "python", "-S", "-c", code)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "without a C++ compiler" in done.stdout
    assert "RuntimeError: the compiled CPU kernels are missing" in done.stderr


def build_wheel(into, **env):
    """Build a wheel with this environment's build tools; returns its path."""
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", into)
    build = ("-C", f"build-dir={into}/build")
    run(sys.executable, "-m", "pip", "wheel", ROOT, *options, *build, cwd=into, **env)
    return next(into.glob("*.whl"))


@pytest.mark.slow
def test_wheel_without_a_compiler_is_pure_and_complete(tmp_path):
    """Who has no compiler still gets every Python file and the demo model."""
    wheel = build_wheel(tmp_path, CXX="/bin/false", QUIRE_REQUIRE_NATIVE="")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in [*PRESENT, "quire"]:
        package = FOLDERS[folder]
        expected = {
            f"{package}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")
        }
        assert expected <= names
    demo = {
        f"quire/{path.relative_to(ROOT / 'quire')}"
        for path in (ROOT / "quire" / "demo").rglob("*.safetensors")
    }
    assert demo <= names
    assert "quire/kernels_cuda/sources/copy_arrays.cu" in names, "built on the machine that runs it"
    assert not [name for name in names if "csrc" in name or name.startswith(("tests", "core"))]


@pytest.mark.slow
def test_required_native_build_that_fails_fails(tmp_path):
    """An error in the C++ never hides behind the pure wheel where QUIRE_REQUIRE_NATIVE is set."""
    with pytest.raises(AssertionError):
        build_wheel(tmp_path, CXX="/bin/false", QUIRE_REQUIRE_NATIVE="1")
