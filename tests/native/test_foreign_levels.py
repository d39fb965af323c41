"""RISC-V by an emulator, and linear layers of odd shapes under sanitizers."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from foreign_levels import KERNELS, RISCV, RISCV_VECTORS, ROOT, Target, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LINEAR = (f"{KERNELS}/linear.cpp", "tests/native/linear_levels.cpp")
KERNELS_AND_LAYERS = (
    f"{KERNELS}/kernels.cpp",
    f"{KERNELS}/layers.cpp",
    "tests/native/kernel_levels.cpp",
)
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
X86 = {
    "generic": ((), ""),
    "avx2": (AVX2, "avx2"),
    "avx2_vnni": ((*AVX2, "-mavxvnni"), "avx_vnni"),
    "avx512": (AVX512, "avx512vl"),
    "avx512_vnni": ((*AVX512, "-mavx512vnni"), "avx512_vnni"),
    "avx512_bf16": ((*AVX512, "-mavx512vnni", "-mavx512bf16"), "avx512_bf16"),
}
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("target", [RISCV, RISCV_VECTORS], ids=["generic", "rvv"])
def test_linear_layers_of_riscv64_equal_double(target: Target, tmp_path: Path) -> None:
    """RISC-V has no machine of its own in the tests, so that its paths would rot unseen."""
    check(target.build(LINEAR, tmp_path / "linear", ["-O1"]))


@pytest.mark.parametrize("target", [RISCV, RISCV_VECTORS], ids=["generic", "rvv"])
def test_kernels_of_riscv64_equal_double(target: Target, tmp_path: Path) -> None:
    """The same for attention, recurrences, experts and the vocabulary."""
    check([*target.build(KERNELS_AND_LAYERS, tmp_path / "kernels", ["-O1"]), "3"])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
def test_tiles_of_amx_equal_double_by_their_model(tmp_path: Path) -> None:
    """The source of the AMX level, with its instructions in plain C++: none of ours has them."""
    feature = "avx512_bf16"
    if feature not in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        pytest.skip(f"the level stands on {feature}, which this machine lacks")
    flags = (*X86[feature][0], f'-DQUIRE_AMX_MODEL="{ROOT / "tests/native/amx_model.h"}"')
    target = Target(level="amx", compilers=("g++",), flags=flags, emulator=())
    check(target.build(LINEAR, tmp_path / "linear", SANITIZERS))


@st.composite
def products(draw: st.DrawFn) -> str:
    """One line for the driver: bits, rounding, rows, outputs, inputs, group."""
    bits = draw(st.sampled_from([32, 16, 8, 4]))
    rounding = draw(st.integers(0, 2)) if bits <= 8 else 0
    rows, outputs = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    groups = draw(st.integers(1, 5))
    is_grouped = bits <= 8 and draw(st.booleans())
    size = draw(st.sampled_from([16, 32, 48])) if is_grouped else 0
    inputs = size * groups if is_grouped else draw(st.integers(1, 150))
    return f"{bits} {rounding} {rows} {outputs} {inputs} {size}"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
@pytest.mark.parametrize("level", X86)
def test_linear_layers_of_odd_shapes_are_clean_under_sanitizers(
    level: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A panel read past its end is silent until the weights end where a page does."""
    flags, feature = X86[level]
    if feature and feature not in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        pytest.skip(f"this machine has no {feature}")
    target = Target(level=level, compilers=("g++",), flags=flags, emulator=())
    command = target.build(LINEAR, tmp_path_factory.mktemp(level) / "linear", SANITIZERS)

    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(products(), min_size=1, max_size=20))
    def hold(lines: list[str]) -> None:
        check([*command, "-"], "\n".join(lines))

    check(command)
    hold()
