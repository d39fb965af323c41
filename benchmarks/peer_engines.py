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

Runner = Callable[[Sequence[Work]], float]
"""Runs a load, greedy and without an end of text; returns the seconds it took."""
_CONTEXT = 4096
_MAX_REQUESTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """An engine."""

    name: str
    module: str
    """What must be installed."""
    start: Callable[[Path, str], Runner]
    """From the folder of a checkpoint in bfloat16 and a class of precision."""
    precisions: tuple[str, ...]
    is_batching: bool
    """Whether it runs the requests of a load together; else a sample of them stands for all."""

    def problem(self, precision: str) -> str:
        """Why it does not take part; empty: it does."""
        if precision not in self.precisions:
            return f"has no {precision} for this model"
        return "" if find_spec(self.module) else f"{self.module} is not installed"


def start_quire(directory: Path, precision: str, *, deterministic: bool = False) -> Runner:
    """Quire, quantizing at load."""
    from quire import LLM, SamplingParams

    llm = LLM(
        model=str(directory),
        dtype="bfloat16",
        quantization=None if precision == "bfloat16" else precision,
        max_model_len=_CONTEXT,
        max_num_seqs=_MAX_REQUESTS,
        max_num_batched_tokens=2048,
        cache_memory_bytes=1 << 30,
        **({"deterministic": True} if deterministic else {}),
    )

    def run(works: Sequence[Work]) -> float:
        params = [
            SamplingParams(
                temperature=0.0, max_tokens=w.num_tokens, ignore_eos=True, detokenize=False
            )
            for w in works
        ]
        prompts = [{"prompt_token_ids": work.prompt} for work in works]
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    return run


def _start_transformers(directory: Path, precision: str) -> Runner:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, precision)).eval()

    def run(works: Sequence[Work]) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            for work in works:
                ids = torch.tensor([work.prompt])
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=work.num_tokens,
                    min_new_tokens=work.num_tokens,
                    do_sample=False,
                )
        return time.perf_counter() - begin

    return run


def _start_llama_cpp(directory: Path, precision: str) -> Runner:
    import os

    from llama_cpp import Llama

    model = Llama(
        str(write_gguf(directory, precision)),
        n_ctx=_CONTEXT,
        n_batch=2048,
        n_ubatch=512,
        n_threads=os.cpu_count(),
        n_threads_batch=os.cpu_count(),
        verbose=False,
    )

    def run(works: Sequence[Work]) -> float:
        begin = time.perf_counter()
        for work in works:
            model.reset()
            tokens = model.generate(work.prompt, temp=0.0, repeat_penalty=1.0, top_k=1)
            for _ in range(work.num_tokens):
                next(tokens)
        return time.perf_counter() - begin

    return run


def _start_openvino(directory: Path, precision: str) -> Runner:
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_batched_tokens = 2048
    scheduler.max_num_seqs = _MAX_REQUESTS
    scheduler.enable_prefix_caching = True
    path = str(write_gguf(directory, precision))
    pipeline: Any = genai.ContinuousBatchingPipeline(path, scheduler, "CPU")

    def run(works: Sequence[Work]) -> float:
        import numpy as np
        import openvino

        configs = []
        for work in works:
            config = genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = work.num_tokens
            config.ignore_eos = True
            configs.append(config)
        prompts = [openvino.Tensor(np.array([work.prompt])) for work in works]
        begin = time.perf_counter()
        pipeline.generate(prompts, configs)
        return time.perf_counter() - begin

    return run


PEERS = (
    Peer(
        name="transformers",
        module="transformers",
        start=_start_transformers,
        precisions=("float32", "bfloat16"),
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
