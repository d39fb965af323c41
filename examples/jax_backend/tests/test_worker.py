"""What the conformance suite does not ask of a worker: blocks, failures, constraints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import jax
import numpy as np
import pytest
import quire_jax.worker
from driving import GREEDY, NUM_BLOCKS, VOCAB_SIZE, decode, make_batch, make_worker
from jax.errors import JaxRuntimeError
from quire_jax import JaxBackend

from quire.core.interface import (
    CachePlan,
    CheckpointError,
    DeviceLost,
    DeviceOutOfMemory,
    QuireError,
    SamplingSpec,
    UnsupportedError,
    Worker,
    WorkerConfig,
)

PROMPT = [(7 * i) % 90 for i in range(31)]  # longer than the window; two fit into a step


@pytest.fixture
def worker(tmp_path) -> Iterator[Worker]:
    """A worker in float32."""
    worker = make_worker(tmp_path)
    yield worker
    worker.close()
    worker.close()


def refuse(*arguments: object, **settings: object) -> None:
    """What XLA raises where memory is short."""
    raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes.")


def fail(*arguments: object, **settings: object) -> None:
    """What XLA raises where a device has failed."""
    raise JaxRuntimeError("INTERNAL: Accelerator device halted prematurely")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_moved_to_another_worker_go_on_as_before(tmp_path, dtype):
    """Exported and imported elsewhere, a context gives the token that it gives at home."""
    here, there = (make_worker(tmp_path, cache_dtype=dtype, dtype=dtype) for _ in range(2))
    here.execute(make_batch(1, {"a": PROMPT}, samples=[False]))
    for group in (0, 1):
        moved = here.export_blocks(group, [1, 2, 3])
        assert len(moved) == 4 * 3 * 16 * 2 * 16  # one layer a group, keys and values
        there.import_blocks(group, [7, 5, 9], moved)
        assert there.export_blocks(group, [7, 5, 9]) == moved
        there.copy_blocks(group, [7, 5, 9], [1, 2, 3])
    tokens = []
    for worker in (here, there):
        again = make_batch(
            2, {"b": [*PROMPT, 3]}, num_new_tokens=[1], num_computed_tokens=[len(PROMPT)]
        )
        tokens.append(worker.execute(again).sampled_token_ids)
    fresh = make_worker(tmp_path, cache_dtype=dtype, dtype=dtype)
    tokens.append(fresh.execute(make_batch(1, {"b": [*PROMPT, 3]})).sampled_token_ids)
    assert tokens[0] == tokens[1] == tokens[2]


def test_import_of_too_few_bytes_is_refused(worker):
    """A torn transfer must not become somebody's context."""
    with pytest.raises(QuireError, match="canonical layout"):
        worker.import_blocks(0, [1, 2], b"\0" * 64)


def test_what_unused_slots_hold_reaches_nobody(worker):
    """NaN in every slot that nothing was written to, and the tokens are the same."""
    expected = worker.execute(make_batch(1, {"a": PROMPT})).sampled_token_ids
    worker._pool = jax.tree.map(lambda part: part * np.nan, worker._pool)
    again = make_batch(2, {"b": PROMPT}, finished_request_ids=["a"])
    result = worker.execute(again)
    assert not result.errors
    assert result.sampled_token_ids == expected


@pytest.mark.parametrize("where", ["forward", "run_sampling"])
def test_step_that_runs_out_of_memory_has_not_happened(worker, monkeypatch, where):
    """The engine sends the same batch again and gets what it would have got."""
    batch = make_batch(1, {"a": PROMPT})
    with monkeypatch.context() as patch:
        patch.setattr(quire_jax.worker, where, refuse)
        with pytest.raises(DeviceOutOfMemory) as caught:
            worker.execute(batch)
    assert (caught.value.requested_bytes, caught.value.tag) == (4096, "activations")
    assert not len(worker._book)
    worker.health()
    (first,) = worker.execute(batch).sampled_token_ids[0]
    (second,) = decode(worker, 2, "a", len(PROMPT)).sampled_token_ids[0]
    twice = make_batch(3, {"b": [*PROMPT, first]}, finished_request_ids=["a"])
    assert worker.execute(twice).sampled_token_ids == [[second]]


def test_step_that_loses_the_cache_loses_the_device(worker, monkeypatch):
    """A donated cache that went with a failed step holds nobody's context any more."""

    def take_along(*arguments: object) -> None:
        for part in worker._pool:
            part.delete()
        refuse()

    monkeypatch.setattr(quire_jax.worker, "run_sampling", take_along)
    with pytest.raises(DeviceLost, match="took the cache with it"):
        worker.execute(make_batch(1, {"a": PROMPT}))
    with pytest.raises(DeviceLost):
        worker.health()


def test_device_that_fails_is_lost_from_then_on(worker, monkeypatch):
    """A broken runtime is not asked again; the engine restarts the worker."""
    monkeypatch.setattr(quire_jax.worker, "forward", fail)
    with pytest.raises(DeviceLost, match="halted"):
        worker.execute(make_batch(1, {"a": PROMPT}))
    with pytest.raises(DeviceLost, match="halted"):
        worker.health()


