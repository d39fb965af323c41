"""Train the demo model and export it.

    python scripts/train_demo/train.py run --out runs/demo --minutes 90
    python scripts/train_demo/train.py run --out runs/demo --minutes 30 --resume
    python scripts/train_demo/train.py export --out runs/demo --to quire/demo

With `--tokens` alone the result is a function of the seed, the Python release and the number
format; with a time budget it also depends on how fast the machine was.
"""

from __future__ import annotations

import datetime as dt
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

if __package__ in (None, ""):  # started as a file: its package is the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_demo.batches import Mix, cut_windows
from train_demo.export import export_model
from train_demo.keeper import RunKeeper
from train_demo.preparation import Preparation, prepare
from train_demo.progress import ProgressDisplay
from train_demo.schedule import Budget, next_time_of_day
from train_demo.training import (
    Recipe,
    load_checkpoint,
    make_demo_run,
    train,
)
from train_demo.workers import Assignment, open_group

CHECKPOINT_NAME = "checkpoint.pt"

app = typer.Typer(add_completion=False, help=__doc__)

Out = Annotated[Path, typer.Option(help="Folder of the checkpoints.")]


@app.command("run")
def run_command(
    out: Out,
    tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop at this local time, HH:MM.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that share each batch.")] = 2,
    threads: Annotated[int, typer.Option(help="Threads of torch in each of them.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the text.")] = 0,
) -> None:
    """Train until the budget is used up; Ctrl-C or SIGTERM saves a checkpoint and stops."""
    torch.set_num_threads(threads)
    recipe = Recipe(seed=seed)
    preparation = prepare(vocab_size=recipe.vocab_size)
    run = make_demo_run(recipe)
    checkpoint = out / CHECKPOINT_NAME
    facts = load_checkpoint(run, checkpoint) if resume else _first_facts(preparation)
    facts["commands"].append(
        f"{shlex.join(['python', *sys.argv])}  # {workers} x {threads} threads"
    )
    out.mkdir(parents=True, exist_ok=True)
    keeper = RunKeeper(
        run=run,
        windows=cut_windows(preparation.held_out.documents, context=recipe.context),
        checkpoint=checkpoint,
        facts=facts,
        display=ProgressDisplay(Console()),
    )
    keeper.display.note(f"{run.model.num_parameters()} parameters, text: {preparation.facts}")
    assignment = Assignment(
        corpus=preparation.train,
        mix=Mix(),
        recipe=recipe,
        checkpoint=checkpoint if resume else None,
        rendezvous=out / f"rendezvous-{os.getpid()}",
        num_workers=workers,
        num_threads=threads,
    )
    _train_until_stopped(keeper, assignment, make_budget(tokens, minutes, until, run.progress))


@app.command("export")
def export_command(
    out: Out,
    to: Annotated[Path, typer.Option(help="Folder that receives the model.")],
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    """Write the checkpoint in --out as a Hugging Face model, with its measured losses."""
    torch.set_num_threads(threads)
    recipe = Recipe(seed=seed_of(out / CHECKPOINT_NAME))
    preparation = prepare(vocab_size=recipe.vocab_size)
    run = make_demo_run(recipe)
    facts = load_checkpoint(run, out / CHECKPOINT_NAME)
    record = export_model(run, preparation, facts, to)
    Console().print_json(data=record)


def make_budget(
    tokens: int | None, minutes: float | None, until: str | None, start_progress: float
) -> Budget:
    """The budget that the options ask for.

    Raises: typer.BadParameter if none is given, or two for the time.
    """
    if minutes is not None and until is not None:
        raise typer.BadParameter("--minutes and --until both set the time: give one of them")
    if tokens is None and minutes is None and until is None:
        raise typer.BadParameter("nothing ends this run: give --tokens, --minutes or --until")
    now = time.time()
    deadline = None if minutes is None else now + 60.0 * minutes
    if until is not None:
        deadline = next_time_of_day(until, dt.datetime.now().astimezone()).timestamp()
    return Budget(
        num_tokens=tokens, start_s=now, deadline_s=deadline, start_progress=start_progress
    )


def seed_of(checkpoint: Path) -> int:
    """The seed of the run that a checkpoint holds."""
    with torch.serialization.safe_globals([Recipe]):
        recipe: Recipe = torch.load(checkpoint, weights_only=True)["recipe"]
    return recipe.seed


def _first_facts(preparation: Preparation) -> dict[str, Any]:
    return {
        "started": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "text": preparation.facts,
        "commands": [],
        "held_out_history": [],
    }


def _train_until_stopped(keeper: RunKeeper, assignment: Assignment, budget: Budget) -> None:
    with _stop_requests() as stop, open_group(assignment) as group:
        reports = train(
            keeper.run,
            assignment.corpus,
            assignment.mix,
            budget,
            group=group,
            should_stop=lambda: bool(stop),
        )
        for _ in keeper.display.follow(reports):
            keeper.tend()
    keeper.finish()


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying, so that the last step is saved."""
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, remember) for number in signals}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    app()
