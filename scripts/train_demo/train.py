"""Train the demo model and export it.

    python scripts/train_demo/train.py run --out runs/demo --minutes 90
    python scripts/train_demo/train.py run --out runs/demo --minutes 30 --resume
    python scripts/train_demo/train.py export --out runs/demo --to quire/demo

With `--tokens` alone the result is a function of the seed, the Python release and the number
format; with a time budget it also depends on how fast the machine was.
"""

from __future__ import annotations

import datetime as dt
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

from train_demo.batches import Mix, held_out_windows
from train_demo.preparation import Preparation, prepare
from train_demo.progress import ProgressDisplay
from train_demo.schedule import Budget, next_time_of_day
from train_demo.tokenizer import BOS, END, EOS, PAD
from train_demo.training import (
    Recipe,
    Run,
    evaluate,
    load_checkpoint,
    make_run,
    save_checkpoint,
    train,
)

CHECKPOINT_NAME = "checkpoint.pt"
CHECKPOINT_INTERVAL_S = 180.0
EVALUATION_INTERVAL_S = 300.0
NUM_EVALUATION_WINDOWS = 48

app = typer.Typer(add_completion=False, help=__doc__)

Out = Annotated[Path, typer.Option(help="Folder of the checkpoints.")]


@app.command("run")
def run_command(
    out: Out,
    tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes.")] = None,
    until: Annotated[str | None, typer.Option(help="Stop at this local time, HH:MM.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the text.")] = 0,
) -> None:
    """Train until the budget is used up; Ctrl-C or SIGTERM saves a checkpoint and stops."""
    torch.set_num_threads(threads)
    display = ProgressDisplay(Console())
    recipe = Recipe(seed=seed)
    preparation = prepare(vocab_size=recipe.vocab_size)
    run = make_run_for(preparation, recipe)
    checkpoint = out / CHECKPOINT_NAME
    facts = load_checkpoint(run, checkpoint) if resume else _first_facts(preparation)
    facts["commands"].append(f"{shlex.join(['python', *sys.argv])}  # {threads} threads")
    out.mkdir(parents=True, exist_ok=True)
    budget = make_budget(tokens, minutes, until, run.progress)
    _train_and_save(run, preparation, budget, checkpoint, facts, display)


@app.command("export")
def export_command(
    out: Out,
    to: Annotated[Path, typer.Option(help="Folder that receives the model.")],
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    """Write the checkpoint in --out as a Hugging Face model, with its measured losses."""
    from train_demo.export import export_model  # it reads the held-out text through the model

    torch.set_num_threads(threads)
    recipe = Recipe(seed=torch_seed_of(out / CHECKPOINT_NAME))
    preparation = prepare(vocab_size=recipe.vocab_size)
    run = make_run_for(preparation, recipe)
    facts = load_checkpoint(run, out / CHECKPOINT_NAME)
    record = export_model(run, preparation, facts, to)
    Console().print_json(data=record)


def make_run_for(preparation: Preparation, recipe: Recipe) -> Run:
    """A fresh run whose model knows the ids of the tokenizer's special tokens."""
    tokenizer = preparation.tokenizer
    bos, eos, pad, end = tokenizer.convert_tokens_to_ids([BOS, EOS, PAD, END])
    return make_run(recipe, eos_token_ids=[eos, end], bos_token_id=bos, pad_token_id=pad)


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


def torch_seed_of(checkpoint: Path) -> int:
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


def _train_and_save(
    run: Run,
    preparation: Preparation,
    budget: Budget,
    checkpoint: Path,
    facts: dict[str, Any],
    display: ProgressDisplay,
) -> None:
    windows = held_out_windows(preparation.held_out.documents, context=run.recipe.context)
    windows = windows[:: max(1, len(windows) // NUM_EVALUATION_WINDOWS)]
    saved_s = evaluated_s = time.monotonic()

    def measure() -> None:
        loss = evaluate(run.model, windows, batch_size=8, use_bfloat16=run.recipe.use_bfloat16)
        facts["held_out_history"].append([run.num_tokens, loss])
        display.note(f"held-out sample after {run.num_tokens} tokens: {loss:.4f} nats per token")

    display.note(f"{run.model.num_parameters()} parameters, text: {preparation.facts}")
    with _stop_requests() as stop:
        for _ in display.follow(train(run, preparation.train, Mix(), budget)):
            now = time.monotonic()
            if now - evaluated_s > EVALUATION_INTERVAL_S:
                measure()
                evaluated_s = time.monotonic()
            if now - saved_s > CHECKPOINT_INTERVAL_S:
                save_checkpoint(run, checkpoint, facts)
                saved_s = time.monotonic()
            if stop:
                break
    measure()
    save_checkpoint(run, checkpoint, facts)
    state = "finished" if run.progress >= 1.0 else "stopped; go on with --resume"
    display.note(f"{state} at step {run.step}, {run.trained_s:.0f} s trained")


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
