"""Copies of a step's arrays by one launch: the kernel's own source, run on the host.

A stand-in for CUDA's driver and compiler is built with the kernel in it, so that what is tested is
all that runs on a device but the device: descriptors, launches and the kernel's arithmetic.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.backends.cuda.backend import CUDA
from quire.kernels_cuda import copies as copies_module
from quire.kernels_cuda import driver as driver_module
from quire.kernels_cuda.copies import MAX_ARRAYS, SOURCE, open_copies
from quire.kernels_cuda.driver import CudaError, open_compiler

COMPILER = shutil.which("g++") or shutil.which("clang++")
EMULATION = Path(__file__).parent / "emulated_cuda.cpp"
CPU = torch.device("cpu")
COMPILING, LOADING, LAUNCHING = range(3)
DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bfloat16)

pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a compiler of C++")


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    """The stand-in, built once. A word at a wrong address ends the process, as it ends a kernel."""
    library = tmp_path_factory.mktemp("cuda") / "emulated_cuda.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    flags += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    subprocess.run(
        [COMPILER, *flags, f'-DCOPY_ARRAYS="{SOURCE}"', str(EMULATION), "-o", str(library)],
        check=True,
    )
    loaded = ctypes.CDLL(str(library))
    for function in ("launches", "stream", "size_of_array", "max_arrays"):
        getattr(loaded, function).restype = ctypes.c_uint64
    loaded.options.restype = ctypes.c_char_p
    return loaded


@pytest.fixture
def fault(cuda):
    """Makes calls fail, and work again afterwards."""
    yield cuda.set_fault
    for where in (COMPILING, LOADING, LAUNCHING):
        cuda.set_fault(where, 0)


def opened(cuda, stream=7):
    return open_copies("sm_90", CPU, lambda: stream, compiler=cuda, driver=cuda)


def test_descriptors_are_those_of_the_source(cuda):
    """Python packs what C++ reads; a field more on one side would copy anything anywhere."""
    assert cuda.size_of_array() == copies_module._ARRAY.size
    assert cuda.max_arrays() == MAX_ARRAYS


def test_kernel_is_built_for_the_device_and_queued_on_its_stream(cuda):
    """Another architecture's code does not load, another stream's order is not the step's."""
    source, target = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    opened(cuda, stream=11).copy([(source, target)])
    assert b"--gpu-architecture=sm_90 " in cuda.options()
    assert cuda.stream() == 11
    assert target.tolist() == source.tolist()


@st.composite
def pair(draw):
    """(buffer, source, target): a table or a row, at any offset, in a buffer with more around."""
    dtype = draw(st.sampled_from(DTYPES))
    # Multiples that allow wide words in all respects but one are where a slip hides.
    rows, width = draw(st.integers(0, 3)), draw(st.sampled_from((0, 1, 5, 16, 32)))
    gap = at = st.sampled_from((0, 0, 16, 1, 4))
    source_gap, target_gap, source_at, target_at = draw(st.tuples(gap, gap, at, at))
    is_table = draw(st.booleans())

    def place(gap, at, value):
        whole = torch.full((at + max(1, rows) * (width + gap) + 9,), value, dtype=torch.int64)
        whole = whole.to(dtype)
        table = whole[at : at + rows * (width + gap)].view(rows, width + gap)[:, :width]
        row = whole[at : at + width]
        return whole, table if is_table else row

    _, source = place(source_gap, source_at, 0)
    numbers = torch.arange(1, source.numel() + 1).remainder(113).view(source.shape)
    source.copy_(numbers)
    buffer, target = place(target_gap, target_at, 99)
    return buffer, source, target


@settings(deadline=None, max_examples=120)
@given(pairs=st.lists(pair(), max_size=MAX_ARRAYS + 3))
def test_copies_are_those_of_torch_and_touch_nothing_else(cuda, pairs):
    """Whatever widths, offsets and strides allow of words, the bytes are the same."""
    wanted = []
    for buffer, source, target in pairs:
        copy = buffer.clone()
        shift = target.storage_offset()
        torch.as_strided(copy, target.shape, target.stride(), shift).copy_(source)
        wanted.append(copy)
    copies = opened(cuda)
    before = cuda.launches()
    copies.copy([(source, target) for _, source, target in pairs])
    num_filled = sum(source.numel() > 0 for _, source, _ in pairs)
    assert cuda.launches() - before <= -(-num_filled // MAX_ARRAYS)
    assert all(
        torch.equal(buffer, copy) for (buffer, _, _), copy in zip(pairs, wanted, strict=True)
    )


@pytest.mark.parametrize("width", [1, 4099, 70_001])
def test_array_larger_than_all_threads_is_copied_whole(cuda, width):
    """A thread takes several words where there are more of them than threads."""
    source = torch.arange(3 * width, dtype=torch.int32).view(3, width)
    target = torch.zeros((3, width + 2), dtype=torch.int32)
    opened(cuda).copy([(source, target[:, :width])])
    assert torch.equal(target[:, :width], source)
    assert not target[:, width:].any()


def test_what_is_no_copy_of_rows_is_left_to_torch(cuda):
    """Another dtype, or elements that lie apart."""
    copies = opened(cuda)
    before = cuda.launches()
    wide, apart = torch.zeros(4, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    numbers = torch.arange(4, dtype=torch.int32)
    copies.copy([(numbers, wide), (numbers, apart[::2]), (numbers[:0], wide[:0])])
    assert wide.tolist() == [0, 1, 2, 3]
    assert apart.tolist() == [0, 0, 1, 0, 2, 0, 3, 0]
    assert cuda.launches() == before


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [
        (COMPILING, 6, "does not compile for sm_90: an error of the compiler's"),
        (LOADING, 209, r"some other failure \(cuModuleLoadData: 209\)"),
        (LAUNCHING, 700, r"illegal memory access was encountered \(cuLaunchKernel: 700\)"),
    ],
)
def test_what_cuda_refuses_is_said_with_its_words(cuda, fault, where, status, said):
    """Whoever asked can then go without; nothing is copied in silence."""
    fault(where, status)
    with pytest.raises(CudaError, match=said):
        opened(cuda)


def test_kernel_that_copies_wrong_bytes_is_refused_when_it_is_opened(cuda, monkeypatch):
    """The kernel is tried on the device itself before a step relies on it."""
    monkeypatch.setattr(copies_module.ArrayCopies, "copy", lambda self, pairs: None)
    with pytest.raises(CudaError, match="copied wrong bytes"):
        opened(cuda)


def test_backend_opens_the_kernel_for_its_device_with_what_torch_has_loaded(cuda, monkeypatch):
    """The compiler of torch's CUDA, the context of this thread, the stream of each step."""
    stream, asked = SimpleNamespace(cuda_stream=3), []
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(driver_module, "open_compiler", lambda major: asked.append(major) or cuda)
    monkeypatch.setattr(driver_module, "open_driver", lambda: cuda)
    copy = CUDA.open_copies("sm_89", "cpu")
    assert asked == [CPU, 12]
    assert b"--gpu-architecture=sm_89 " in cuda.options()
    stream.cuda_stream = 5
    source, target = torch.arange(9), torch.zeros(9, dtype=torch.int64)
    copy([(source, target)])
    assert torch.equal(source, target)
    assert cuda.stream() == 5


def test_compiler_that_is_not_there_is_named():
    """A wheel of torch without NVRTC is told by the file that was sought."""
    with pytest.raises(CudaError, match=r"NVRTC of CUDA 99 was not found as .*99"):
        open_compiler(99)
