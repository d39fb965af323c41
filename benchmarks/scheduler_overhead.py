"""What the scheduler costs: microseconds a step, with a device that takes no time.

    python -m quire.benchmarks.scheduler_overhead --running 64 256

Every running request decodes; a worker that computes nothing answers with one token each. Prints a
table, and writes the figures as JSON where asked. No figure includes the worker.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from quire.core.interface.worker import CacheGroup, CachePlan, SamplingSpec, StepBatch, StepResult
from quire.core.kv_cache.manager import KVCacheManager
from quire.core.scheduler.request import RequestSpec
from quire.core.scheduler.scheduler import Scheduler
from quire.core.scheduler.settings import SchedulerSettings

BLOCK_SIZE = 16
PROMPT_LEN = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Microseconds a step, in pure decode."""

    num_running: int
    num_groups: int
    num_steps: int
    schedule_mean_us: float
    update_mean_us: float
    total_mean_us: float
    total_median_us: float
    total_max_us: float
    total_us_per_request: float


def answer(batch: StepBatch, token: int) -> StepResult:
    """One token for each request that samples."""
    return StepResult(
        step_id=batch.step_id,
        sampled_token_ids=[[token] if samples else [] for samples in batch.samples],
    )


def make_scheduler(num_running: int, num_steps: int, num_groups: int) -> Scheduler:
    """A scheduler whose requests all decode in the next step."""
    max_model_len = PROMPT_LEN + num_steps + 10
    num_blocks = 1 + num_running * (max_model_len // BLOCK_SIZE + 3)
    groups = [_group(index) for index in range(num_groups)]
    cache = KVCacheManager(groups, CachePlan(num_blocks=[num_blocks] * num_groups))
    settings = SchedulerSettings(
        max_num_seqs=num_running,
        max_num_batched_tokens=PROMPT_LEN * num_running,
        max_model_len=max_model_len,
    )
    scheduler = Scheduler(settings, cache)
    for index in range(num_running):
        # Lengths differ, so that block boundaries are crossed in different steps, as in life.
        prompt = [index] * (PROMPT_LEN - index % BLOCK_SIZE)
        scheduler.add(
            RequestSpec(
                request_id=f"request-{index}",
                prompt_token_ids=prompt,
                sampling=SamplingSpec(),
                max_tokens=max_model_len - len(prompt),
                eos_token_ids=(2,),
            )
        )
    batch = scheduler.schedule()
    assert batch is not None
    assert batch.num_new_tokens[-1] > 1, batch
    scheduler.update(batch, answer(batch, 7))
    assert scheduler.num_running == num_running
    return scheduler


def _group(index: int) -> CacheGroup:
    return CacheGroup(
        name=f"group_{index}",
        kind="causal" if index == 0 else "sliding_window",
        window=None if index == 0 else 64,
        block_size=BLOCK_SIZE,
        num_layers=1,
        bytes_per_block=1,
    )


def measure(num_running: int, num_steps: int, num_groups: int) -> Figures:
    """Times `schedule` and `update` over `num_steps` decode steps."""
    scheduler = make_scheduler(num_running, num_steps, num_groups)
    schedule_us, update_us = [], []
    for _ in range(num_steps):
        started = time.perf_counter_ns()
        batch = scheduler.schedule()
        scheduled = time.perf_counter_ns()
        assert batch is not None
        assert len(batch.request_ids) == num_running
        result = answer(batch, 7)
        answered = time.perf_counter_ns()
        scheduler.update(batch, result)
        done = time.perf_counter_ns()
        schedule_us.append((scheduled - started) / 1000)
        update_us.append((done - answered) / 1000)
    totals = [a + b for a, b in zip(schedule_us, update_us, strict=True)]
    return Figures(
        num_running=num_running,
        num_groups=num_groups,
        num_steps=num_steps,
        schedule_mean_us=statistics.fmean(schedule_us),
        update_mean_us=statistics.fmean(update_us),
        total_mean_us=statistics.fmean(totals),
        total_median_us=statistics.median(totals),
        total_max_us=max(totals),
        total_us_per_request=statistics.fmean(totals) / num_running,
    )


def print_table(rows: Sequence[Figures]) -> None:
    """One line for each measurement."""
    print(f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}")
    print("running  groups  steps  schedule us  update us  total us  median us  max us  us/request")
    for row in rows:
        print(
            f"{row.num_running:7d}  {row.num_groups:6d}  {row.num_steps:5d}"
            f"  {row.schedule_mean_us:11.1f}  {row.update_mean_us:9.1f}"
            f"  {row.total_mean_us:8.1f}  {row.total_median_us:9.1f}"
            f"  {row.total_max_us:6.0f}  {row.total_us_per_request:10.2f}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Microseconds that the scheduler costs a step.")
    parser.add_argument("--running", type=int, nargs="+", default=[64, 256], metavar="N")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--groups",
        type=int,
        nargs="+",
        default=[1, 2],
        metavar="N",
        help="cache groups: the first is full attention, others a sliding window",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(argv)
    rows = [measure(n, options.steps, g) for n in options.running for g in options.groups]
    print_table(rows)
    if options.json:
        options.json.write_text(
            json.dumps([asdict(row) for row in rows], indent=2), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
