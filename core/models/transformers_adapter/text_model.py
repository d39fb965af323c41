"""A transformers causal LM behind a signature that is the same for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_CACHE_NAMES = ("past_key_values", "cache_params", "state", "mems")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutput:
    """What a run brought."""

    hidden: Tensor
    """[n, H]: what `TextModel.logits` takes rows of."""
    cache: Any


class TextModel:
    """Runs one text of n tokens a call, with or without a cache of transformers' own.

    Where the model's head can be parted from its body, only the body runs here and `logits`
    computes the head for the rows that are asked for; else rows are logits already.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.body: Any = getattr(model, "base_model", model)
        self.is_parted = False
        self._body_output: Any = None
        parameters = inspect.signature(self.model.forward).parameters
        self._takes = set(parameters)
        self._body_takes = set(inspect.signature(self.body.forward).parameters)
        named = [name for name in _CACHE_NAMES if name in parameters]
        self.cache_name = named[0] if named else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def config(self) -> Any:
        """Of the text part."""
        return self.model.config.get_text_config(decoder=True)

    def run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        *,
        cache: Any = None,
        keeps_cache: bool = False,
        mask_length: int | None = None,
    ) -> RunOutput:
        """Runs int64 [n] tokens. `mask_length`: pass a mask of so many ones."""
        takes = self._body_takes if self.is_parted else self._takes
        arguments = self._arguments(takes, token_ids, positions, mask_length)
        if "use_cache" in takes:
            arguments["use_cache"] = keeps_cache
        if cache is not None and self.cache_name is not None:
            arguments[self.cache_name] = cache
        module = self.body if self.is_parted else self.model
        output = module(**arguments)
        hidden = output[0] if self.is_parted else output.logits
        if self.is_parted and self._body_output is None:
            self._body_output = output
        new_cache = getattr(output, self.cache_name, None) if self.cache_name else None
        return RunOutput(hidden=hidden[0], cache=new_cache)

    def whole_logits(
        self, token_ids: Tensor, positions: Tensor, mask_length: int | None = None
    ) -> Tensor:
        """Logits [n, V] of an uncached run of body and head as one.

        `mask_length`: pass a mask of so many ones, which keeps models from looking for the borders
        of several texts.
        """
        was_parted, self.is_parted = self.is_parted, False
        try:
            return self.run(token_ids, positions, mask_length=mask_length).hidden
        finally:
            self.is_parted = was_parted

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [R, V] of rows [R, H] of what `run` returned."""
        if not self.is_parted:
            return hidden.float()
        output: Any = self._head(hidden)
        logits: Tensor = output.logits[0].float()
        return logits

    def part(self) -> None:
        """Parts the head from the body, if the model's own head then gives the same logits."""
        if self.body is self.model:
            return
        tokens = torch.arange(3, 10, device=self.device)
        positions = torch.arange(7, device=self.device)
        with torch.no_grad():
            whole = self.run(tokens, positions).hidden.float()
            try:
                self.is_parted = True
                parted = self.logits(self.run(tokens, positions).hidden)
                self.is_parted = parted.shape == whole.shape and torch.allclose(
                    parted, whole, rtol=1e-3, atol=1e-3
                )
            # The code between body and head may want anything of the body's output.
            except Exception:
                self.is_parted = False

    def _head(self, hidden: Tensor) -> Any:
        """The model's own forward around a body that answers with these rows."""
        kept = self._body_output
        stand_in = type(kept)(last_hidden_state=hidden.unsqueeze(0))
        original = self.body.forward
        self.body.forward = lambda *_, **__: stand_in
        try:
            token_ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
            arguments = {"input_ids": token_ids}
            if "use_cache" in self._takes:
                return self.model(**arguments, use_cache=False)
            return self.model(**arguments)
        finally:
            self.body.forward = original

    def _arguments(
        self, takes: set[str], token_ids: Tensor, positions: Tensor, mask_length: int | None
    ) -> dict[str, Any]:
        arguments: dict[str, Any] = {"input_ids": token_ids.unsqueeze(0)}
        if "position_ids" in takes:
            arguments["position_ids"] = positions.unsqueeze(0)
        if mask_length is not None and "attention_mask" in takes:
            arguments["attention_mask"] = torch.ones(
                (1, mask_length), dtype=torch.int64, device=token_ids.device
            )
        return arguments


@contextmanager
def set_attention(model: Any, name: str) -> Iterator[None]:
    """All configs of a model name this attention, and afterwards what they named before."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: getattr(c, "_attn_implementation", None) for key, c in configs.items()}
    use_attention(model, name)
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]  # noqa: SLF001 - no public way


def attention_of(model: Any) -> str:
    """The attention that a model's config names."""
    return str(model.config._attn_implementation)  # noqa: SLF001 - no public way


def use_attention(model: Any, name: str) -> None:
    """All configs of a model name this attention."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            # The public setter refuses models whose authors have not tried it.
            config._attn_implementation = name  # noqa: SLF001
