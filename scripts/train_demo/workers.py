"""Several processes of one thread each that train one model, meeting once a step.

On a machine that others use too, threads that meet at every matrix product wait for the slowest
of them hundreds of times a step. Processes that share the batch meet once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing import get_context

from train_demo.batches import Mix, TokenizedCorpus
from train_demo.group import WorkerGroup
from train_demo.schedule import Budget
from train_demo.training import Recipe, load_checkpoint, make_demo_run, train


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a further worker needs to take part, sent to it when it starts."""

    corpus: TokenizedCorpus
    mix: Mix
    recipe: Recipe
    checkpoint: Path | None
    """Where to resume from."""
    rendezvous: Path
    """A file that does not exist yet, through which the workers find each other."""
    num_workers: int = 1
    num_threads: int = 1


@contextmanager
def open_group(assignment: Assignment) -> Iterator[WorkerGroup]:
    """Start the further workers and be worker 0; they end when worker 0 stops training."""
    if assignment.num_workers == 1:
        yield WorkerGroup()
        return
    context = get_context("spawn")
    others = [
        context.Process(target=_work, args=(rank, assignment), daemon=True)
        for rank in range(1, assignment.num_workers)
    ]
    for process in others:
        process.start()
    with _joined(0, assignment) as group:
        yield group
    for process in others:
        process.join()


@contextmanager
def _joined(rank: int, assignment: Assignment) -> Iterator[WorkerGroup]:
    distributed.init_process_group(
        "gloo",
        init_method=assignment.rendezvous.resolve().as_uri(),
        rank=rank,
        world_size=assignment.num_workers,
    )
    try:
        yield WorkerGroup(rank=rank, size=assignment.num_workers)
    finally:
        distributed.destroy_process_group()


def _work(rank: int, assignment: Assignment) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # worker 0 decides when the run stops
    torch.set_num_threads(assignment.num_threads)
    run = make_demo_run(assignment.recipe)
    if assignment.checkpoint is not None:
        load_checkpoint(run, assignment.checkpoint)
    with _joined(rank, assignment) as group:
        for _ in train(run, assignment.corpus, assignment.mix, Budget(), group=group):
            pass
