"""Which libraries may serve attention, on whose devices, and whether they are there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.core.interface import Reason

if TYPE_CHECKING:
    from quire.backends.torch_accelerator.providers.library_attention import LibraryAttention

TRITON = "triton"
"""What serves attention where nobody asks for another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One library."""

    name: str
    """As the option says it."""
    module: str
    """What is imported; nothing of it is before it is asked for."""
    backends: tuple[str, ...]
    """Whose devices it runs on."""
    install: str
    load: Callable[[], type[LibraryAttention]]

    @property
    def is_installed(self) -> bool:
        """Whether the module can be found; it is not imported."""
        return importlib.util.find_spec(self.module) is not None


def _flash_attn() -> type[LibraryAttention]:
    from quire.backends.torch_accelerator.providers.flash_attn import FlashAttnAttention

    return FlashAttnAttention


def _flashinfer() -> type[LibraryAttention]:
    from quire.backends.torch_accelerator.providers.flashinfer import FlashInferAttention

    return FlashInferAttention


def _aiter() -> type[LibraryAttention]:
    from quire.backends.torch_accelerator.providers.flash_attn import AiterAttention

    return AiterAttention


def _ipex() -> type[LibraryAttention]:
    from quire.backends.torch_accelerator.providers.ipex import IpexAttention

    return IpexAttention


PROVIDERS = (
    Provider(
        name="flash_attn",
        module="flash_attn",
        backends=("cuda", "rocm"),
        install="pip install flash-attn --no-build-isolation",
        load=_flash_attn,
    ),
    Provider(
        name="flashinfer",
        module="flashinfer",
        backends=("cuda",),
        install="pip install flashinfer-python",
        load=_flashinfer,
    ),
    Provider(
        name="aiter",
        module="aiter",
        backends=("rocm",),
        install="build it from https://github.com/ROCm/aiter",
        load=_aiter,
    ),
    Provider(
        name="ipex",
        module="intel_extension_for_pytorch",
        backends=("xpu",),
        install='pip install "quire[ipex]"',
        load=_ipex,
    ),
)


def find_provider(backend: str, name: str) -> Provider | Reason:
    """The library of that name for a backend's devices, or why it cannot serve."""
    fitting = [provider for provider in PROVIDERS if backend in provider.backends]
    code, need = f"options.{backend}.attention", f"attention by {name}"
    chosen = next((provider for provider in fitting if provider.name == name), None)
    if chosen is None:
        names = ", ".join((TRITON, *(provider.name for provider in fitting)))
        return Reason(code=code, need=need, have=names, remedy="choose one of these")
    if not chosen.is_installed:
        return Reason(
            code=code,
            need=need,
            have=f"no module {chosen.module} in this environment",
            remedy=f"{chosen.install}, or leave {backend}.attention out for {TRITON}",
        )
    return chosen
