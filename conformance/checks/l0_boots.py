"""Level 0: the device is found, opens, keeps its memory in order and closes."""

from __future__ import annotations

import subprocess
import sys

import torch

from quire.conformance.buffers import same_bits
from quire.conformance.cases import check, product
from quire.conformance.trial import Finding, Trial
from quire.core.interface import (
    OP_SPECS,
    AttentionSpec,
    DeviceOutOfMemory,
    NewRequest,
    Reason,
    StepBatch,
    UnsupportedError,
    WorkerConfig,
)

_MODES = ("synchronous", "asynchronous", "unified")
_CLASSES = ("none", "run_to_run", "batch_invariant", "invariant")
_COPIES = {
    name: {"dtype_name": name}
    for name in ("float32", "float16", "bfloat16", "int32", "int64", "bool")
}

_LISTING = """
import sys
from quire.core.discovery import list_backends
entries = [e for e in list_backends() if e.name == {name!r}]
assert entries, "the backend is not among the installed entry points"
module = entries[0].target.partition(":")[0]
assert module not in sys.modules, f"listing the backends imported {{module}}"
assert "torch" not in sys.modules, "listing the backends imported torch"
"""


@check(level=0, op="device")
def listing_imports_nothing(trial: Trial) -> None:
    """`quire backends` reads names from metadata; no driver is imported for it."""
    if trial.backend is None or not _is_installed(trial.backend.name):
        return
    script = _LISTING.format(name=trial.backend.name)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - our own script
    trial.require(done.returncode == 0, (done.stderr.strip().splitlines() or ["it crashed"])[-1])


def _is_installed(name: str) -> bool:
    from quire.core.discovery import list_backends

    return any(entry.name == name for entry in list_backends())


@check(level=0, op="device")
def probe_never_raises(trial: Trial) -> None:
    """A probe answers, twice the same, with devices or with a reason and a remedy."""
    if trial.backend is None:
        return
    first, second = trial.backend.probe(), trial.backend.probe()
    trial.require(first.devices == second.devices, "two probes found different devices")
    trial.require(first.is_usable, f"the probe finds no device: {first.problem} {first.remedy}")
    indices = [info.index for info in first.devices]
    trial.require(len(set(indices)) == len(indices), f"two devices share an index: {indices}")


@check(level=0, op="device")
def opens_and_closes(trial: Trial) -> None:
    """A device opens several times, and closing twice is harmless."""
    if trial.backend is None:
        return
    index = trial.backend.probe().devices[0].index
    for _ in range(3):
        device = trial.backend.open(index)
        trial.require(
            device.capabilities == trial.device.capabilities,
            "the same device claims other capabilities the second time it is opened",
        )
        device.close()
        device.close()


@check(level=0, op="device")
def capabilities_are_coherent(trial: Trial) -> None:
    """The claims are of the known kinds and hold the mandatory ground."""
    claims = trial.capabilities
    trial.require(
        {"float32", "bfloat16"} & set(claims.dtypes),
        f"float32 or bfloat16 is mandatory; claimed are {claims.dtypes}",
    )
    trial.require(
        {16, 32} & set(claims.block_sizes),
        f"a block size of 16 or 32 is mandatory; claimed are {claims.block_sizes}",
    )
    trial.require("causal" in claims.attention_kinds, "causal attention is mandatory")
    trial.require(claims.copy_mode in _MODES, f"copy_mode {claims.copy_mode!r} is none of {_MODES}")
    trial.require(
        claims.determinism in _CLASSES, f"determinism {claims.determinism!r} is none of {_CLASSES}"
    )
    trial.require(claims.head_sizes != (), "no head size is claimed; None says any")
    for name in ("token_buckets", "request_buckets"):
        buckets = getattr(claims, name)
        trial.require(list(buckets) == sorted(set(buckets)), f"{name} {buckets} do not ascend")


@check(level=0, op="device")
def groups_beyond_the_claim_are_refused(trial: Trial) -> None:
    """A group of one needs nobody; one larger than max_tensor_parallel is refused with a reason."""
    alone = trial.device.communicator([0], rank=0, address="tcp://127.0.0.1:1")
    place = (alone.rank, alone.world_size)
    trial.require(place == (0, 1), f"a group of one is (rank, world_size) {place}")
    alone.close()
    limit = trial.capabilities.max_tensor_parallel
    trial.require(limit >= 1, f"max_tensor_parallel is {limit}; one device is a group of one")
    try:
        trial.device.communicator(range(limit + 1), rank=0, address="tcp://127.0.0.1:1")
    except UnsupportedError as error:
        trial.require(error.reasons, f"a group of {limit + 1} devices is refused without a reason")
    except Exception as error:  # whatever else is raised is the finding
        raise Finding(
            f"max_tensor_parallel is {limit}; a group of {limit + 1} raised "
            f"{type(error).__name__} instead of UnsupportedError with its reason"
        ) from error
    else:
        raise Finding(f"max_tensor_parallel is {limit}; a group of {limit + 1} is not refused")


