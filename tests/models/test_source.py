"""Where models come from, and what is said when they do not."""

from __future__ import annotations

import httpx
import pytest

pytest.importorskip("huggingface_hub")

from huggingface_hub import errors

from quire.core.errors import CheckpointError
from quire.core.models.weights import source
from quire.core.models.weights.source import resolve_model_directory


def test_existing_directory_is_taken_as_it_is(tmp_path):
    """A local model needs no hub."""
    assert resolve_model_directory(str(tmp_path)) == tmp_path


def test_home_is_expanded(tmp_path, monkeypatch):
    """`~` means what it means in a shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert resolve_model_directory("~/models") == tmp_path / "models"


def test_file_is_refused(tmp_path):
    """A weights file is not a model."""
    path = tmp_path / "model.safetensors"
    path.write_text("")
    with pytest.raises(CheckpointError, match="give the directory"):
        resolve_model_directory(str(path))


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/place", "a/b/c", "with space"])
def test_path_that_does_not_exist_never_reaches_the_hub(model, monkeypatch):
    """A mistyped path is not looked for on the internet."""
    monkeypatch.setattr(source, "_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_model_directory(model)


def test_model_that_is_not_cached_is_refused_offline():
    """Offline, the message says so and what to do."""
    with pytest.raises(CheckpointError, match=r"no-org/no-model .*out of reach.*local directory"):
        resolve_model_directory("no-org/no-model")


def _response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.test/x"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError("x", response=_response(404)), "no such repository"),
        (errors.GatedRepoError("x", response=_response(403)), "gated"),
        (errors.RevisionNotFoundError("x", response=_response(404)), "no such revision"),
        (errors.HfHubHTTPError("server trouble", response=_response(500)), "server trouble"),
        (OSError("disk full"), "disk full"),
    ],
)
def test_refusal_of_the_hub_says_what_to_do(error, message, monkeypatch):
    """Every failure is a CheckpointError that names the model and the revision."""

    def refuse(*_args, **_settings):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_model_directory("org/name", "v2")
    assert "org/name at v2" in str(caught.value)


def test_download_asks_for_configs_tokenizers_and_safetensors_alone(tmp_path, monkeypatch):
    """Nobody downloads a model three times, in three formats."""
    asked = {}

    def download(model, **settings):
        asked.update(settings, model=model)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model_directory("org/name", "main") == tmp_path
    assert (asked["model"], asked["revision"]) == ("org/name", "main")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(".bin" in pattern for pattern in asked["allow_patterns"])


def test_demo_is_found_in_the_package(tmp_path, monkeypatch):
    """`quire serve demo` works without a network."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    monkeypatch.setattr(source, "_package_locations", lambda: [str(tmp_path)])
    assert resolve_model_directory("demo") == tmp_path / "demo"


def test_demo_that_was_not_installed_is_said_to_be_missing(tmp_path, monkeypatch):
    """A checkout without the demo says so, rather than asking the hub for it."""
    monkeypatch.setattr(source, "_package_locations", lambda: [str(tmp_path)])
    with pytest.raises(CheckpointError, match="not part of this installation"):
        resolve_model_directory("demo")
