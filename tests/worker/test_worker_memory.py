"""What the worker holds, what it leaves to the cache, and what happens when the device refuses."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from worker_driver import BLOCK_SIZE, Driver, make_config, make_device, make_worker  # noqa: E402

from quire.backends.sim.device import SimDevice  # noqa: E402
from quire.core.errors import (  # noqa: E402
    DeviceError,
    DeviceLost,
    DeviceOutOfMemory,
    QuireError,
    UnsupportedError,
)
from quire.core.interface import CachePlan, Device, MemoryInfo, SamplingSpec  # noqa: E402
from quire.core.worker.device_errors import device_errors  # noqa: E402
from quire.core.worker.worker import DefaultWorker  # noqa: E402

HOST_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
)
DEVICE_MESSAGE = "Tried to allocate 1.50 GiB. The device has 2 GiB of which 1 GiB is free"


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "requested"),
    [
        (RuntimeError(HOST_MESSAGE), 4096),
        (torch.OutOfMemoryError(DEVICE_MESSAGE), 3 * 2**29),
        (MemoryError(), None),
        (torch.AcceleratorError("accelerator error: out of memory"), None),
    ],
)
def test_refused_allocation_becomes_out_of_memory_with_its_tag(error, requested):
    """Every way in which an allocator says no is one error with the size and the purpose."""
    with pytest.raises(DeviceOutOfMemory) as caught, device_errors("cache"):
        raise error
    assert caught.value.tag == "cache"
    assert caught.value.requested_bytes == requested
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("unspecified launch failure\nadvice"),
        RuntimeError("backend failed with 20 (RESULT_ERROR_DEVICE_LOST)"),
    ],
)
def test_dead_accelerator_becomes_device_lost(error):
    """An error of the accelerator that is no lack of memory costs the worker."""
    said = str(error).partition("\n")[0][-10:].strip("()")
    with pytest.raises(DeviceLost, match=f"{said}.*restart the engine"), device_errors("x"):
        raise error


def test_errors_of_other_kinds_pass_as_they_are():
    """A bug keeps its own type and traceback."""
    for error in (RuntimeError("size mismatch"), KeyError("a"), UnsupportedError([])):
        with pytest.raises(type(error)) as caught, device_errors("x"):
            raise error
        assert caught.value is error


class FailsOnce:
    """Replaces the model's forward: raises at one call, then never again."""

    def __init__(self, driver: Driver, error: Exception) -> None:
        self._model = driver.worker._model
        self._forward = self._model.forward
        self._error = error
        self._model.forward = self

    def __call__(self, step):
        self._model.forward = self._forward
        raise self._error


def start(tiny, prompts, **changes) -> Driver:
    driver = Driver(make_worker(tiny(), **changes))
    sampling = SamplingSpec(temperature=0.0, repetition_penalty=1.2)
    for name, prompt in prompts.items():
        driver.add(name, prompt, 6, sampling)
    return driver


@pytest.mark.parametrize("when", [0, 1, 3])
def test_step_out_of_memory_did_not_happen(when, tiny, prompts):
    """The same batch goes through afterwards: nothing was added, appended, counted or forgotten."""
    expected = start(tiny, prompts).run(20)
    driver = start(tiny, prompts)
    for _ in range(when):
        driver.step(driver.plan_step(20))
    batch = driver.make_batch(driver.plan_step(20))
    requests = driver.worker._running().requests
    rows = sorted(requests._row_of.values())
    before = (dict(requests._row_of), sorted(requests._free_rows))
    num_blocks = requests._num_blocks[:, rows].tolist()
    FailsOnce(driver, torch.OutOfMemoryError(DEVICE_MESSAGE))
    with pytest.raises(DeviceOutOfMemory) as caught:
        driver.worker.execute(batch)
    assert caught.value.tag == "activations"
    requests.check_integrity()
    assert (dict(requests._row_of), sorted(requests._free_rows)) == before
    assert requests._num_blocks[:, rows].tolist() == num_blocks
    driver.worker.health()
    driver.receive(batch, driver.worker.execute(batch))
    assert driver.run(20) == expected