@check(level=0, op="device", on_torch=True)
def everything_names_its_provider(trial: Trial) -> None:
    """Every operator says who serves it: `quire plan` shows it."""
    ops = trial.device.ops()
    trial.require(ops is trial.device.ops(), "Device.ops() must be the same object at each call")
    for spec in OP_SPECS:
        provider = ops.provider(spec.name)
        trial.require(
            isinstance(provider, str) and provider, f"provider({spec.name!r}) is {provider!r}"
        )


@check(level=0, op="device", on_torch=True)
def refuses_what_it_does_not_claim(trial: Trial) -> None:
    """Attention beyond the claims is refused with every reason, not attempted."""
    claims = trial.capabilities
    kind = next((k for k in ("mla", "recurrent") if k not in claims.attention_kinds), "vendor:none")
    try:
        trial.device.attention(_spec(trial, kind=kind))
    except UnsupportedError as error:
        is_told = all(isinstance(reason, Reason) for reason in error.reasons) and error.reasons
        trial.require(is_told, "the refusal carries no Reason")
        return
    raise Finding(
        f"attention of kind {kind!r} is not claimed and was not refused with UnsupportedError"
    )


def _spec(trial: Trial, *, kind: str = "causal") -> AttentionSpec:
    size = trial.head_size
    dtype = trial.capabilities.dtypes[0]
    return AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_size=size,
        v_head_size=size,
        scale=0.125,
        dtype=dtype,
        cache_dtype=trial.capabilities.cache_dtypes[0],
        block_size=trial.block_size,
        kind=kind,
    )


@check(level=0, op="device")
def memory_is_sane(trial: Trial) -> None:
    """memory() counts bytes: free is at most total, tags are not negative, and it can be asked."""
    info = trial.device.memory()
    trial.require(info.total_bytes > 0, f"memory() says {info.total_bytes} bytes in all")
    trial.require(
        0 <= info.free_bytes <= info.total_bytes,
        f"memory() says {info.free_bytes} of {info.total_bytes} bytes are free: free must lie "
        "between 0 and the total",
    )
    trial.require(all(n >= 0 for n in info.by_tag.values()), f"negative tags: {info.by_tag}")


@check(level=0, op="device", on_torch=True)
def allocates_and_frees(trial: Trial) -> None:
    """A thousand caches come and go without eating the device."""
    attention = trial.device.attention(_spec(trial))
    layout = attention.cache_layout()
    for _ in range(1000):
        attention.allocate(4)
    cache = attention.allocate(4)
    held = sum(t.numel() * t.element_size() for t in cache.tensors.values())
    trial.require(
        held <= 4 * layout.bytes_per_block,
        f"4 blocks hold {held} bytes; cache_layout says {layout.bytes_per_block} a block: the "
        "engine would plan for less than is taken",
    )
    shapes = {t.name: (4, *t.block_shape) for t in layout.tensors}
    got = {name: tuple(t.shape) for name, t in cache.tensors.items()}
    trial.require(shapes == got, f"allocate gave {got}, cache_layout promised {shapes}")


@check(level=0, op="device", on_torch=True)
def out_of_memory_is_typed(trial: Trial) -> None:
    """Too large a cache raises DeviceOutOfMemory, and the device works afterwards."""
    attention = trial.device.attention(_spec(trial))
    wanted = 64 * trial.device.memory().total_bytes // attention.cache_layout().bytes_per_block
    for _ in range(3):
        try:
            attention.allocate(max(wanted, 1 << 40))
        except DeviceOutOfMemory as error:
            trial.require(str(error), "DeviceOutOfMemory says nothing")
        except Exception as error:  # whatever else is raised is the finding
            raise Finding(
                f"an allocation that cannot be met raised {type(error).__name__} instead of "
                "DeviceOutOfMemory; the engine would take the device for dead"
            ) from error
        else:
            raise Finding("64 times the device's memory was allocated")
    cache = attention.allocate(2)
    trial.require(cache.tensors, "after running out of memory the device allocates nothing")