def test_cache_larger_than_memory_is_refused_before_it_is_taken(worker):
    """A host would promise it and end the process later."""
    with pytest.raises(DeviceOutOfMemory) as caught:
        worker.allocate_cache(CachePlan(num_blocks=[1 << 40, 1 << 40]))
    assert caught.value.tag == "cache"
    worker.allocate_cache(CachePlan(num_blocks=[NUM_BLOCKS] * 2))
    assert worker.execute(make_batch(1, {"a": PROMPT})).sampled_token_ids != [[]]


def test_budget_leaves_room_for_weights_and_step(tmp_path):
    """A share of what is free; a share of nothing is nothing."""
    roomy, none = (make_worker(tmp_path, device_memory_fraction=f) for f in (0.5, 0.0))
    assert roomy.cache_budget_bytes() > 0
    assert roomy.memory_by_tag()["activations"] > 0
    assert none.cache_budget_bytes() == 0


def test_constraints_bind_their_own_request(worker):
    """Masks, allowed tokens, biases, bad words, min_tokens, penalties: each beside a free row."""
    (free,) = worker.execute(make_batch(1, {"free": PROMPT})).sampled_token_ids[0]
    cases = {
        "allowed": SamplingSpec(temperature=0.0, allowed_token_ids=(free + 1, free + 2)),
        "biased": SamplingSpec(temperature=0.0, logit_bias=((free, -1000.0),)),
        "forbidden": SamplingSpec(temperature=0.0, bad_words=((free,),)),
        "early": SamplingSpec(temperature=0.0, min_tokens=1, min_tokens_forbids=(free,)),
        "penalised": SamplingSpec(temperature=0.0, repetition_penalty=50.0),
        "masked": GREEDY,
    }
    words = np.full(-(-VOCAB_SIZE // 32), 0xFFFFFFFF, "<u4")
    words[free // 32] &= ~np.uint32(1 << (free % 32))
    for number, (name, sampling) in enumerate(cases.items()):
        prompts = {f"{name}-free": PROMPT, name: [free, *PROMPT[1:]] if "pen" in name else PROMPT}
        batch = make_batch(
            2 + number,
            prompts,
            {f"{name}-free": GREEDY, name: sampling},
            token_masks={name: words.tobytes()} if name == "masked" else {},
            finished_request_ids=list(worker._book._states),
        )
        (beside,), (bound,) = worker.execute(batch).sampled_token_ids
        assert beside == free, name
        assert bound != free, name
    assert (
        worker.execute(
            make_batch(
                99,
                {"none": PROMPT},
                SamplingSpec(allowed_token_ids=(free,), bad_words=((free,),)),
                finished_request_ids=list(worker._book._states),
            )
        )
        .errors["none"]
        .startswith("no token is left")
    )


def test_request_that_cannot_be_served_fails_alone(worker):
    """A token outside the vocabulary is its own request's problem."""
    result = worker.execute(make_batch(1, {"bad": [5, VOCAB_SIZE], "good": PROMPT}))
    assert result.errors == {
        "bad": f"token_ids holds token {VOCAB_SIZE}; the vocabulary has ids 0 to {VOCAB_SIZE - 1}"
    }
    assert [len(tokens) for tokens in result.sampled_token_ids] == [0, 1]


def test_model_of_nan_fails_its_requests_with_a_reason(worker):
    """Broken weights say so instead of answering token 0."""
    worker._weights["final_norm"] = worker._weights["final_norm"] * math.nan
    result = worker.execute(make_batch(1, {"a": PROMPT}, SamplingSpec(num_logprobs=2)))
    assert "NaN" in result.errors["a"]
    assert result.sampled_token_ids == [[]]


def test_step_of_an_unknown_request_is_refused_and_changes_nothing(worker):
    """A worker that was restarted must not answer for requests it never saw."""
    with pytest.raises(QuireError, match="unknown"):
        decode(worker, 1, "ghost", 3)
    assert not len(worker._book)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "jax.architecture"),
        ({"hidden_act": "relu"}, "jax.activation"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "jax.rope"),
        ({"quantization_config": {"quant_method": "gptq"}}, "jax.quantization"),
    ],
)
def test_model_beyond_the_package_is_refused_with_its_reason(tmp_path, change, code):
    """`quire plan` says so before any weight is read."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    settings = WorkerConfig(
        model=str(tmp_path),
        dtype="float32",
        cache_dtype="float32",
        block_size=16,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        device_memory_fraction=0.5,
    )
    with pytest.raises(UnsupportedError) as caught:
        JaxBackend().open(0).make_worker(settings)
    assert [reason.code for reason in caught.value.reasons] == [code]


def test_directory_without_weights_is_a_checkpoint_error(tmp_path):
    """The message names the directory and what is missing."""
    with pytest.raises(CheckpointError, match="safetensors"):
        make_worker(tmp_path, load_format="auto")


def test_compilation_cache_is_filled_where_it_is_asked_for(tmp_path):
    """The second start of a server need not compile again."""
    (tmp_path / "model").mkdir()
    folder = tmp_path / "compiled"
    options = {"jax.compilation_cache": str(folder)}
    worker = make_worker(tmp_path / "model", options=options, max_model_len=48)
    worker.execute(make_batch(1, {"a": PROMPT}))
    assert any(folder.iterdir())