def test_deferred_failure_takes_back_the_steps_built_on_it(tiny, prompts):
    """On an asynchronous device a failure shows late: both steps are undone and can be sent again."""
    expected = start(tiny, prompts).run(20)
    driver = start(tiny, prompts, device=SimDevice())
    driver.step(driver.plan_step(20))
    batches = [driver.make_batch(driver.plan_step(20)) for _ in range(2)]
    FailsOnce(driver, torch.OutOfMemoryError(DEVICE_MESSAGE))
    # A step with penalties waits for the one before it, so the failure may show on submission.
    driver.worker._running().requests.must_settle = lambda request_ids: False
    first, second = [driver.worker.submit(batch) for batch in batches]
    with pytest.raises(DeviceOutOfMemory):
        first.result()
    with pytest.raises(DeviceError, match="built on a step that failed"):
        second.result()
    with pytest.raises(DeviceOutOfMemory):
        first.result()
    del driver.worker._running().requests.must_settle
    driver.worker._running().requests.check_integrity()
    for batch in batches:
        driver.receive(batch, driver.worker.execute(batch))
    assert driver.run(20) == expected


def test_lost_device_is_unhealthy_ever_after(tiny, prompts):
    """The executor learns from `health` that this worker must be replaced."""
    driver = start(tiny, prompts)
    FailsOnce(driver, torch.AcceleratorError("unspecified launch failure"))
    with pytest.raises(DeviceLost):
        driver.step(driver.plan_step())
    with pytest.raises(DeviceLost):
        driver.worker.health()


# --- budget --------------------------------------------------------------------------------------


def make_loaded(tiny, device=None, **changes) -> DefaultWorker:
    worker = DefaultWorker(device or make_device(), make_config(tiny(), **changes))
    worker.load_model()
    return worker


def with_free(device, *free_bytes):
    """The device, telling these numbers in turn and the last one ever after."""
    numbers = list(free_bytes)

    def memory():
        free = numbers.pop(0) if len(numbers) > 1 else numbers[0]
        return MemoryInfo(total_bytes=2**40, free_bytes=free)

    device.memory = memory
    return device


def test_budget_given_is_taken_and_nothing_is_measured(tiny):
    """Who says how much gets that much."""
    worker = make_loaded(tiny, cache_memory_bytes=12345)
    worker._measured_step_bytes = pytest.fail
    assert worker.cache_budget_bytes() == 12345


def with_peak(device, *peak_bytes):
    """The device, telling these peaks in turn; it runs the work all the same."""
    numbers = list(peak_bytes)

    def measure(work):
        work()
        return numbers.pop(0)

    device.measure_peak_bytes = measure
    return device


def test_budget_of_shared_memory_is_at_least_what_shapes_say(tiny):
    """An allocator may serve a small step from memory that it kept, so that nothing is seen."""
    free = 2**30
    worker = make_loaded(tiny, with_peak(with_free(make_device(), free), 0, 0, 0))
    small = worker.cache_budget_bytes()
    weights = worker.memory_by_tag()["weights"]
    activations = worker.memory_by_tag()["activations"]
    assert small == free // 2 - weights - activations
    assert activations > 64 * 4 * 2 * 112 + 8 * 4 * 512
    device = with_peak(with_free(make_device(), free), 0, 0, 0)
    more = make_loaded(tiny, device, max_num_batched_tokens=2048)
    assert more.cache_budget_bytes() < small


def test_budget_of_shared_memory_scales_what_small_steps_take(tiny):
    """Tokens and requests are measured apart; what is taken only once is not scaled."""
    device = with_peak(with_free(make_device(), 2**40), 10**9, 16 * 10**6, 10**8)
    worker = make_loaded(tiny, device, max_num_batched_tokens=1024)
    worker.cache_budget_bytes()
    assert worker.memory_by_tag()["activations"] == 1024 * 10**6 + 10**8


