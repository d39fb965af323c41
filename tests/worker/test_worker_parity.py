"""Whole runs through the worker: the greedy tokens of transformers, however the work is cut."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from worker_driver import Driver, make_device, make_worker

from quire.backends.sim.device import SimDevice

NUM_GROUPS = {"llama": 1, "gemma3": 2}


def start(tiny, prompts, variant="llama", **changes) -> Driver:
    driver = Driver(make_worker(tiny(variant), **changes), num_groups=NUM_GROUPS[variant])
    for name, prompt in prompts.items():
        driver.add(name, prompt, max_tokens=10)
    return driver


@pytest.mark.parametrize("variant", NUM_GROUPS)
@pytest.mark.parametrize("chunk", [64, 5, 1])
def test_run_any_chunk_size_gives_the_tokens_of_transformers(variant, chunk, tiny, prompts, oracle):
    """Prefill, chunks and decodes mix in one step and change nothing."""
    assert start(tiny, prompts, variant).run(chunk) == oracle(variant)


@pytest.mark.parametrize("mode", ["synchronous", "unified", "asynchronous"])
def test_run_any_copy_mode_gives_the_tokens_of_transformers(mode, tiny, prompts, oracle):
    """How arrays reach the device is no one's business but the staging's."""
    driver = start(tiny, prompts, device=make_device(copy_mode=mode))
    assert driver.run(16) == oracle()


@pytest.mark.parametrize(
    ("token_buckets", "request_buckets"),
    [((8, 32, 64, 512), ()), ((), (1, 4, 8)), ((8, 16, 64, 512), (2, 8)), ((300,), (8,))],
)
def test_run_any_buckets_give_the_tokens_of_transformers(
    token_buckets, request_buckets, tiny, prompts, oracle
):
    """Padding tokens and padding requests are invisible to real ones."""
    claims = make_device(token_buckets=token_buckets, request_buckets=request_buckets)
    driver = start(tiny, prompts, "gemma3", device=claims)
    shapes = set()
    runner = driver.worker._running()
    forward = runner._forward

    def noting(tensors, batches, *rest):
        shapes.add((batches[0].num_tokens, batches[0].num_requests))
        return forward(tensors, batches, *rest)

    runner._forward = noting
    assert driver.run(23) == oracle("gemma3")
    assert {tokens for tokens, _ in shapes} <= set(token_buckets) or not token_buckets
    assert {requests for _, requests in shapes} <= set(request_buckets) or not request_buckets


@pytest.mark.parametrize("variant", NUM_GROUPS)
@pytest.mark.parametrize("chunk", [64, 7])
def test_run_overlapped_on_an_asynchronous_device_gives_the_tokens_of_transformers(
    variant, chunk, tiny, prompts, oracle
):
    """A step is prepared, and its buffers are written, while the one before it has not run."""
    driver = start(tiny, prompts, variant, device=SimDevice())
    assert driver.run_overlapped(chunk) == oracle(variant)


@pytest.mark.parametrize("when", [1, 3, 6])
def test_run_preempted_requests_go_on_where_they_were(when, tiny, prompts, oracle):
    """Forgotten in one step, new with all its tokens in a later one, into other blocks."""
    driver = start(tiny, prompts)
    for _ in range(when):
        driver.step(driver.plan_step(20))
    for name in ("r50", "r7", "r1"):
        driver.preempt(driver.jobs[name])
    others = {name: n for name, n in driver.plan_step(20).items() if name in ("r33", "r8", "r17")}
    driver.step(others)
    assert driver.run(20) == oracle()


def test_run_requests_that_come_and_go_leave_the_others_alone(tiny, prompts, oracle):
    """Rows are reused while their neighbours run; an aborted request leaves no trace."""
    driver = start(tiny, {})
    aborted = driver.add("aborted", prompts["r33"], 50)
    for name, prompt in prompts.items():
        driver.add(name, prompt, max_tokens=10)
        driver.step(driver.plan_step(9))
        driver.step(driver.plan_step(9))
    driver.preempt(aborted)
    del driver.jobs["aborted"]
    assert driver.run(9) == oracle()


def test_run_prefix_hit_reads_the_cached_blocks(tiny, prompts, oracle):
    """A request may come with tokens computed: those blocks are read and not written."""
    driver = start(tiny, {"r50": prompts["r50"]})
    first = driver.jobs["r50"]
    driver.step({"r50": 50})
    hit = driver.add("r50-again", prompts["r50"], 10)
    hit.num_computed = 48
    hit.blocks = None
    batch = driver.make_batch({"r50-again": 2, "r50": 1})
    shared = first.blocks[0][:6]
    batch.new_requests[0].block_ids[0][:6] = shared
    driver.receive(batch, driver.worker.execute(batch))
    driver.run()
    assert hit.output == first.output == oracle()["r50"]


def test_warm_up_leaves_no_request_behind(tiny, prompts, oracle):
    """What warms up is forgotten, and the cache it wrote to belongs to nobody."""
    device = make_device(token_buckets=(16, 64, 512), request_buckets=(1, 8))
    driver = start(tiny, prompts, device=device)
    driver.worker.warm_up()
    assert len(driver.worker._running().requests) == 0
    assert driver.run(30) == oracle()


def test_step_that_fills_the_largest_bucket_has_padding_requests_without_tokens(tiny, prompts):
    """No token is left for them, and nobody minds."""
    prompt = prompts["r50"] + prompts["r17"][:14]
    plain = Driver(make_worker(tiny()))
    plain.add("a", prompt, 4)
    device = make_device(token_buckets=(8, 64), request_buckets=(4,))
    padded = Driver(make_worker(tiny(), device=device, max_num_seqs=4))
    padded.add("a", prompt, 4)
    assert padded.run(64) == plain.run(64)
