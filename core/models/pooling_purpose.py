"""What a checkpoint is for, told by its files alone. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODULES_FILE = "modules.json"
_ENDS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "Model")


def is_for_pooling(directory: Path, raw: dict[str, Any], task: str) -> bool:
    """Whether a model runs as one that makes numbers of texts.

    `task`: the user's choice, or `auto`: what the layout and the architecture say.
    """
    if task != "auto":
        return task != "generate"
    if (directory / MODULES_FILE).is_file():
        return True
    names: list[str] = list(raw.get("architectures") or ())
    return any(name.endswith(_ENDS) and not _generates(name) for name in names[:1])


def _generates(name: str) -> bool:
    return name.endswith(("LMHeadModel", "DoubleHeadsModel", "MTModel", "EncoderDecoderModel"))