def test_budget_of_a_device_with_its_own_memory_is_measured(tiny):
    """The largest step runs once; what the device then misses is not the cache's."""
    free, after_weights, after_step = 2**30, 2**30 - 2**20, 2**30 - 2**22
    device = with_free(make_device(copy_mode="synchronous"), free, after_weights, after_step)
    device.measure_peak_bytes = partial(Device.measure_peak_bytes, device)
    worker = make_loaded(tiny, device)
    steps = []
    forward = worker._model.forward
    worker._model.forward = lambda step: steps.append(len(step.token_ids)) or forward(step)
    budget = worker.cache_budget_bytes()
    assert steps == [64]
    peak = after_weights - after_step
    assert budget == free // 2 - worker.memory_by_tag()["weights"] - peak
    assert worker.memory_by_tag()["activations"] == peak


def test_budget_is_never_negative(tiny):
    """Too little memory is told by planning, with a number that makes sense."""
    worker = make_loaded(tiny, with_free(make_device(), 1000))
    assert worker.cache_budget_bytes() == 0


def test_memory_by_tag_counts_what_was_allocated(tiny):
    """The cache's tensors, byte for byte, and what the weights hold."""
    worker = make_worker(tiny(), num_blocks=10)
    group = worker.load_model().cache_groups[0]
    tags = worker.memory_by_tag()
    assert tags["cache"] == 10 * group.bytes_per_block
    assert group.bytes_per_block == 2 * BLOCK_SIZE * 2 * 2 * 16 * 4
    assert tags["weights"] == worker.load_model().weight_bytes > 0
    worker.close()
    worker.close()
    assert worker.memory_by_tag()["cache"] == 0


def test_cache_that_does_not_fit_is_out_of_memory(tiny):
    """A refused cache is an error with the cache's tag, and a smaller one can be had."""
    worker = make_loaded(tiny)
    with pytest.raises(DeviceOutOfMemory) as caught:
        worker.allocate_cache(CachePlan(num_blocks=[2**45]))
    assert caught.value.tag == "cache"
    worker.allocate_cache(CachePlan(num_blocks=[4]))


def test_worker_on_a_device_that_samples_elsewhere_is_refused(tiny):
    """What the default worker cannot do is told at once, with every reason."""
    device = make_device(samples_on_device=False)
    with pytest.raises(UnsupportedError) as caught:
        DefaultWorker(device, make_config(tiny(), world_size=2))
    codes = [reason.code for reason in caught.value.reasons]
    assert codes == ["worker.samples_on_device", "worker.world_size"]


def test_steps_before_the_cache_are_refused(tiny):
    """Calls out of order say what is missing."""
    worker = DefaultWorker(make_device(), make_config(tiny()))
    with pytest.raises(QuireError, match="load_model first"):
        worker.cache_budget_bytes()
    with pytest.raises(QuireError, match="allocate_cache first"):
        worker.warm_up()


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [make_device, SimDevice])
def test_blocks_of_one_worker_serve_another(device, tiny, prompts, oracle):
    """A prompt is computed here, its pages exported, and decoded there, from other blocks."""
    first = Driver(make_worker(tiny(), device=device()))
    first.add("r33", prompts["r33"], 10)
    first.step({"r33": 32})
    blocks = first.jobs["r33"].blocks[0]
    pages = first.worker.export_blocks(0, blocks)
    assert len(pages) == 4 * 2 * len(blocks) * BLOCK_SIZE * 2 * 32
    second = Driver(make_worker(tiny(), device=device()))
    job = second.add("r33", prompts["r33"], 10)
    second.worker.import_blocks(0, [40, 41, 42, 43], pages)
    second.worker.copy_blocks(0, [40, 41], [50, 51])
    job.num_computed = 32
    batch = second.make_batch({"r33": 1})
    batch.new_requests[0].block_ids[0][:4] = [50, 51, 42, 43]
    second.receive(batch, second.worker.execute(batch))
    assert second.run()["r33"] == oracle()["r33"]


def test_import_of_the_wrong_size_is_refused(tiny):
    """Pages of another model are not taken for ours."""
    worker = make_worker(tiny())
    with pytest.raises(QuireError, match="float32 \\(2, 1, 8, 2, 32\\)"):
        worker.import_blocks(0, [1], np.zeros(7, "<f4").tobytes())
