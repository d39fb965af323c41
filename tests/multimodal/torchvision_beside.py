"""torchvision beside a torch that its wheel was not built for, for the tests of image processors.

The wheel's operators load beside the CUDA build of torch alone, and its import then fails where it
adds to two of them. Image processors use none: with these two declared, all else is Python.
`scripts/install` puts the wheel where only those find it who ask:

    from torchvision_beside import use
    use()
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(sys.prefix) / "torchvision-beside"
"""Where the wheel lies; not among what the environment imports."""
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_LIBRARIES = []
"""What declares the operators: they last as long as it."""


def is_installed() -> bool:
    """Whether processes that import this module and call `use` have torchvision."""
    return FOLDER.is_dir() or importlib.util.find_spec("torchvision") is not None


def use() -> None:
    """Makes the wheel importable in this process; where torchvision is installed, nothing."""
    if importlib.util.find_spec("torchvision") is not None or not FOLDER.is_dir():
        return
    import torch

    sys.path.append(str(FOLDER))
    library = torch.library.Library("torchvision", "DEF")
    for schema in _OPERATORS:
        library.define(schema)
    _LIBRARIES.append(library)
    importlib.import_module("torchvision")
