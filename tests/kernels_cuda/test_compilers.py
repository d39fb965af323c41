"""Kernels of CUDA C++ through NVIDIA's own compilers, which need no device."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quire.kernels_cuda.driver import SOURCES, CudaError, compile_source, open_compiler
from quire.kernels_cuda.survey import architectures, compile_all

NVCC = shutil.which("nvcc")
_CUBIN = b"\x7fELF"

needs_nvcc = pytest.mark.skipif(not NVCC, reason="needs nvcc, of CUDA's toolkit")


def nvrtc() -> ctypes.CDLL:
    """The newest that torch, or a wheel of NVIDIA's, has brought."""
    majors = (int((torch.version.cuda or "0").partition(".")[0]), 13, 12)
    for major in majors:
        try:
            return open_compiler(major)
        except CudaError:
            continue
    pytest.skip("needs NVRTC, of torch's build for CUDA or the wheel nvidia-cuda-nvrtc")


def test_architectures_are_those_of_the_launch_tables():
    """What has a table has kernels, compiled."""
    assert architectures() == ["sm_80", "sm_89", "sm_90", "sm_100"]


@needs_nvcc
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", architectures())
def test_nvcc_compiles_every_source_without_a_warning_and_without_a_spill(architecture):
    """All sources, with what ptxas says of them."""
    usages = list(compile_all(NVCC, [architecture]))
    assert {usage.name for usage in usages} == {path.stem for path in SOURCES.glob("*.cu")}
    assert all(usage.spill_bytes == 0 and usage.registers > 0 for usage in usages)


@needs_nvcc
@pytest.mark.timeout(600)
def test_source_that_does_not_compile_is_told_in_the_words_of_nvcc(tmp_path, monkeypatch):
    """A survey that a broken source passes would show nothing."""
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void broken() { nowhere(); }", encoding="utf-8")
    monkeypatch.setattr("quire.kernels_cuda.survey.SOURCES", tmp_path)
    with pytest.raises(ValueError, match=r"broken\.cu does not compile for sm_90(.|\n)*nowhere"):
        list(compile_all(NVCC, ["sm_90"]))


def test_survey_without_a_compiler_says_what_to_install(tmp_path):
    """A machine without the toolkit is no machine without spills."""
    done = subprocess.run(
        [sys.executable, "-m", "quire.kernels_cuda"],
        env={"PATH": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "install CUDA's toolkit" in done.stderr


@pytest.mark.parametrize("architecture", architectures())
def test_nvrtc_compiles_every_source(architecture):
    """By the same calls as on a machine with a device."""
    compiler = nvrtc()
    for source in SOURCES.glob("*.cu"):
        assert compile_source(compiler, source, architecture).startswith(_CUBIN)


def test_nvrtc_says_where_a_source_is_wrong(tmp_path):
    """The log goes into the error."""
    compiler = nvrtc()
    broken = Path(tmp_path) / "broken.cu"
    broken.write_text("__global__ void broken() { nowhere(); }", encoding="utf-8")
    with pytest.raises(CudaError, match=r"broken\.cu does not compile for sm_80(.|\n)*nowhere"):
        compile_source(compiler, broken, "sm_80")
