"""Quire: an inference and serving engine whose accelerator is a plug-in.

Importing this module is cheap: neither torch nor transformers is loaded before a name that needs
them is used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.core.engine.async_engine import AsyncEngine
    from quire.core.engine.llm import LLM
    from quire.core.errors import QuireError
    from quire.core.outputs import CompletionOutput, Logprob, RequestOutput
    from quire.core.sampling_params import SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "Logprob",
    "QuireError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

_HOME_OF = {
    "LLM": "quire.core.engine.llm",
    "AsyncEngine": "quire.core.engine.async_engine",
    "CompletionOutput": "quire.core.outputs",
    "Logprob": "quire.core.outputs",
    "QuireError": "quire.core.errors",
    "RequestOutput": "quire.core.outputs",
    "SamplingParams": "quire.core.sampling_params",
    "StructuredOutputsParams": "quire.core.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_HOME_OF])


def _checkout_root() -> Path | None:
    """The repository this file lies in, or None when it is installed.

    In a checkout the sub-packages are siblings of this folder (core/ is quire.core), so that the
    tree runs unbuilt and uninstalled once the root belongs to the package's path.
    """
    root = Path(__file__).resolve().parent.parent
    is_checkout = (root / "core" / "interface").is_dir() and (root / "pyproject.toml").is_file()
    return root if is_checkout else None


if (_root := _checkout_root()) is not None and str(_root) not in __path__:
    __path__.append(str(_root))
