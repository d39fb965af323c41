"""Kernels of CUDA C++ without a compiler at installation: NVRTC builds them, the driver runs them.

Both libraries come with torch's build for CUDA and NVIDIA's driver and are called by their C
interfaces, so that nothing here depends on torch's C++. Sources lie beside this file as text.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).parent / "sources"
_STANDARD = "--std=c++17"
_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


class CudaError(RuntimeError):
    """A call of CUDA's that failed, with what it said."""


def open_driver() -> ctypes.CDLL:
    """NVIDIA's driver, which torch has loaded before. Raises: CudaError if it is not there."""
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise CudaError(f"NVIDIA's driver cannot be loaded: {error}") from error


def open_compiler(major: int) -> ctypes.CDLL:
    """NVRTC of CUDA `major`, as torch brings it. Raises: CudaError naming where it was sought."""
    candidates = list(_compilers(major))
    for name in candidates:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError(f"NVRTC of CUDA {major} was not found as {', '.join(candidates)}")


def _compilers(major: int) -> Iterator[str]:
    """By name, which finds what torch has loaded; then in the wheels of NVIDIA's namespace."""
    if sys.platform == "win32":
        yield f"nvrtc64_{major}0_0.dll"
        return
    name = f"libnvrtc.so.{major}"
    yield name
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from map(str, sorted(Path(folder).glob(f"*/lib/{name}")))


def compile_source(compiler: ctypes.CDLL, source: Path, architecture: str) -> bytes:
    """Machine code of `source` for `sm_90` and the like. Raises: CudaError with NVRTC's log."""
    program = ctypes.c_void_p()
    _ask(
        compiler,
        "nvrtcCreateProgram",
        *(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None),
    )
    try:
        options = (ctypes.c_char_p * 2)(f"--gpu-architecture={architecture}".encode(), b"")
        options[1] = _STANDARD.encode()
        if compiler.nvrtcCompileProgram(program, len(options), options):
            log = _read(compiler, "nvrtcGetProgramLog", program).rstrip(b"\0").decode()
            raise CudaError(f"{source.name} does not compile for {architecture}: {log.strip()}")
        return _read(compiler, "nvrtcGetCUBIN", program)
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


def _read(compiler: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _ask(compiler, f"{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _ask(compiler, what, program, buffer)
    return buffer.raw


def _ask(compiler: ctypes.CDLL, function: str, *arguments: object) -> None:
    status = getattr(compiler, function)(*arguments)
    if status:
        compiler.nvrtcGetErrorString.restype = ctypes.c_char_p
        said = compiler.nvrtcGetErrorString(status) or b"unknown"
        raise CudaError(f"{function}: {said.decode()}")


class Kernel:
    """One function of a loaded module, in the context that is current when it is made."""

    def __init__(self, driver: ctypes.CDLL, image: bytes, name: str) -> None:
        """Raises: CudaError if the driver does not take the image or has no such function."""
        self._driver = driver
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._launch = driver.cuLaunchKernel
        self._launch.argtypes = [
            ctypes.c_void_p,
            *[ctypes.c_uint] * 7,
            *[ctypes.c_void_p] * 3,
        ]
        self._check("cuModuleLoadData", ctypes.byref(self._module), image)
        self._check(
            "cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode()
        )

    def launch(
        self,
        grid: Sequence[int],
        num_threads: int,
        arguments: ctypes.Array[ctypes.c_void_p],
        stream: int,
    ) -> None:
        """Queues the kernel. `arguments`: an address of each; they are read before this returns.

        Raises: CudaError; also for work before this that failed.
        """
        x, y = grid
        status = self._launch(
            self._function, x, y, 1, num_threads, 1, 1, 0, stream, arguments, None
        )
        if status:
            self._raise("cuLaunchKernel", status)

    def _check(self, function: str, *arguments: object) -> None:
        status = getattr(self._driver, function)(*arguments)
        if status:
            self._raise(function, status)

    def _raise(self, function: str, status: int) -> None:
        said = ctypes.c_char_p()
        self._driver.cuGetErrorString(status, ctypes.byref(said))
        text = (said.value or b"unknown").decode()
        raise CudaError(f"CUDA error: {text} ({function}: {status})")