def _host_values(trial: Trial, dtype_name: str) -> torch.Tensor:
    values = torch.from_numpy(trial.rng.integers(-90, 90, (7, 33)))
    return values.to(getattr(torch, dtype_name))


@check(level=0, op="queue", over=product(_COPIES), on_torch=True)
def copies_round_trip(trial: Trial, *, dtype_name: str) -> None:
    """What is uploaded comes down again bit for bit, and nothing around it changes."""
    where = str(trial.device.torch_device)
    device, queue = trial.device, trial.device.queue()
    values = _host_values(trial, dtype_name)
    up = device.make_staging(values.shape, dtype_name)
    down = device.make_staging((9, 33), dtype_name)
    up.copy_(values)
    whole = torch.ones((9, 33), dtype=values.dtype, device=where)
    queue.upload(up, whole[1:8])
    queue.download(whole, down)
    event = queue.record()
    event.wait()
    trial.require(event.is_done(), "an event that was waited for is not done")
    trial.require(same_bits(down[1:8], values), "what was uploaded came down changed")
    canaries = torch.ones((1, 33), dtype=values.dtype)
    is_whole = same_bits(down[:1], canaries) and same_bits(down[8:], canaries)
    trial.require(is_whole, "an upload wrote beyond its target")


@check(level=0, op="queue", on_torch=True)
def queue_keeps_order(trial: Trial) -> None:
    """Uploads, work and downloads happen in the order in which they were queued."""
    where = str(trial.device.torch_device)
    device, queue = trial.device, trial.device.queue()
    trial.require(queue is device.queue(), "Device.queue() must be the same object at each call")
    target = torch.zeros(1000, device=where)
    results = []
    for step in range(8):
        up = device.make_staging((1000,), "float32")
        down = device.make_staging((1000,), "float32")
        up.fill_(float(step))
        queue.upload(up, target)
        queue.run(lambda: _double(target))
        queue.download(target, down)
        results.append((queue.record(), down))
    for step, (event, down) in enumerate(results):
        event.wait()
        trial.require(
            bool((down == 2 * step).all()),
            f"step {step} of 8 (upload, double, download) brought {down[0].item()}, not "
            f"{2 * step}: the queue's work ran out of order",
        )


def _double(tensor: torch.Tensor) -> None:
    tensor.mul_(2)


@check(level=0, op="queue", on_torch=True)
def staging_may_rest(trial: Trial) -> None:
    """A staging buffer that is written again after its event does no harm to what was sent."""
    where = str(trial.device.torch_device)
    device, queue = trial.device, trial.device.queue()
    up = device.make_staging((256,), "float32")
    targets = [torch.zeros(256, device=where) for _ in range(4)]
    for number, target in enumerate(targets):
        up.fill_(float(number + 1))
        queue.upload(up, target)
        queue.record().wait()
    up.fill_(-1.0)
    downs = [device.make_staging((256,), "float32") for _ in targets]
    for target, down in zip(targets, downs, strict=True):
        queue.download(target, down)
    queue.record().wait()
    for number, down in enumerate(downs):
        trial.require(
            bool((down == number + 1).all()),
            f"upload {number + 1} of one staging buffer brought {down[0].item()}: a target shares "
            "memory with the buffer, or an event was done before its copy",
        )


@check(level=0, op="device")
def records_cross_processes(trial: Trial) -> None:
    """The step records survive their encoding: a trace made here can be replayed elsewhere."""
    import msgspec

    from quire.core.interface import SamplingSpec

    request = NewRequest(
        request_id="a",
        token_ids=[1, 2],
        num_prompt_tokens=2,
        num_computed_tokens=0,
        block_ids=[[1]],
        sampling=SamplingSpec(temperature=0.0),
    )
    batch = StepBatch(
        step_id=1,
        finished_request_ids=[],
        new_requests=[request],
        request_ids=["a"],
        num_new_tokens=[2],
        num_computed_tokens=[0],
        new_block_ids=[None],
        samples=[True],
    )
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=StepBatch)
    trial.require(again == batch, "a StepBatch changed in its encoding")
    config = _config(trial)
    reasons = trial.device.reasons_against(config)
    trial.require(not reasons, f"the device refuses a plain configuration: {list(reasons)}")


def _config(trial: Trial) -> WorkerConfig:
    claims = trial.capabilities
    return WorkerConfig(
        model="model",
        dtype=claims.dtypes[0],
        cache_dtype=claims.cache_dtypes[0],
        block_size=trial.block_size,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        device_memory_fraction=0.5,
    )
