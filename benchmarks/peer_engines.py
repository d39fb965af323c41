"""Other engines behind one face, for benchmarks that run them beside Quire on the same loads.

Each is imported when it is started; one that is not installed, or does not run the model, says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quire.benchmarks.gguf_model import FORMATS, write_gguf
from quire.benchmarks.workloads import Work

_CONTEXT = 4096
_MAX_REQUESTS = 32
_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a load."""

    seconds: float
    tokens: list[int]
    """The output of its first request."""


Runner = Callable[[Sequence[Work]], Outcome]
"""Runs a load, greedy and without an end of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """An engine."""

    name: str
    module: str
    """What must be installed."""
    start: Callable[[Path, str, int], Runner]
    """From the folder of a checkpoint in bfloat16, a class of precision, and how many threads."""
    precisions: tuple[str, ...]
    is_batching: bool
    """Whether it runs the requests of a load together; else a sample of them stands for all."""

    def problem(self, precision: str) -> str:
        """Why it does not take part; empty: it does."""
        if precision not in self.precisions:
            return f"has no {precision} for this model"
        return "" if find_spec(self.module) else f"{self.module} is not installed"


def _start_quire(directory: Path, precision: str, threads: int) -> Runner:
    return _quire_runner(directory, precision, threads, is_deterministic=False)


def _start_deterministic_quire(directory: Path, precision: str, threads: int) -> Runner:
    return _quire_runner(directory, precision, threads, is_deterministic=True)


def _quire_runner(
    directory: Path, precision: str, threads: int, *, is_deterministic: bool
) -> Runner:
    """Quire, quantizing at load."""
    from quire import LLM, SamplingParams

    llm = LLM(
        model=str(directory),
        dtype="bfloat16",
        quantization=None if precision == "bfloat16" else precision,
        max_model_len=_CONTEXT,
        max_num_seqs=_MAX_REQUESTS,
        max_num_batched_tokens=_BATCH_TOKENS,
        cache_memory_bytes=1 << 30,
        deterministic=is_deterministic,
        options={"cpu.num_threads": str(threads)},
    )

    def run(works: Sequence[Work]) -> Outcome:
        params = [
            SamplingParams(
                temperature=0.0, max_tokens=w.num_tokens, ignore_eos=True, detokenize=False
            )
            for w in works
        ]
        prompts = [{"prompt_token_ids": work.prompt} for work in works]
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return Outcome(seconds, list(outputs[0].outputs[0].token_ids))

    return run


def _start_transformers(directory: Path, precision: str, threads: int) -> Runner:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, precision)).eval()

    def generate(work: Work) -> list[int]:
        ids = torch.tensor([work.prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=work.num_tokens,
            min_new_tokens=work.num_tokens,
            do_sample=False,
        )
        return [int(token) for token in output[0, len(work.prompt) :]]

    def run(works: Sequence[Work]) -> Outcome:
        begin = time.perf_counter()
        with torch.inference_mode():
            outputs = [generate(work) for work in works]
        return Outcome(time.perf_counter() - begin, outputs[0])

    return run


def _start_llama_cpp(directory: Path, precision: str, threads: int) -> Runner:
    from llama_cpp import Llama

    model = Llama(
        str(write_gguf(directory, precision)),
        n_ctx=_CONTEXT,
        n_batch=_BATCH_TOKENS,
        n_ubatch=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def generate(work: Work) -> list[int]:
        model.reset()
        tokens = model.generate(work.prompt, temp=0.0, repeat_penalty=1.0, top_k=1)
        return [next(tokens) for _ in range(work.num_tokens)]

    def run(works: Sequence[Work]) -> Outcome:
        begin = time.perf_counter()
        outputs = [generate(work) for work in works]
        return Outcome(time.perf_counter() - begin, outputs[0])

    return run


def _start_openvino(directory: Path, precision: str, threads: int) -> Runner:
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_batched_tokens = _BATCH_TOKENS
    scheduler.max_num_seqs = _MAX_REQUESTS
    scheduler.enable_prefix_caching = True
    # Its reader of GGUF takes no BF16; either is two bytes a weight.
    path = str(write_gguf(directory, "float16" if precision == "bfloat16" else precision))
    settings = {"INFERENCE_NUM_THREADS": threads}
    pipeline: Any = genai.ContinuousBatchingPipeline(path, scheduler, "CPU", settings)

    def run(works: Sequence[Work]) -> Outcome:
        import numpy as np
        import openvino

        configs = [_openvino_config(work) for work in works]
        prompts = [openvino.Tensor(np.array([work.prompt])) for work in works]
        begin = time.perf_counter()
        results = pipeline.generate(prompts, configs)
        seconds = time.perf_counter() - begin
        return Outcome(seconds, [int(token) for token in results[0].m_generation_ids[0]])

    return run


def _openvino_config(work: Work) -> Any:
    import openvino_genai as genai

    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = work.num_tokens
    config.ignore_eos = True
    return config


QUIRE = Peer(
    name="quire",
    module="quire",
    start=_start_quire,
    precisions=("bfloat16", "int8", "int4"),
    is_batching=True,
)
DETERMINISTIC = Peer(
    name="quire --deterministic",
    module="quire",
    start=_start_deterministic_quire,
    precisions=QUIRE.precisions,
    is_batching=True,
)
PEERS = (
    Peer(
        name="transformers",
        module="transformers",
        start=_start_transformers,
        precisions=("bfloat16",),
        is_batching=False,
    ),
    Peer(
        name="llama.cpp",
        module="llama_cpp",
        start=_start_llama_cpp,
        precisions=tuple(FORMATS),
        is_batching=False,
    ),
    Peer(
        name="OpenVINO GenAI",
        module="openvino_genai",
        start=_start_openvino,
        precisions=tuple(FORMATS),
        is_batching=True,
    ),
)
