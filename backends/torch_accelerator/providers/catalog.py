"""Which libraries may serve attention, on whose devices, and whether they are there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.core.interface import Reason

if TYPE_CHECKING:
    from quire.backends.torch_accelerator.ops import TritonOps
    from quire.backends.torch_accelerator.providers.library_attention import LibraryAttention

TRITON = "triton"
"""What serves where nobody asks for another."""
ATTENTION, OPS = "attention", "ops"
"""What may be asked of another: options are `xpu.attention`, `xpu.ops`."""


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
    load_ops: Callable[[], type[TritonOps]] | None = None
    """Its fused operators; None: it is asked for attention alone."""

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


def _ipex_ops() -> type[TritonOps]:
    from quire.backends.torch_accelerator.providers.ipex_ops import IpexOps

    return IpexOps


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
        load_ops=_ipex_ops,
    ),
)


def find_provider(backend: str, name: str, what: str = ATTENTION) -> Provider | Reason:
    """The library of that name for a backend's devices, or why it cannot serve `what`."""
    fitting = [
        provider
        for provider in PROVIDERS
        if backend in provider.backends and (what == ATTENTION or provider.load_ops is not None)
    ]
    code, need = f"options.{backend}.{what}", f"{what} by {name}"
    chosen = next((provider for provider in fitting if provider.name == name), None)
    if chosen is None:
        names = ", ".join((TRITON, *(provider.name for provider in fitting)))
        return Reason(code=code, need=need, have=names, remedy="choose one of these")
    if not chosen.is_installed:
        return Reason(
            code=code,
            need=need,
            have=f"no module {chosen.module} in this environment",
            remedy=f"{chosen.install}, or leave {backend}.{what} out for {TRITON}",
        )
    return chosen
