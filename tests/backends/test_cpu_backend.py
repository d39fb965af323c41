"""The CPU backend: it says what it has, and computes what the reference computes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire import kernels_cpu
from quire.backends.cpu import CpuBackend, host, openmp, sampling
from quire.backends.cpu import backend as backend_module
from quire.backends.cpu.attention import CpuAttention
from quire.backends.cpu.device import CpuDevice
from quire.backends.cpu.openmp import prefer_short_waits
from quire.backends.cpu.ops import CpuOps
from quire.backends.reference import ReferenceAttention, ReferenceOps
from quire.core.config import EngineConfig
from quire.core.interface import (
    INTERFACE_VERSION,
    OP_SPECS,
    AttentionSpec,
    DeviceError,
    SamplingTensors,
    UnsupportedError,
    WorkerConfig,
)
from quire.core.planning import make_worker_config

EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
DTYPES = list(EPSILON)

# --- what it says ---------------------------------------------------------------------------------


def test_probe_imports_no_torch():
    """Listing the backends of a machine costs no import of torch."""
    code = (
        "import sys\n"
        "from quire.backends.cpu import CpuBackend\n"
        "probe = CpuBackend().probe()\n"
        "assert probe.is_usable, probe\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_threads_wait_shortly_unless_the_user_chose():
    """Spinning threads must not starve what shares the cores, and the user's word counts."""
    environment: dict[str, str] = {}
    prefer_short_waits(environment)
    assert set(environment) == {"GOMP_SPINCOUNT"}
    chosen = {"OMP_WAIT_POLICY": "active"}
    prefer_short_waits(chosen)
    assert chosen == {"OMP_WAIT_POLICY": "active"}


