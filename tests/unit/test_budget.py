"""The time of a benchmark program: nothing begins that cannot end, nothing is left out silently."""

from __future__ import annotations

import signal
import time
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.benchmarks.budget import Budget, Part, TimeUp, stopped_after


class Clock:
    """Stands still but for work."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(needs: list[float], shares: list[float], seconds: float) -> tuple[Budget, Clock, list[str]]:
    """Parts of such needs, each of which takes its share of what it said."""
    clock, begun = Clock(), []

    def work(name: str, duration: float) -> None:
        begun.append(name)
        clock.now += duration

    parts = [
        Part(
            name=f"part {number}",
            needs_s=need,
            work=lambda n=f"part {number}", d=need * share: work(n, d),
        )
        for number, (need, share) in enumerate(zip(needs, shares, strict=True))
    ]
    budget = Budget(seconds=seconds, clock=clock, stopping=lambda left: nullcontext())
    budget.run(parts)
    return budget, clock, begun


@given(
    st.lists(st.tuples(st.floats(0, 300), st.floats(0, 1)), max_size=12),
    st.floats(0, 1000),
)
def test_parts_end_in_time_and_each_is_run_or_named(parts, seconds):
    """As long as no part takes longer than it says, the whole ends before its end."""
    needs, shares = [need for need, _ in parts], [share for _, share in parts]
    budget, clock, begun = run(needs, shares, seconds)
    assert clock.now - 1000.0 <= seconds + 1e-6
    named = [line.partition(":")[0] for line in budget.left_out]
    assert sorted(begun + named) == sorted(f"part {n}" for n in range(len(parts)))


def test_part_that_is_left_out_says_what_it_needs_and_what_was_left():
    """And a shorter one after it is still run."""
    budget, _, begun = run([60, 200, 30], [1, 1, 1], 105)
    assert begun == ["part 0", "part 2"]
    assert budget.left_out == ["part 1: may take 200 s, 40 s were left"]


def test_part_that_runs_over_is_stopped_and_named_and_the_time_is_kept():
    """What a part said of itself was wrong: the program ends in time all the same."""
    clock, done = Clock(), []

    def endless() -> None:
        clock.now += 80
        raise TimeUp

    budget = Budget(seconds=100, clock=clock, stopping=lambda left: nullcontext())
    budget.run([
        Part(name="endless", needs_s=10, work=endless),
        Part(name="next", needs_s=50, work=lambda: done.append(1)),
    ])  # fmt: skip
    assert budget.was_stopped
    assert not done
    assert budget.left_out == [
        "endless: stopped after 80 s",
        "next: may take 50 s, 15 s were left",
    ]


def test_part_that_fails_is_named_and_the_others_run():
    """A library that raises costs its own figures alone; what was measured is kept each time."""

    def fail() -> None:
        raise ValueError("no kernel for this")

    kept, clock = [], Clock()
    budget = Budget(seconds=100, clock=clock, stopping=lambda left: nullcontext())
    fine = Part(name="fine", needs_s=1, work=lambda: None)
    budget.run(
        [Part(name="bad", needs_s=1, work=fail), fine], after_each=lambda: kept.append(clock.now)
    )
    assert budget.failed == ["bad: ValueError: no kernel for this"]
    assert budget.left_out == []
    assert len(kept) == 2


def spin(seconds: float) -> None:
    """Work that catches every error."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        try:
            sum(range(1000))
        except Exception:
            continue


def test_work_that_does_not_end_is_interrupted():
    """By the system's timer, also through code that catches every error; nothing stays set."""
    with pytest.raises(TimeUp), stopped_after(0.05):
        spin(60)
    with stopped_after(1000):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
