"""The whole engine on an accelerator: a decode step, the host's part of it, and both our peers."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from quire.backends.torch_accelerator.queue import StreamEvent
from quire.benchmarks import workloads
from quire.benchmarks.accelerator_kernels import Ceiling
from quire.benchmarks.recording import Measurement, Record, paired_ratio
from quire.benchmarks.shapes import SHAPES, make_model
from quire.benchmarks.transformers_batching import even, run_batched
from quire.benchmarks.workloads import Work
from quire.core.discovery import load_backend

if TYPE_CHECKING:
    from quire import LLM

_EVEN_TOKENS = 128
"""Of each output where a peer wants all outputs of one length."""
_PEERS = 4
"""Requests of a load that `generate` runs, one at a time."""
_MIXED, _EVEN = "mixed load", "even load"


@dataclass(slots=True, kw_only=True)
class EngineRun:
    """One model of random weights, run by Quire and by its peers, each when it is asked for."""

    backend: str
    shape: str
    home: Path
    """Where models are kept."""
    record: Record
    """Gets every measurement, and ratios once both sides are there."""
    is_dry: bool
    _ours: dict[str, Measurement] = field(default_factory=dict)
    """By the load."""

    def quire(self, ceiling: Ceiling) -> None:
        """Both loads, a decode step against its floor, and what the host does for it."""
        works = self._works()
        llm = _start_quire(self._directory(), self.backend, is_dry=self.is_dry)
        try:
            _run_quire(llm, works[:1])
            for load, some in ((_MIXED, works), (_EVEN, self._evened())):
                self._ours[load] = self._rate("quire", load, some, _run_quire(llm, some))
                self.record.measurements.append(self._ours[load])
            self._steps(llm, ceiling)
        finally:
            llm.close()
            del llm
            gc.collect()

    def generate(self) -> None:
        """Transformers' own loop, one request at a time."""
        works = self._works()
        sample = workloads.sample_of(works, min(_PEERS, len(works)))
        seconds = _run_transformers(self._directory(), _torch_device(self.backend), sample)
        note = f"generate, one at a time, {len(sample)} of the requests"
        self._beside(_MIXED, self._rate("transformers", _MIXED, sample, seconds, note))

    def batched(self) -> None:
        """Transformers' continuous batching, which wants outputs of one length."""
        works = self._evened()
        seconds = _run_continuous(self._directory(), _torch_device(self.backend), works)
        self._beside(_EVEN, self._rate("transformers batched", _EVEN, works, seconds))

    def _beside(self, load: str, theirs: Measurement) -> None:
        self.record.measurements.append(theirs)
        if load in self._ours:
            ratio = paired_ratio(f"{load}, {self.shape}", self._ours[load], theirs)
            self.record.ratios.append(ratio)

    def _steps(self, llm: LLM, ceiling: Ceiling) -> None:
        batches = (1, 2) if self.is_dry else (1, 8, 64)
        self.record.measurements += [
            _decode_step(llm, self.shape, batch, ceiling, is_dry=self.is_dry) for batch in batches
        ]
        self.record.measurements += [
            _host_step(llm, self.shape, batch, is_dry=self.is_dry)
            for batch in (batches[0], batches[-1])
        ]

    def _directory(self) -> Path:
        return make_model(self.shape, self.home, dtype="bfloat16")

    def _works(self) -> list[Work]:
        if self.is_dry:
            return [Work(list(range(10, 14)), 2), Work(list(range(20, 23)), 2)]
        return workloads.mixed(np.random.default_rng(1000), SHAPES[self.shape]["vocab_size"])

    def _evened(self) -> list[Work]:
        return even(self._works(), 2 if self.is_dry else _EVEN_TOKENS)

    def _rate(
        self, subject: str, load: str, works: list[Work], seconds: float, note: str = ""
    ) -> Measurement:
        rate = sum(work.num_tokens for work in works) / seconds
        return Measurement(
            work=f"{load}, {self.shape}",
            subject=subject,
            unit="output tokens/s",
            values=(rate,),
            note=note,
        )