def test_import_of_the_backend_loads_no_openmp():
    """How its threads wait can only be said before it is loaded: no kernel and no torch until then."""
    code = (
        "import sys\n"
        "import quire.backends.cpu\n"
        "assert not {'torch', 'quire.kernels_cpu'} & set(sys.modules), sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_probe_without_torch_says_how_to_install_it(monkeypatch):
    """No torch is a reason with a remedy, not a crash, and opening says the same."""
    monkeypatch.setattr(backend_module, "find_spec", lambda name: None)
    probe = CpuBackend().probe()
    assert not probe.is_usable
    assert 'pip install "quire[cpu]"' in probe.remedy
    with pytest.raises(DeviceError, match="quire\\[cpu\\]"):
        CpuBackend().open(0)


def test_probe_without_kernels_is_usable_and_says_what_is_lost(monkeypatch):
    """A machine without a compiler serves, and is told what would make it faster."""
    monkeypatch.setattr(kernels_cpu, "HAVE_NATIVE", False)
    monkeypatch.setattr(kernels_cpu, "WHY_NOT_NATIVE", "no compiler was there")
    probe = CpuBackend().probe()
    assert probe.is_usable
    assert "no compiler was there" in probe.problem
    assert "compiler" in probe.remedy
    assert probe.devices[0].details["kernels"] == "reference"


def test_open_gives_a_device_of_this_interface():
    """The version, the name and the only index are what discovery relies on."""
    backend = CpuBackend()
    assert (backend.name, backend.interface_version) == ("cpu", INTERFACE_VERSION)
    device = backend.open(0)
    assert device.torch_device == "cpu"
    assert device.ops() is device.ops()
    memory = device.memory()
    assert 0 < memory.free_bytes <= memory.total_bytes
    with pytest.raises(DeviceError, match="cpu:0"):
        backend.open(1)


@pytest.mark.parametrize(
    ("flags", "architecture", "has_bfloat16"),
    [
        ("sse2 avx2", "avx2", False),
        ("avx2 avx512f avx512_vnni", "avx512_vnni", False),
        ("avx512f avx512_bf16 avx512_vnni", "avx512_bf16", True),
        ("amx_bf16 avx512_bf16", "amx_bf16", True),
        ("fp asimd", "neon", False),
        ("fp asimd bf16", "neon_bf16", True),
    ],
)
def test_cpu_flags_name_the_architecture(flags, architecture, has_bfloat16, tmp_path):
    """bfloat16 comes first only where instructions for it exist."""
    key = "Features" if "asimd" in flags else "flags"
    path = tmp_path / "cpuinfo"
    path.write_text(
        f"processor\t: 0\nmodel name\t: Some CPU\n{key}\t\t: {flags}\n\nprocessor\t: 1\n"
    )
    cpu = host.read_cpu(path)
    assert (cpu.name, cpu.architecture, cpu.has_bfloat16) == (
        "Some CPU",
        architecture,
        has_bfloat16,
    )


def test_cpu_without_procfs_still_has_a_name(tmp_path):
    """Elsewhere than on Linux the probe knows less but does not raise."""
    assert host.read_cpu(tmp_path / "missing").name


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  1000 kB\nMemFree: 100 kB\nMemAvailable:  800 kB\n"}


def test_memory_without_cgroup_is_the_machines(tmp_path):
    """What the kernel says is available is what can be had."""
    memory = host.read_memory(_write(tmp_path, MEMINFO))
    assert (memory.total_bytes, memory.free_bytes) == (1000 * 1024, 800 * 1024)


def test_memory_in_cgroup_v2_is_the_tightest_limit_above(tmp_path):
    """A container's limit counts, page cache does not, and a parent's limit holds too."""
    root = _write(tmp_path, MEMINFO | {
        "proc/self/cgroup": "0::/pod/app\n",
        "sys/fs/cgroup/pod/app/memory.max": "max\n",
        "sys/fs/cgroup/pod/memory.max": "500000\n",
        "sys/fs/cgroup/pod/memory.current": "300000\n",
        "sys/fs/cgroup/pod/memory.stat": "anon 1\ninactive_file 100000\n",
    })  # fmt: skip
    memory = host.read_memory(root)
    assert (memory.total_bytes, memory.free_bytes) == (500_000, 300_000)


def test_memory_in_cgroup_v1_is_limited(tmp_path):
    """The older layout of control groups says the same in other files."""
    root = _write(tmp_path, MEMINFO | {
        "proc/self/cgroup": "4:cpu,cpuacct:/x\n3:memory:/gone\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "400000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "150000\n",
    })  # fmt: skip
    memory = host.read_memory(root)
    assert (memory.total_bytes, memory.free_bytes) == (400_000, 250_000)


def test_cores_count_siblings_once_and_obey_the_quota(tmp_path, monkeypatch):
    """Two threads of a core are one core, and a container's share of time is a number of cores."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5}, raising=False)
    siblings = {
        f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 3},{i % 3 + 3}\n"
        for i in range(6)
    }
    root = _write(tmp_path, siblings)
    assert host.count_cores(root) == 3
    _write(tmp_path, {"sys/fs/cgroup/cpu.max": "200000 100000\n"})
    assert host.count_cores(root) == 2


def test_device_refuses_a_number_of_threads_that_is_none():
    """A misspelt option is refused before anything is loaded."""
    config = WorkerConfig(
        model="", dtype="float32", cache_dtype="float32", block_size=16, max_model_len=16, max_num_seqs=1,
        max_num_batched_tokens=16, device_memory_fraction=0.5, options={"cpu.num_threads": "all"},
    )  # fmt: skip
    device = CpuBackend().open(0)
    assert [r.code for r in device.reasons_against(config)] == ["options.cpu.num_threads"]
    accepted = WorkerConfig(**{**_fields(config), "options": {"cpu.num_threads": "1"}})
    assert not device.reasons_against(accepted)
    assert device.make_worker(accepted) is None
    assert torch.get_num_threads() == 1


def test_number_of_threads_of_the_engine_reaches_the_device(tmp_path):
    """`--num-threads` is what computes: it once stopped on its way, and nobody heard."""
    before = torch.get_num_threads()
    config = EngineConfig(
        model="unused", device="cpu", num_threads=1, max_model_len=16, block_size=16
    )
    try:
        torch.set_num_threads(2)
        CpuBackend().open(0).make_worker(make_worker_config(config, tmp_path))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def _fields(config: WorkerConfig) -> dict:
    return {name: getattr(config, name) for name in config.__struct_fields__}


def test_providers_are_named_for_every_operator(monkeypatch):
    """Users see who serves what, with the kernels and without."""
    names = [spec.name for spec in OP_SPECS]
    expected = f"native:{kernels_cpu.isa()}" if kernels_cpu.HAVE_NATIVE else "reference"
    assert all(CpuOps().provider(name) for name in names)
    assert CpuOps().provider("rms_norm") == expected
    monkeypatch.setattr(kernels_cpu, "HAVE_NATIVE", False)
    assert CpuOps().provider("rms_norm") == "reference"


# --- what it computes -----------------------------------------------------------------------------


def both(rng: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=rng).to(dtype)


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for one rounding, as both compute in float32."""
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    epsilon = EPSILON[got.dtype]
    torch.testing.assert_close(got.double(), wanted.double(), rtol=2 * epsilon, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_is_within_float32_accumulation_of_float64(dtype, num_tokens, has_bias, torch_rng):
    """Packed weights give the product to the rounding of its dtype, for few rows and many."""
    weight, x = both(torch_rng, dtype, 70, 96), both(torch_rng, dtype, num_tokens, 96)
    bias = both(torch_rng, dtype, 70) if has_bias else None
    before = weight.clone()
    packed = CpuOps().pack_linear(weight, bias)
    got = CpuOps().linear(x, packed)
    wanted = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    bound = 96 * 2.0**-23 * (x.double().abs() @ weight.double().abs().T + 1)
    assert ((got.double() - wanted).abs() <= bound + EPSILON[dtype] * wanted.abs()).all()
    assert (got.dtype, packed.dtype) == (dtype, str(dtype).removeprefix("torch."))
    assert torch.equal(weight, before)


def test_packed_linear_says_what_it_holds():
    """Sizing the cache relies on the bytes that packed weights add."""
    packed = CpuOps().pack_linear(torch.zeros(64, 32), None)
    assert packed.format in {"onednn-blocked", "dense"}
    assert packed.size_bytes == (0 if packed.format == "dense" else 64 * 32 * 4)


def test_linear_without_onednn_is_the_reference(monkeypatch):
    """A torch without these operators still multiplies."""
    monkeypatch.setattr("quire.backends.cpu.linear.can_prepack", lambda dtype: False)
    packed = CpuOps().pack_linear(torch.eye(3), None)
    assert packed.format == "dense"
    assert CpuOps().linear(torch.eye(3), packed).tolist() == torch.eye(3).tolist()
    assert "onednn" not in CpuOps().provider("linear")


@pytest.mark.parametrize(
    "options", [{"cpu.isa": "amx-2040"}, {"cpu.num_threads": "0"}, {"cpu.pin_threads": "yes"}]
)
def test_options_that_the_machine_cannot_serve_are_refused_with_the_remedy(options):
    """A forced level or a number of threads is refused before weights load."""
    device = CpuBackend().open(0)
    (name,) = options
    config = WorkerConfig(
        model="", dtype="float32", cache_dtype="float32", block_size=16, max_model_len=16, max_num_seqs=1,
        max_num_batched_tokens=16, device_memory_fraction=0.5, options=options,
    )  # fmt: skip
    (reason,) = device.reasons_against(config)
    assert reason.code == f"options.{name}"
    assert name in reason.remedy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_layers_match_the_reference(dtype, num_tokens, torch_rng):
    """Norms, gates and rotations by whatever serves them are those of the reference."""
    ops, reference = CpuOps(), ReferenceOps()
    x, weight = both(torch_rng, dtype, num_tokens, 96), both(torch_rng, dtype, 96)
    assert_same(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    ours, theirs = both(torch_rng, dtype, num_tokens, 96), None
    theirs = ours.clone()
    assert_same(
        ops.add_rms_norm(x, ours, weight, 1e-5), reference.add_rms_norm(x, theirs, weight, 1e-5)
    )
    assert torch.equal(ours, theirs)
    for kind in ("silu", "gelu", "gelu_tanh"):
        assert_same(ops.gated_activation(x, kind), reference.gated_activation(x, kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_rotary_on_views_of_a_fused_projection_matches(dtype, is_interleaved, torch_rng):
    """Heads are strided views in every model with a fused projection."""
    fused = both(torch_rng, dtype, 5, 6, 16)
    angles = torch.rand(5, 6, generator=torch_rng)
    results = []
    for ops in (CpuOps(), ReferenceOps()):
        copy = fused.clone()
        ops.rotary(
            copy[:, :3], copy[:, 3:4], angles.cos(), angles.sin(), is_interleaved=is_interleaved
        )
        results.append(copy)
    assert_same(*results)
    assert torch.equal(results[0][:, 4:], fused[:, 4:])


def test_norm_of_heads_in_a_strided_view_matches(torch_rng):
    """Queries are normalised a head at a time before they are contiguous."""
    heads = both(torch_rng, torch.float32, 5, 6, 16)[:, 1:4]
    weight = both(torch_rng, torch.float32, 16)
    assert_same(
        CpuOps().rms_norm(heads, weight, 1e-6), ReferenceOps().rms_norm(heads, weight, 1e-6)
    )


def test_layers_in_mixed_or_wide_dtypes_fall_back(torch_rng):
    """What the kernels do not take the reference does."""
    x, weight = both(torch_rng, torch.bfloat16, 2, 8), both(torch_rng, torch.float32, 8)
    assert_same(CpuOps().rms_norm(x, weight, 1e-6), ReferenceOps().rms_norm(x, weight, 1e-6))
    wide = x.double()
    assert CpuOps().gated_activation(wide, "silu").dtype == torch.float64


# --- sampling -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sample_by_candidates_equals_the_reference(data):
    """Looking at the likeliest first changes no token: ties, forbidden tokens and greedy rows too."""
    vocab_size = data.draw(st.sampled_from([100, 512, 1300]))
    num_rows = data.draw(st.integers(1, 5))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(num_rows, vocab_size, generator=rng) * data.draw(
        st.sampled_from([0.1, 2.0, 6.0])
    )
    if data.draw(st.booleans()):
        logits = logits.round()
    logits[:, ::5] = float("-inf")

    def column(values: list, dtype=torch.float32) -> torch.Tensor:
        return torch.tensor(
            [data.draw(st.sampled_from(values)) for _ in range(num_rows)], dtype=dtype
        )

    tensors = SamplingTensors(
        temperature=column([0.0, 0.5, 1.0]),
        top_k=column([1, 3, 200, 256, 257, vocab_size], torch.int64),
        top_p=column([0.1, 0.9, 0.999, 1.0]),
        min_p=column([0.0, 0.0, 0.1]),
        uniform=column([0.0, 0.3, 0.77, 0.9999]),
        is_all_greedy=False,
        needs_filter=True,
    )
    got = CpuOps().sample(logits.clone(), tensors)
    assert got.tolist() == ReferenceOps().sample(logits.clone(), tensors).tolist()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_most_likely_and_top_ids_equal_the_reference(data):
    """The place of the maximum is found in blocks, with the same answer on ties."""
    vocab_size = data.draw(st.sampled_from([1, 511, 512, 513, 1500]))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randint(
        0, data.draw(st.sampled_from([2, 40, 10_000])), (3, vocab_size), generator=rng
    ).float()
    reference = ReferenceOps()
    assert sampling.most_likely(logits).tolist() == [
        row.tolist().index(row.max()) for row in logits
    ]
    num_top = data.draw(st.sampled_from([0, 1, 4, 20]))
    ids = torch.zeros(3, dtype=torch.int64)
    got, wanted = (ops.logprobs(logits, ids, num_top) for ops in (CpuOps(), reference))
    assert torch.equal(got.top_ids, wanted.top_ids)
    assert torch.equal(got.ranks, wanted.ranks)
    torch.testing.assert_close(got.top_logprobs, wanted.top_logprobs)


# --- attention ------------------------------------------------------------------------------------

SPEC = AttentionSpec(
    num_heads=4, num_kv_heads=2, head_size=8, v_head_size=8, scale=0.3,
    dtype="float32", cache_dtype="float32", block_size=4,
)  # fmt: skip


def test_attention_is_refused_with_every_reason():
    """What the device cannot attend to it says at once, all of it."""
    with pytest.raises(UnsupportedError) as caught:
        CpuBackend().open(0).attention(replace(SPEC, kind="cross", num_heads=5))
    assert {reason.code for reason in caught.value.reasons} == {"attention.kind", "attention.heads"}


def test_attention_names_its_provider(monkeypatch):
    """The kernel serves equal dtypes, the reference a cache of another."""
    device = CpuBackend().open(0)
    assert isinstance(device, CpuDevice)
    expected = f"native:{kernels_cpu.isa()}" if kernels_cpu.HAVE_NATIVE else "reference"
    assert device.attention(SPEC).provider() == expected
    assert device.attention(replace(SPEC, cache_dtype="bfloat16")).provider() == "reference"
    monkeypatch.setattr(kernels_cpu, "HAVE_NATIVE", False)
    assert device.attention(SPEC).provider() == "reference"
    assert issubclass(CpuAttention, ReferenceAttention)


# --- what it claims -------------------------------------------------------------------------------

invariant_only = pytest.mark.skipif(
    CpuBackend().open(0).capabilities.determinism != "invariant",
    reason="this CPU or this torch sums in another order for other batches, and says so",
)


@invariant_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 24), (64, 900), (130, 1100), (56, 4864)])
def test_linear_gives_same_bits_alone_and_in_any_batch(dtype, shape, torch_rng):
    """A request's numbers do not depend on who else is in the step, as the device claims."""
    ops = CpuOps()
    # Terms that cancel leave the rounding of the sum, which shows its order in any dtype.
    weight, x = (
        both(torch_rng, torch.float32, *shape),
        both(torch_rng, torch.float32, 150, shape[1]),
    )
    packed = ops.pack_linear((weight - weight.flip(-1)).to(dtype), None)
    x = (x + x.flip(-1)).to(dtype)
    wanted = ops.linear(x, packed)
    for num_rows in (1, 2, 3, 8, 31, 64, 149):
        got = ops.linear(x[1 : 1 + num_rows].contiguous(), packed)
        assert torch.equal(got, wanted[1 : 1 + num_rows]), num_rows
        assert got.is_contiguous()


@invariant_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_give_same_bits_alone_and_in_any_batch(dtype, torch_rng):
    """Norms and gates work row by row, as the device claims."""
    ops = CpuOps()
    x, weight = both(torch_rng, dtype, 21, 74), both(torch_rng, dtype, 74)
    for op in (lambda t: ops.rms_norm(t, weight, 1e-6), lambda t: ops.gated_activation(t, "silu")):
        assert torch.equal(op(x[5:6].clone()), op(x)[5:6])


def test_claim_without_kernels_is_no_more_than_is_true(monkeypatch):
    """Batched products of plain torch depend on the batch, so nothing is claimed for them."""
    monkeypatch.setattr(kernels_cpu, "HAVE_NATIVE", False)
    assert CpuBackend().open(0).capabilities.determinism == "run_to_run"


def test_threads_bound_by_the_user_keep_their_number(monkeypatch):
    """Bound to one CPU, the main thread sees one core; the others are still there."""
    assert openmp.binds_threads({"OMP_PROC_BIND": "close"})
    assert openmp.binds_threads({"GOMP_CPU_AFFINITY": "0 1"})
    assert not openmp.binds_threads({"OMP_PROC_BIND": "FALSE"})
    assert not openmp.binds_threads({})
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    info = CpuBackend().open(0).info
    chosen.clear()
    CpuDevice(info, has_bound_threads=True)
    assert not chosen
    CpuDevice(info)
    assert len(chosen) == 1
