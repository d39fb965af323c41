"""From logits to one token a row, on the device.

In this order: custom processors, allowed tokens, grammar masks, bad words and min_tokens and
logit_bias (one addition), penalties, then temperature, top-k, top-p, min-p and the draw.
Log-probabilities are those of the model's own logits, before any of it. What no row asks for costs
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire.core.interface import Device, Ops, SamplingTensors
from quire.core.worker.logits_processors import LogitsProcessors
from quire.core.worker.sampling_arrays import SamplingArrays
from quire.core.worker.staging import Field


@dataclass(slots=True)
class CustomFailures:
    """Custom processors that raised, by request. Filled while the step runs."""

    messages: dict[str, str] = field(default_factory=dict)


class Sampler:
    """Samples the rows of a step. Holds no state of requests."""

    def __init__(
        self, device: Device, processors: LogitsProcessors, *, vocab_size: int, max_rows: int
    ) -> None:
        self._ops: Ops = device.ops()
        self._processors = processors
        self._vocab_size = vocab_size
        where = torch.device(str(device.torch_device))
        self._zeros = torch.zeros(max_rows, device=where)
        self._ones = torch.ones(max_rows, device=where)
        self._no_top_k = torch.full((max_rows,), vocab_size, dtype=torch.int64, device=where)

    def outputs(self, sampling: SamplingArrays) -> list[Field]:
        """What `run` writes."""
        num_rows = sampling.num_rows
        fields = [Field("tokens", (num_rows,), "int64"), Field("is_broken", (num_rows,), "bool")]
        if sampling.may_forbid_all:
            fields.append(Field("is_empty", (num_rows,), "bool"))
        if len(sampling.logprob_rows):
            fields += logprob_fields("", len(sampling.logprob_rows), self.num_top(sampling.num_top))
        return fields

    def num_top(self, wanted: int) -> int:
        """How many best tokens there can be."""
        return min(wanted, self._vocab_size)

    def run(
        self,
        logits: Tensor,
        sampling: SamplingArrays,
        tensors: Mapping[str, Tensor],
        out: Mapping[str, Tensor],
        failures: CustomFailures,
    ) -> None:
        """Samples each row of logits [R, V]. Mutates logits, `failures` and all of `out`.

        `out["is_broken"]` marks rows in which the model's logits have no finite largest one,
        `is_empty` those in which nothing was left to choose; their token is 0.
        """
        if _is_plain(sampling, tensors, out) and self._ops.most_likely(
            logits, out["tokens"], out["is_broken"]
        ):
            return
        logits = logits.float()
        torch.logical_not(torch.isfinite(logits.amax(dim=-1)), out=out["is_broken"])
        unusable = out["is_broken"]
        raw = logits.index_select(0, tensors["logprob_rows"]) if "logprob_rows" in tensors else None
        self._change(logits, sampling, tensors, failures)
        if "is_empty" in out:
            torch.logical_not(torch.isfinite(logits.amax(dim=-1)), out=out["is_empty"])
            unusable = unusable | out["is_empty"]
        chosen = self._ops.sample(logits, self._settings(sampling, tensors))
        tokens = out["tokens"].copy_(chosen).masked_fill_(unusable, 0)
        if raw is not None:
            wanted = tokens.index_select(0, tensors["logprob_rows"])
            write_logprobs(self._ops, raw, wanted, out, "", slice(None))

    def _change(
        self,
        logits: Tensor,
        sampling: SamplingArrays,
        tensors: Mapping[str, Tensor],
        failures: CustomFailures,
    ) -> None:
        self._run_custom(logits, sampling, failures)
        if "keep_rows" in tensors:
            self._ops.keep_only(
                logits,
                tensors["keep_rows"],
                tensors["keep_row_of_entry"],
                tensors["keep_token_ids"],
            )
        if "mask_rows" in tensors:
            self._ops.apply_token_mask(logits, tensors["mask_rows"], tensors["mask"])
        if "bias" in tensors:
            self._ops.add_bias(
                logits, tensors["bias_rows"], tensors["bias_token_ids"], tensors["bias"]
            )
        if "penalty_rows" in tensors:
            self._ops.apply_penalties(
                logits,
                tensors["penalty_rows"],
                tensors["penalty_token_ids"],
                tensors["penalty_counts"],
                tensors["penalty_settings"],
            )

    def _run_custom(
        self, logits: Tensor, sampling: SamplingArrays, failures: CustomFailures
    ) -> None:
        for custom in sampling.custom_rows:
            try:
                self._processors.apply(
                    custom.names, custom.prompt_ids, custom.output_ids, logits[custom.row]
                )
            except Exception as error:  # the user's code may raise anything; one request fails
                failures.messages[custom.request_id] = (
                    f"a logits processor ({', '.join(custom.names)}) raised "
                    f"{type(error).__name__}: {error}"
                )
                logits[custom.row] = 0.0

    def _settings(self, sampling: SamplingArrays, tensors: Mapping[str, Tensor]) -> SamplingTensors:
        rows = slice(0, sampling.num_rows)
        zeros = self._zeros[rows]
        return SamplingTensors(
            temperature=tensors.get("temperature", zeros),
            top_k=tensors.get("top_k", self._no_top_k[rows]),
            top_p=tensors.get("top_p", self._ones[rows]),
            min_p=tensors.get("min_p", zeros),
            uniform=tensors.get("uniform", zeros),
            is_all_greedy=sampling.is_all_greedy,
            needs_filter=sampling.needs_filter,
        )


_CHANGES = ("keep_rows", "mask_rows", "bias", "penalty_rows", "logprob_rows")
"""Inputs of rows that want more than the largest logit."""


def _is_plain(
    sampling: SamplingArrays, tensors: Mapping[str, Tensor], out: Mapping[str, Tensor]
) -> bool:
    """Whether the largest logit of each row is all that is asked."""
    is_changed = bool(sampling.custom_rows) or any(name in tensors for name in _CHANGES)
    return sampling.is_all_greedy and not is_changed and "is_empty" not in out


def logprob_fields(prefix: str, num_rows: int, num_top: int) -> list[Field]:
    """Where `write_logprobs` writes."""
    return [
        Field(f"{prefix}selected", (num_rows,), "float32"),
        Field(f"{prefix}ranks", (num_rows,), "int64"),
        Field(f"{prefix}top_ids", (num_rows, num_top), "int64"),
        Field(f"{prefix}top_logprobs", (num_rows, num_top), "float32"),
    ]


def write_logprobs(
    ops: Ops, logits: Tensor, tokens: Tensor, out: Mapping[str, Tensor], prefix: str, rows: slice
) -> None:
    """Log-probabilities of `tokens` under logits float32 [R, V], into `rows` of `out`."""
    num_top = out[f"{prefix}top_ids"].shape[1]
    found = ops.logprobs(logits, tokens, num_top)
    out[f"{prefix}selected"][rows].copy_(found.selected)
    out[f"{prefix}ranks"][rows].copy_(found.ranks)
    out[f"{prefix}top_ids"][rows].copy_(found.top_ids)
    out[f"{prefix}top_logprobs"][rows].copy_(found.top_logprobs)
