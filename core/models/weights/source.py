"""Finds a model's files: the demo that comes with Quire, a directory, or a hub repository."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from quire.core.env import read_environment
from quire.core.errors import CheckpointError

DEMO = "demo"
"""The name of the model that is part of the package."""

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
_IGNORED = ["consolidated*", "original/*", "*/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


def resolve_model_directory(model: str, revision: str | None = None) -> Path:
    """The local directory of `model`: `demo`, a directory, or a hub id (downloaded if need be).

    For a GGUF file one is made.

    Raises: CheckpointError saying where was looked, and what to do.
    """
    if model == DEMO:
        return _demo_directory()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.is_file():
        # Here: planning reads no weights, and needs no torch for any other model.
        from quire.core.models.weights.gguf_directory import make_gguf_directory

        return make_gguf_directory(path, read_environment().cache_directory)
    if path.exists():
        raise CheckpointError(
            f"{model} is a file; give the directory that holds config.json and the weights"
        )
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{model} does not exist, and it is no hub id either; "
            "give a directory, `org/name`, or demo"
        )
    return _download(model, revision)


def _demo_directory() -> Path:
    locations = _package_locations()
    for location in locations:
        directory = Path(location) / DEMO
        if (directory / "config.json").is_file():
            return directory
    raise CheckpointError(
        f"the demo model is not part of this installation (looked in {', '.join(locations)}); "
        "install a released wheel, or give a directory or a hub id"
    )


def _package_locations() -> list[str]:
    package = find_spec("quire")
    return list(package.submodule_search_locations or ()) if package else []


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        directory = snapshot_download(
            model, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED
        )
    except errors.GatedRepoError as error:
        raise _failure(model, revision, "its repository is gated", _LOG_IN) from error
    except errors.RepositoryNotFoundError as error:
        raise _failure(model, revision, "the hub has no such repository", _CHECK) from error
    except errors.RevisionNotFoundError as error:
        raise _failure(model, revision, "it has no such revision", "check --revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise _failure(
            model, revision, "it is not cached, and the hub is out of reach", _OFFLINE
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise _failure(model, revision, str(error), _CHECK) from error
    return Path(directory)


_LOG_IN = "ask for access on its page, then log in with `hf auth login`"
_CHECK = "check the name (a local directory must exist), or log in if it is private"
_OFFLINE = "go online (HF_HUB_OFFLINE unset), or give a local directory"


def _failure(model: str, revision: str | None, cause: str, remedy: str) -> CheckpointError:
    asked = f"{model} at {revision}" if revision else model
    return CheckpointError(f"{asked} cannot be downloaded: {cause}; {remedy}")
