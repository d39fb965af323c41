"""What a run needs now and then: a measurement on held-out text, and a checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train_demo.progress import ProgressDisplay
from train_demo.training import Run, evaluate, save_checkpoint

CHECKPOINT_INTERVAL_S = 180.0
EVALUATION_INTERVAL_S = 300.0
NUM_EVALUATION_WINDOWS = 48


@dataclass(slots=True, kw_only=True)
class RunKeeper:
    """Measures and saves one run at intervals; owns the facts that go into its record."""

    run: Run
    windows: NDArray[np.int64]
    """Held-out text [W, context + 1]; the measurements on the way take an even sample of it."""
    checkpoint: Path
    facts: dict[str, Any]
    display: ProgressDisplay
    evaluated_s: float = field(default_factory=time.monotonic)
    saved_s: float = field(default_factory=time.monotonic)

    def tend(self) -> None:
        """Do what is due after a step."""
        if time.monotonic() - self.evaluated_s > EVALUATION_INTERVAL_S:
            self.measure()
        if time.monotonic() - self.saved_s > CHECKPOINT_INTERVAL_S:
            self.save()

    def finish(self) -> None:
        """Measure and save once more, and say how the run ended."""
        self.measure()
        self.save()
        state = "finished" if self.run.progress >= 1.0 else "stopped; go on with --resume"
        self.display.note(f"{state} at step {self.run.step}, {self.run.trained_s:.0f} s trained")

    def measure(self) -> None:
        """Print and remember the loss on a sample of the held-out text."""
        sample = self.windows[:: max(1, len(self.windows) // NUM_EVALUATION_WINDOWS)]
        recipe = self.run.recipe
        loss = evaluate(
            self.run.model, sample, batch_size=recipe.batch_size, use_bfloat16=recipe.use_bfloat16
        )
        tokens = self.run.num_tokens
        self.facts["held_out_history"].append([tokens, loss])
        self.display.note(f"held-out sample after {tokens} tokens: {loss:.4f} nats per token")
        self.evaluated_s = time.monotonic()

    def save(self) -> None:
        """Write the checkpoint."""
        save_checkpoint(self.run, self.checkpoint, self.facts)
        self.saved_s = time.monotonic()
