"""The class of a checkpoint's processor, also where torchvision is not installed.

Transformers hides a processor whose file takes a function from the image processor for torchvision.
Many have a twin for PIL beside it, with a function of the same name that counts the same patches.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files of a checkpoint that say how its images are prepared."""
_TORCHVISION = "torchvision"


def processor_class_of(model_type: str, directory: Path | None = None) -> Any:
    """The class; of a family that torchvision hides, the one that calls the twin for PIL.

    `directory`: of a checkpoint, whose files name the class where transformers does not.
    Raises: KeyError for a family without a processor, ImportError for one without a twin.
    """
    import transformers
    from transformers.models.auto import processing_auto

    names: Any = vars(processing_auto)["PROCESSOR_MAPPING_NAMES"]
    name = names.get(model_type) or (None if directory is None else _named_class(directory))
    if name is None:
        raise KeyError(model_type)
    found: Any = getattr(transformers, name)
    if _TORCHVISION not in missing_backends(found):
        return found
    return getattr(_with_twin(found.__module__), found.__name__)


def _named_class(directory: Path) -> str | None:
    """The class of processor that a checkpoint's files name."""
    for name in PROCESSOR_FILES:
        path = directory / name
        if path.is_file():
            named = json.loads(path.read_text(encoding="utf-8")).get("processor_class")
            if named:
                return str(named)
    return None


def missing_backends(found: Any) -> list[str]:
    """The libraries for whose lack transformers gives a stand-in instead of a class."""
    from transformers.utils.import_utils import DummyObject

    return list(getattr(found, "_backends", ())) if isinstance(found, DummyObject) else []


def _with_twin(name: str) -> ModuleType:
    """The module of a processor, imported with its images read by PIL."""
    folder, _, last = name.rpartition(".")
    family = last.removeprefix("processing_")
    twin = importlib.import_module(f"{folder}.image_processing_pil_{family}")
    with _standing_in(f"{folder}.image_processing_{family}", twin):
        return importlib.import_module(name)


@contextmanager
def _standing_in(name: str, twin: ModuleType) -> Iterator[None]:
    """Has an import of `name` find `twin`, for a while."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = twin
    try:
        yield
    finally:
        del sys.modules[name]
