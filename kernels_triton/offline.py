"""Compiles kernels for devices that are not here, and reads what became of them.

Run by `quire.kernels_triton.survey`. Needs Triton's wheel alone: its compilers, assemblers and
disassemblers for NVIDIA and AMD, no driver and no device. Compiled kernels are cached by Triton
(TRITON_CACHE_DIR) by source and target.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quire.kernels_triton.launch import LaunchEntry, Launcher, LaunchTable

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.float8_e5m2: "*fp8e5",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e4m3fnuz: "*fp8e4b8",
}
_ALIGNMENT = 16
_NVIDIA_MATRIX = re.compile(r"\b(?:[HIQ]G?MMA|UTC[HIQ]MMA)\b")
_AMD_MATRIX = re.compile(r"\bv_(?:s?mfma|s?wmma)\w*")
_DIVISIBLE = [["tt.divisibility", _ALIGNMENT]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One kernel with everything that decides its machine code, but the target."""

    kernel: Any
    name: str
    """For people: the kernel and what is special about this launch."""
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    entry: LaunchEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a compiled kernel takes of its device."""

    name: str
    target: str
    registers: int
    spill_bytes: int
    """Of a thread's frame in memory: what did not fit into registers."""
    shared_bytes: int
    matrix_instructions: int
    row: str = ""
    """The kernel's name in launch tables."""
    allowed_spill_bytes: int = 0
    wants_matrix: bool = False
    """Whether its table says that it multiplies in matrix units."""
    findings: tuple[str, ...] = ()
    """What breaks the promises of the launch table."""


class RecordingLauncher(Launcher):
    """Notes what would be started; tensors may be of the device `meta`."""

    def __init__(self, table: LaunchTable) -> None:
        super().__init__(table)
        self.jobs: dict[str, Job] = {}
        self.used: set[int] = set()
        """Rows of the table, by number, that the host functions have asked for."""
        self.label = ""
        """Stands before the names of the jobs that follow."""

    def find(self, kernel: str, **facts: Any) -> LaunchEntry:
        """The table's row, which counts as taken: some rows are for the host alone."""
        entry = super().find(kernel, **facts)
        self.used.add(next(i for i, row in enumerate(self.table.entries) if row is entry))
        return entry

    def start(
        self,
        kernel: Any,
        grid: Sequence[int],
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        entry: LaunchEntry,
    ) -> None:
        """Notes one launch; the same machine code is noted once."""
        job = _make_job(kernel, f"{self.label}{kernel.__name__}", arguments, constants, entry)
        key = repr((job.name, job.signature, job.constants, job.aligned, entry.options))
        self.jobs.setdefault(key, job)


def _make_job(
    kernel: Any,
    name: str,
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    entry: LaunchEntry,
) -> Job:
    """What Triton's own launcher would specialise on: alignment, ones, types."""
    signature: dict[str, str] = {}
    fixed = dict(constants)
    aligned = []
    for parameter, value in zip(kernel.params, arguments, strict=False):
        kind = _kind(value)
        specialises = not parameter.do_not_specialize
        if kind.startswith("i") and value == 1 and specialises:
            fixed[parameter.name] = 1
            continue
        signature[parameter.name] = kind
        is_multiple = isinstance(value, int) and value % _ALIGNMENT == 0 and specialises
        if kind.startswith("*") or (kind.startswith("i") and is_multiple):
            aligned.append(parameter.name)
    return Job(
        kernel=kernel,
        name=name,
        signature=signature,
        constants=fixed,
        aligned=tuple(aligned),
        entry=entry,
    )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@cache
def target_of(architecture: str) -> GPUTarget:
    """Triton's target for `sm_90` or `gfx942`."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    is_wide = architecture.startswith("gfx9")
    return GPUTarget("hip", architecture, 64 if is_wide else 32)


def compile_job(job: Job, table: LaunchTable) -> Usage:
    """Compiles one kernel for the table's architecture and holds it to the table's promises.

    A kernel that does not compile is a finding, not an exception.
    """
    names = job.kernel.arg_names
    source = ASTSource(
        job.kernel,
        {n: "constexpr" if n in job.constants else job.signature[n] for n in names},
        constexprs={(names.index(n),): value for n, value in job.constants.items()},
        attrs={(names.index(n),): _DIVISIBLE for n in job.aligned},
    )
    target = target_of(table.architecture)
    try:
        compiled = triton.compile(source, target=target, options=dict(job.entry.options))
    except Exception as error:  # compilers raise anything; one kernel's failure is one finding
        cause = _first_cause(error)
        text = f"{type(cause).__name__}: {str(cause).strip()[-500:]}"
        nothing = {"registers": 0, "spill_bytes": 0, "shared_bytes": 0, "matrix_instructions": 0}
        return _usage(job, table, nothing, (f"does not compile: {text}",))
    read = _read_cubin if target.backend == "cuda" else _read_amdgcn
    usage = _usage(job, table, {"shared_bytes": compiled.metadata.shared, **read(compiled)})
    return replace(usage, findings=tuple(broken_promises(usage, job.entry, table)))


def _first_cause(error: BaseException) -> BaseException:
    """Compilers wrap what went wrong in where it did, function by function."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _usage(
    job: Job, table: LaunchTable, read: Mapping[str, int], findings: tuple[str, ...] = ()
) -> Usage:
    return Usage(
        name=job.name,
        target=table.architecture,
        row=job.entry.kernel,
        allowed_spill_bytes=job.entry.max_spill_bytes,
        wants_matrix=job.entry.uses_matrix_units,
        findings=findings,
        **read,
    )


def broken_promises(usage: Usage, entry: LaunchEntry, table: LaunchTable) -> list[str]:
    """Where a compiled kernel is not what its table says."""
    findings = []
    if usage.spill_bytes > entry.max_spill_bytes:
        findings.append(f"spills {usage.spill_bytes} bytes, {entry.max_spill_bytes} are allowed")
    if usage.shared_bytes > table.facts["shared_bytes"]:
        findings.append(
            f"takes {usage.shared_bytes} bytes of shared memory, {table.architecture} has "
            f"{table.facts['shared_bytes']}"
        )
    if entry.uses_matrix_units and not usage.matrix_instructions:
        findings.append("has no matrix instructions")
    return findings


def _read_cubin(compiled: Any) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        assembly = _run(tools / "nvdisasm", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise ValueError(f"cuobjdump said nothing of registers: {usage[-200:]!r}")
    return {
        "registers": int(match[1]),
        "spill_bytes": int(match[2]),
        "matrix_instructions": len(_NVIDIA_MATRIX.findall(assembly)),
    }


def _run(tool: Path, *arguments: str) -> str:
    done = subprocess.run(  # noqa: S603 - the compiler's own tools on our own file
        [str(tool), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout


def _read_amdgcn(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(match[1]) if match else 0

    return {
        "registers": field("vgpr_count"),
        "spill_bytes": max(field("private_segment_fixed_size"), 4 * field("vgpr_spill_count")),
        "matrix_instructions": len(_AMD_MATRIX.findall(text)),
    }
