"""The training run itself: model, optimizers, steps and checkpoints that resume exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from train_demo.batches import Mix, TokenizedCorpus, iterate_batches
from train_demo.group import ALONE, WorkerGroup
from train_demo.schedule import Budget, learning_rate_factor
from train_demo.tokenizer import BOS, END, EOS, PAD, special_token_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Every number that decides what a run computes, apart from its budget."""

    seed: int = 0
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    context: int = 512
    batch_size: int = 8
    matrix_lr: float = 0.012
    """Muon's, for the matrices inside the layers, in AdamW's scale of update sizes."""
    embedding_lr: float = 0.006
    """AdamW's, for the embedding and the norms."""
    matrix_weight_decay: float = 0.05
    num_warmup_steps: int = 100
    decay_fraction: float = 0.5
    max_grad_norm: float = 1.0
    use_bfloat16: bool = True
    """Matrix products in bfloat16; weights and optimizer states stay float32."""


@dataclass(slots=True, kw_only=True)
class Run:
    """A run in progress; owns the model, its optimizers and the counters."""

    recipe: Recipe
    model: LlamaForCausalLM
    matrix_optimizer: torch.optim.Optimizer
    embedding_optimizer: torch.optim.Optimizer
    step: int = 0
    num_tokens: int = 0
    progress: float = 0.0
    trained_s: float = 0.0
    """Wall-clock seconds of all processes that worked on the run, pauses included."""

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens of one batch."""
        return self.recipe.batch_size * self.recipe.context


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did."""

    step: int
    num_tokens: int
    progress: float
    loss: float
    """Mean nats per token of the batch, before the update."""
    learning_rate_factor: float


def make_run(
    recipe: Recipe, *, eos_token_ids: list[int], bos_token_id: int, pad_token_id: int
) -> Run:
    """A fresh run; the weights are a function of the recipe's seed."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.hidden_size // recipe.num_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_ids,
        pad_token_id=pad_token_id,
    )
    model = LlamaForCausalLM(config)
    matrices = [
        weight for name, weight in model.named_parameters() if _is_layer_matrix(name, weight)
    ]
    others = [
        weight for name, weight in model.named_parameters() if not _is_layer_matrix(name, weight)
    ]
    return Run(
        recipe=recipe,
        model=model,
        matrix_optimizer=torch.optim.Muon(
            matrices,
            lr=recipe.matrix_lr,
            weight_decay=recipe.matrix_weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        embedding_optimizer=torch.optim.AdamW(
            others, lr=recipe.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0
        ),
    )


def make_demo_run(recipe: Recipe) -> Run:
    """A fresh run whose model knows the ids of the demo tokenizer's special tokens."""
    return make_run(
        recipe,
        eos_token_ids=[special_token_id(EOS), special_token_id(END)],
        bos_token_id=special_token_id(BOS),
        pad_token_id=special_token_id(PAD),
    )


def train(
    run: Run,
    corpus: TokenizedCorpus,
    mix: Mix,
    budget: Budget,
    *,
    group: WorkerGroup = ALONE,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepReport]:
    """Step until worker 0's budget is used up or it should stop; mutates `run`, reports each step.

    All workers call this with the same run and corpus. The batches follow the step count alone, so
    a saved run continues later as if it had never stopped.
    """
    batches = iterate_batches(
        corpus,
        mix,
        context=run.recipe.context,
        batch_size=run.recipe.batch_size,
        seed=run.recipe.seed,
        first_step=run.step,
    )
    run.model.train()
    clock = time.monotonic()
    for windows in batches:
        progress = math.inf if should_stop() else budget.progress(run.num_tokens, time.time())
        progress = group.share(progress)
        run.progress = run.progress if progress == math.inf else progress
        if progress >= 1.0:
            return
        yield _step(run, torch.from_numpy(windows[group.rank :: group.size]), group)
        run.trained_s, clock = run.trained_s + time.monotonic() - clock, time.monotonic()


def sequence_loss(model: LlamaForCausalLM, windows: Tensor, *, use_bfloat16: bool) -> Tensor:
    """Mean nats per predicted token of windows int64 [B, context + 1]; differentiable."""
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    targets = windows[:, 1:].reshape(-1)
    return functional.cross_entropy(logits.float().flatten(0, 1), targets)


@torch.inference_mode()
def evaluate(
    model: LlamaForCausalLM, windows: NDArray[np.int64], *, batch_size: int, use_bfloat16: bool
) -> float:
    """Mean nats per token over all windows [W, context + 1]; leaves the model in train mode."""
    model.eval()
    total = 0.0
    for start in range(0, len(windows), batch_size):
        batch = torch.from_numpy(windows[start : start + batch_size])
        total += sequence_loss(model, batch, use_bfloat16=use_bfloat16).item() * len(batch)
    model.train()
    return total / len(windows)


def save_checkpoint(run: Run, path: Path, facts: dict[str, Any]) -> None:
    """Write everything a run needs to go on, in one step: an interrupted write harms nothing."""
    partial = path.with_suffix(".partial")
    state = {
        "recipe": run.recipe,
        "model": run.model.state_dict(),
        "matrix_optimizer": run.matrix_optimizer.state_dict(),
        "embedding_optimizer": run.embedding_optimizer.state_dict(),
        "counters": (run.step, run.num_tokens, run.progress, run.trained_s),
        "facts": facts,
    }
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(run: Run, path: Path) -> dict[str, Any]:
    """Put a saved state into a run made from the same recipe; returns the facts saved with it.

    Raises: ValueError if the checkpoint was written with another recipe.
    """
    with torch.serialization.safe_globals([Recipe]):
        state = torch.load(path, weights_only=True)
    if state["recipe"] != run.recipe:
        raise ValueError(f"{path} holds a run of {state['recipe']}, asked was {run.recipe}")
    run.model.load_state_dict(state["model"])
    run.matrix_optimizer.load_state_dict(state["matrix_optimizer"])
    run.embedding_optimizer.load_state_dict(state["embedding_optimizer"])
    run.step, run.num_tokens, run.progress, run.trained_s = state["counters"]
    facts: dict[str, Any] = state["facts"]
    return facts


def _step(run: Run, windows: Tensor, group: WorkerGroup) -> StepReport:
    recipe = run.recipe
    factor = learning_rate_factor(
        step=run.step,
        progress=run.progress,
        num_warmup_steps=recipe.num_warmup_steps,
        decay_fraction=recipe.decay_fraction,
    )
    loss = sequence_loss(run.model, windows, use_bfloat16=recipe.use_bfloat16)
    loss.backward()
    parameters = list(run.model.parameters())
    loss = loss.detach()
    group.average([loss, *(weight.grad for weight in parameters if weight.grad is not None)])
    torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
    _update(run.matrix_optimizer, recipe.matrix_lr * factor)
    _update(run.embedding_optimizer, recipe.embedding_lr * factor)
    run.step += 1
    run.num_tokens += run.tokens_per_step
    return StepReport(
        step=run.step,
        num_tokens=run.num_tokens,
        progress=run.progress,
        loss=loss.item(),
        learning_rate_factor=factor,
    )


def _update(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()


def _is_layer_matrix(name: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and "embed_tokens" not in name
