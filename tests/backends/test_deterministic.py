"""With `deterministic`, what a request computes depends on nothing but the request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.backends.cpu import linear
from quire.backends.cpu.ops import CpuOps
from quire.benchmarks.shapes import SHAPES
from quire.core.errors import UnsupportedError
from quire.core.interface import DeviceError, QuantizedWeight
from quire.kernels_cpu import HAVE_NATIVE

pytestmark = pytest.mark.skipif(not HAVE_NATIVE, reason="the promise is that of the kernels")

CLASSES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model of two layers whose weights are made up at load."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen2-tiny"]))
    return tmp_path


def start(directory: Path, **settings: Any) -> LLM:
    """An engine whose load is the same each time."""
    defaults: dict[str, Any] = {
        "model": str(directory), "load_format": "dummy", "device": "cpu", "deterministic": True,
        "max_model_len": 256, "cache_memory_bytes": 4 << 20,
    }  # fmt: skip
    return LLM(**{**defaults, **settings})


def prompts() -> list[list[int]]:
    """Of lengths around the edges of blocks and tiles."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(10, 4000, (length,), generator=generator).tolist()
        for length in (1, 15, 33, 100, 17, 64)
    ]


def run(llm: LLM, given: list[list[int]]) -> list[list[tuple[int, float]]]:
    """For each prompt: the tokens and their log-probabilities, every bit of them."""
    params = SamplingParams(
        temperature=0.0, max_tokens=6, ignore_eos=True, detokenize=False, logprobs=1
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in given], params, use_tqdm=False)
    chosen = []
    for output in outputs:
        answer = output.outputs[0]
        assert answer.logprobs is not None
        pairs = zip(answer.token_ids, answer.logprobs, strict=True)
        chosen.append([(token, table[token].logprob) for token, table in pairs])
    return chosen


@pytest.mark.parametrize("name", CLASSES)
def test_logprobs_alone_in_a_batch_in_chunks_and_after_a_prefix_hit_are_bitwise_equal(
    name: str, directory: Path
) -> None:
    """Batch, chunk and prefix are the engine's affair and may not show in a single bit."""
    given = prompts()
    alone_engine = start(directory, enable_prefix_caching=False, **CLASSES[name])
    alone = [run(alone_engine, [ids])[0] for ids in given]
    together = start(directory, **CLASSES[name])
    assert run(together, given) == alone
    assert run(together, given) == alone, "with the prefixes in the cache"
    in_chunks = start(directory, max_num_batched_tokens=23, max_num_seqs=3, **CLASSES[name])
    assert run(in_chunks, given) == alone
    for llm in (alone_engine, together, in_chunks):
        llm.close()


def test_deterministic_with_a_cache_of_another_dtype_is_refused(directory: Path) -> None:
    """The kernel that keeps the promise reads no such cache."""
    with pytest.raises(UnsupportedError) as caught:
        start(directory, dtype="bfloat16", cache_dtype="float32")
    assert [r.code for r in caught.value.reasons] == ["config.deterministic"]


def test_deterministic_linear_whose_onednn_form_varies_takes_the_kernels(
    monkeypatch: pytest.MonkeyPatch, torch_rng: torch.Generator
) -> None:
    """A shape for which oneDNN's sums depend on the rows may not slip through."""
    monkeypatch.setattr(linear, "_min_rows", lambda *shape: None)
    weight = torch.randn((48, 64), generator=torch_rng)
    free, bound = CpuOps(), CpuOps(is_deterministic=True)
    assert linear.is_variant(free.pack_linear(weight, None))
    assert bound.pack_linear(weight, None).format == "native-float32"


def test_deterministic_with_groups_that_kernels_do_not_take_is_refused() -> None:
    """Plain torch would multiply them, in sums that depend on the rows."""
    weight = QuantizedWeight(
        bits=8, group_size=8, num_inputs=16, scales=torch.ones(4, 2),
        codes=torch.zeros(4, 16, dtype=torch.uint8),
    )  # fmt: skip
    with pytest.raises(DeviceError, match="multiple of 16"):
        CpuOps(is_deterministic=True).pack_quantized_linear(weight, None, "float32")
