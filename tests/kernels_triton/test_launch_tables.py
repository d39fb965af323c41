"""Launch tables: data that a kernel can be started from."""

from __future__ import annotations

import json

import pytest

from quire import kernels_cuda, kernels_rocm
from quire.kernels_triton.launch import TABLES, LaunchEntry, LaunchTable, read_table

PATHS = [
    path
    for folder in (TABLES, kernels_cuda.TABLES, kernels_rocm.TABLES)
    for path in sorted(folder.glob("*.json"))
]
KERNELS = {
    *("prefill", "decode", "combine", "write_cache", "copy_blocks", "rms_norm", "soft_cap"),
    *("gated_activation", "rotary", "entries", "rows_of_logits", "sample", "logprobs"),
    *("latent_prefill", "latent_decode", "route", "sort_pairs", "expert_tiles", "experts_up"),
    *("experts_down", "experts_sum", "conv", "conv_state", "selective_scan", "ssd_scan"),
    *("gated_delta_rule", "round_rows", "quantized_linear", "splits"),
    *("round_rows_float8", "float8_linear", "expert_codes_up", "expert_codes_down"),
}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_table_serves_every_kernel_with_any_facts(path):
    """The last row of each kernel has no condition, and the numbers say where they are from."""
    table = read_table(path)
    assert table.architecture == path.stem
    assert table.provenance["method"]
    assert {"compute_units", "shared_bytes", "warp_size"} <= set(table.facts)
    for kernel in KERNELS:
        assert table.find(
            kernel,
            {"head_size": 4096, "width": 1 << 20, "item_size": 8, "rows": 1 << 20, "tile": 1 << 20},
        )
    assert {entry.kernel for entry in table.entries} == KERNELS
    for entry in table.entries:
        assert not entry.max_spill_bytes or entry.note


@pytest.mark.parametrize(
    "architecture", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx1100", "gfx1201"]
)
def test_promised_architecture_has_its_table(architecture):
    """Those that the project names have tables; unknown ones fall to the portable one."""
    find = kernels_cuda.table_path if architecture[0] == "s" else kernels_rocm.table_path
    assert find(architecture).stem == architecture
    assert find("sm_999" if architecture[0] == "s" else "gfx9999") is None


def test_relative_architecture_takes_its_relatives_table():
    """Generations that differ in name alone share a table."""
    assert kernels_cuda.table_path("sm_103").stem == "sm_100"
    assert kernels_rocm.table_path("gfx950").stem == "gfx942"


def table_of(*entries):
    return LaunchTable(
        architecture="x", provenance={"method": "test"}, facts={}, entries=tuple(entries)
    )


def test_first_fitting_row_is_taken():
    """Conditions are equality, or a bound for names with max_; a missing fact fits no bound."""
    small = LaunchEntry(kernel="k", when={"max_size": 8, "kind": 1})
    rest = LaunchEntry(kernel="k")
    table = table_of(small, rest)
    assert table.find("k", {"size": 8, "kind": 1}) is small
    assert table.find("k", {"size": 9, "kind": 1}) is rest
    assert table.find("k", {"size": 8, "kind": 2}) is rest
    assert table.find("k", {"kind": 1}) is rest


def test_missing_row_is_named():
    """A table without a kernel says which and for what."""
    with pytest.raises(LookupError, match=r"of x has no entry for other with .*7"):
        table_of(LaunchEntry(kernel="k")).find("other", {"size": 7})


def test_rows_of_a_file_stand_before_the_portable_ones(tmp_path):
    """What an architecture says of itself wins."""
    data = json.loads((kernels_cuda.TABLES / "sm_90.json").read_text())
    data["entries"] = [{"kernel": "sample", "constants": {"BLOCK": 7}}]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(data))
    table = read_table(file)
    assert table.find("sample", {}).constants == {"BLOCK": 7}
    assert table.find("combine", {}).options["num_warps"] > 0
