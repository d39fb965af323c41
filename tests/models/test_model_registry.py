"""Who runs a model: families of ours, of packages from outside, and transformers' own code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from paged_runs import load_tiny, make_worker_config, run_greedy  # noqa: E402
from tiny_models import make_tiny_model  # noqa: E402

from quire.backends.reference import TorchDevice  # noqa: E402
from quire.core.errors import CheckpointError, PluginError, UnsupportedError  # noqa: E402
from quire.core.interface import DeviceInfo  # noqa: E402
from quire.core.models.registry import (  # noqa: E402
    describe,
    list_model_entries,
    load_language_model,
)

PROMPT = list(range(10, 40))

ACME = """
from quire.core.models.families import Family
from quire.core.models.families.llama import describe
FAMILY = Family(architecture="AcmeForCausalLM", describe=describe)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package on the path that brings architectures by entry points."""

    def install(name: str, source: str, architecture: str, attribute: str = "FAMILY") -> None:
        site = tmp_path / "site"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[quire.models]\n{architecture} = {name}:{attribute}\n"
        )
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, name, raising=False)

    return install


def rename_architecture(directory: Path, architecture: str) -> Path:
    """The same checkpoint under another architecture's name."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [architecture]}))
    return directory


def load(directory: Path, **changes: object):
    """The model as the worker loads it, on the reference."""
    device = TorchDevice(info=DeviceInfo(index=0, name="host"))
    return load_language_model(make_worker_config(directory, **changes), device)


def test_family_from_outside_the_tree_runs_as_a_native_one(install, tmp_path):
    """A package adds an architecture without a line changed here, and its name is shown."""
    expected = run_greedy(
        load_tiny(make_tiny_model("llama", tmp_path, with_tokenizer=False)), [PROMPT], 5, chunk=9
    )[0]
    install("acme_models", ACME, "AcmeForCausalLM")
    directory = rename_architecture(tmp_path / "llama", "AcmeForCausalLM")
    assert describe(directory).implementation == "acme_models"
    assert run_greedy(load(directory), [PROMPT], 5, chunk=9)[0] == expected


def test_broken_package_is_listed_and_harms_nobody_else(install, tmp_path):
    """Listing imports nothing; a model of another architecture loads as before."""
    install("broken_models", "raise RuntimeError('no such library')", "BrokenForCausalLM")
    entries = {entry.architecture: entry.target for entry in list_model_entries()}
    assert entries["BrokenForCausalLM"] == "broken_models:FAMILY"
    assert "broken_models" not in sys.modules
    directory = make_tiny_model("llama", tmp_path, with_tokenizer=False)
    assert describe(directory).implementation == "native"


def test_broken_package_asked_for_says_which_and_why(install, tmp_path):
    """The error names the distribution, the cause and the way round it."""
    install("broken_models", "raise RuntimeError('no such library')", "BrokenForCausalLM")
    directory = make_tiny_model("llama", tmp_path, with_tokenizer=False)
    rename_architecture(directory, "BrokenForCausalLM")
    with pytest.raises(PluginError, match=r"broken_models.*no such library.*--model-impl") as error:
        describe(directory)
    assert "Traceback" in error.value.details


def test_entry_that_is_no_family_is_refused(install, tmp_path):
    """A wrong target is told apart from a broken one."""
    install("odd_models", "FAMILY = 3", "OddForCausalLM")
    directory = make_tiny_model("llama", tmp_path, with_tokenizer=False)
    rename_architecture(directory, "OddForCausalLM")
    with pytest.raises(PluginError, match="names a Family or a ModelImplementation"):
        describe(directory)


def test_native_asked_for_unknown_architecture_lists_the_known(tmp_path):
    """`--model-impl native` never falls back in silence."""
    directory = make_tiny_model("llama", tmp_path, with_tokenizer=False)
    rename_architecture(directory, "NobodyForCausalLM")
    with pytest.raises(CheckpointError, match=r"no native family.*LlamaForCausalLM"):
        describe(directory, model_impl="native")


def test_feature_that_the_native_family_lacks_falls_back_with_a_note(tmp_path):
    """`auto` runs what the family refuses, and says that it does."""
    directory = make_tiny_model("llama", tmp_path, with_tokenizer=False, hidden_act="relu")
    with pytest.raises(UnsupportedError, match="relu"):
        describe(directory, model_impl="native")
    description = describe(directory)
    assert description.implementation == "transformers"
    assert "relu" in description.notes[0]


def test_model_of_a_native_family_gives_the_same_tokens_either_way(tmp_path):
    """The two implementations of one model are the same model."""
    directory = make_tiny_model("qwen2", tmp_path, with_tokenizer=False)
    native = run_greedy(load(directory), [PROMPT, PROMPT[:7]], 6, chunk=8)[0]
    adapted = load(directory, model_impl="transformers")
    assert adapted.description.implementation == "transformers"
    assert run_greedy(adapted, [PROMPT, PROMPT[:7]], 6, chunk=8)[0] == native