def _decode_step(
    llm: LLM, shape: str, batch: int, ceiling: Ceiling, *, is_dry: bool
) -> Measurement:
    """Seconds of a step over those that its weights and cached keys take to be read.

    The difference of a long and a short output, so that prompts and starts cancel out.
    """
    prompt, short, long = (4, 1, 3) if is_dry else (512, 8, 72)
    statistics = llm.statistics()
    token_bytes = statistics.memory_bytes["cache"] / llm.facts.num_cache_tokens
    context = prompt + (short + long) / 2
    floor_s = (llm.facts.weight_bytes + batch * context * token_bytes) / ceiling.bytes_per_s
    prompts = [[10 + number, *range(20, 19 + prompt)] for number in range(batch)]
    values = []
    for _ in range(1 if is_dry else 3):
        taken = [_run_quire(llm, [Work(p, n) for p in prompts]) for n in (short, long)]
        values.append((taken[1] - taken[0]) / (long - short) / floor_s)
    return Measurement(
        work=f"decode step, {shape}, {_requests(batch)}",
        subject="quire",
        unit="times weights and cache over copy bandwidth",
        values=tuple(values),
    )


def _host_step(llm: LLM, shape: str, batch: int, *, is_dry: bool) -> Measurement:
    """What the host itself does for a decode step: all of its time but the waiting for the device.

    The difference of a long and a short output, as for a step's own time.
    """
    prompt, short, long = (4, 1, 3) if is_dry else (32, 8, 136)
    prompts = [[10 + number, *range(20, 19 + prompt)] for number in range(batch)]
    values = []
    for _ in range(1 if is_dry else 3):
        taken = []
        for num_tokens in (short, long):
            with _timed_waiting() as waited:
                seconds = _run_quire(llm, [Work(p, num_tokens) for p in prompts])
            taken.append(seconds - sum(waited))
        values.append(1e3 * (taken[1] - taken[0]) / (long - short))
    return Measurement(
        work=f"host's part of a decode step, {shape}, {_requests(batch)}",
        subject="quire",
        unit="ms",
        values=tuple(values),
    )


@contextmanager
def _timed_waiting() -> Iterator[list[float]]:
    """Seconds of each wait for an event of a stream, while it lasts."""
    waited: list[float] = []
    wait = StreamEvent.wait

    def timed(event: StreamEvent) -> None:
        begin = time.perf_counter()
        try:
            wait(event)
        finally:
            waited.append(time.perf_counter() - begin)

    with patch.object(StreamEvent, "wait", timed):
        yield waited


def _requests(number: int) -> str:
    return f"{number} request{'s' if number > 1 else ''}"


def _start_quire(directory: Path, backend: str, *, is_dry: bool) -> LLM:
    from quire import LLM

    llm = LLM(
        model=str(directory),
        device=backend,
        dtype="bfloat16",
        max_model_len=64 if is_dry else 8192,
        max_num_seqs=2 if is_dry else 64,
        max_num_batched_tokens=32 if is_dry else 8192,
        cache_memory_bytes=(1 << 20) if is_dry else (16 << 30),
    )
    llm.warm_up()
    return llm


def _run_quire(llm: LLM, works: list[Work]) -> float:
    from quire import SamplingParams

    params = [
        SamplingParams(temperature=0.0, max_tokens=w.num_tokens, ignore_eos=True, detokenize=False)
        for w in works
    ]
    begin = time.perf_counter()
    llm.generate([{"prompt_token_ids": w.prompt} for w in works], params, use_tqdm=False)
    return time.perf_counter() - begin


def _torch_device(backend: str) -> str:
    device = load_backend(backend).open(0)
    return str(device.torch_device)


def _run_transformers(directory: Path, where: str, works: list[Work]) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model = model.to(where).eval()

    def generate(work: Work) -> None:
        ids = torch.tensor([work.prompt], device=where)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=work.num_tokens,
            min_new_tokens=work.num_tokens,
            do_sample=False,
        ).cpu()

    with torch.inference_mode():
        generate(works[0])
        begin = time.perf_counter()
        for work in works:
            generate(work)
        return time.perf_counter() - begin


def _run_continuous(directory: Path, where: str, works: list[Work]) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    return run_batched(model.to(where).eval(), works)
